"""A cache of prompt embeddings, so that the same text is encoded only once.

The text encoder is the largest component after the transformer. When a storyboard is rendered again, most of its scenes
are unchanged, and so is every empty negative prompt.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write

LIMIT = 2 << 30
"""Bytes that the files of a cache may take. The least recently used are deleted first."""

_SUFFIX = ".embedding"
_ENTRY = re.compile(r"[0-9a-f]{64}\.embedding", re.ASCII)
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.embedding\.\d+\.partial\.embedding", re.ASCII)
"""What `atomic_write` leaves of an entry when its process is killed."""
_LOCK = ".lock"
_PATIENCE = 10.0
"""Seconds that a process waits for another to write an entry. After that its own is not stored."""
_MAX_WIDTH = 1 << 16
_DIGEST_BYTES = hashlib.sha256().digest_size

Floats = NDArray[np.float32]


class TextCache:
    """Embeddings [N, d_model] by the token ids [N] of a scene, in one folder for all encoders.

    A cache without a folder is empty. `encoder` identifies everything else that an embedding depends on. `verify`
    raises where the encoder's files do not match `encoder`; it is called once, before the first entry is stored.
    `width` is d_model; None accepts any.

    An entry is a SHA-256 of `encoder`, ids and data, then the data as little-endian float32. Faults of the cache are
    not errors: a damaged entry is ignored, and an entry that cannot be written is not stored. Entries are written and
    deleted under a lock, so what is half-written while a process has the lock is that of a process that was killed; it
    is removed when a cache is first read from, and whenever an entry is stored.
    """

    def __init__(
        self, folder: Path | None, encoder: str, width: int | None = None, verify: Callable[[], None] | None = None
    ) -> None:
        self._folder, self._encoder, self._width, self._verify = folder, encoder, width, verify
        self._cleaned = folder is None

    def get(self, ids: NDArray[np.int64]) -> Floats | None:
        """The stored embedding of these ids, or None."""
        if self._folder is None:
            return None
        self._clean()
        key = self._key(ids)
        path = _path(self._folder, key)
        try:
            status = path.stat()
            width, rest = divmod(status.st_size - _DIGEST_BYTES, 4 * len(ids))
            # Checked before the file is read, so that a huge file takes no memory.
            if not stat.S_ISREG(status.st_mode) or rest or not self._accepts(width):
                return None
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _checksum(key, data):
            return None
        return np.frombuffer(data, "<f4").reshape(len(ids), width).astype(np.float32)

    def put(self, ids: NDArray[np.int64], embedding: Floats) -> None:
        """Stores an embedding, then deletes the least recently used entries above the limit.

        Raises what `verify` raises. An embedding with NaN or infinite values is not stored.
        """
        if self._folder is None or not np.isfinite(embedding).all():
            return
        if self._verify is not None:
            self._verify()
            self._verify = None
        key = self._key(ids)
        data = np.ascontiguousarray(embedding, dtype="<f4").tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder, _PATIENCE):
                _remove_partial(self._folder)
                with atomic_write(_path(self._folder, key)) as partial:
                    partial.write_bytes(_checksum(key, data) + data)
                _prune(self._folder)
        except (OSError, OutputError, Timeout):
            return

    def _clean(self) -> None:
        """Removes, once, what killed processes left, unless another process is writing now."""
        if self._cleaned or self._folder is None or not self._folder.is_dir():
            return
        self._cleaned = True
        try:
            if any(map(_PARTIAL.fullmatch, os.listdir(self._folder))):
                with _locked(self._folder, 0):
                    _remove_partial(self._folder)
        except (OSError, Timeout):
            return

    def _accepts(self, width: int) -> bool:
        return width == self._width if self._width is not None else 0 < width <= _MAX_WIDTH

    def _key(self, ids: NDArray[np.int64]) -> bytes:
        content = self._encoder.encode() + b"\0" + np.ascontiguousarray(ids, dtype="<i8").tobytes()
        return hashlib.sha256(content).digest()


def _path(folder: Path, key: bytes) -> Path:
    return folder / f"{key.hex()}{_SUFFIX}"


def _checksum(key: bytes, data: bytes) -> bytes:
    return hashlib.sha256(key + data).digest()


@contextmanager
def _locked(folder: Path, patience: float) -> Iterator[None]:
    """Raises Timeout where another process has the lock for longer than `patience` seconds."""
    path = folder / _LOCK
    with FileLock(path, timeout=patience):
        try:
            yield
        finally:
            # While it is locked: filelock, from 3.21, sees that a file it opened before is gone.
            path.unlink(missing_ok=True)


def _remove_partial(folder: Path) -> None:
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    files = sorted(
        (path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir() if _ENTRY.fullmatch(path.name)
    )
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= LIMIT:
            return
        path.unlink(missing_ok=True)
        total -= size
