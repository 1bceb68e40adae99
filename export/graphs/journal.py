"""Records how much of a large file is on the disk, so that writing it is resumed after a kill or a power cut."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from ttt_video_engine.runtime.files import atomic_write, writing

_CHUNK = 16 << 20


class _Record(Struct):
    """The first `end` bytes of the file are on the disk and have the digest `sha256`."""

    key: dict[str, str]
    end: int
    sha256: str


class Journal:
    """The journal beside the file at `path`. It applies only to a file that is written from the same `key`."""

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        self.path = journal_path(path)
        self._file = path
        self._key = key

    def resume(self, out: BinaryIO) -> tuple["hashlib._Hash", int]:
        """Verifies the recorded part of `out`, truncates `out` after it, and seeks there.

        Returns the running digest and the size of that part in bytes: 0 if it does not match the record.
        """
        digest, record = hashlib.sha256(), self._read()
        remaining = record.end
        while remaining and (part := out.read(min(remaining, _CHUNK))):
            digest.update(part)
            remaining -= len(part)
        end = record.end
        if digest.hexdigest() != record.sha256:
            digest, end = hashlib.sha256(), 0
        out.seek(end)
        out.truncate()
        return digest, end

    def record(self, out: BinaryIO, end: int, sha256: str) -> None:
        """Syncs `out` to the disk, then records its first `end` bytes. Raises OutputError on an I/O error.

        The page cache of those bytes is dropped.
        """
        with writing(self._file):
            out.flush()
            os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
        with atomic_write(self.path) as partial:
            partial.write_bytes(msgspec.json.encode(_Record(self._key, end, sha256)))

    def _read(self) -> _Record:
        empty = _Record(self._key, 0, hashlib.sha256().hexdigest())
        try:
            record = msgspec.json.decode(self.path.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return empty
        return record if record.key == self._key else empty


def journal_path(path: Path) -> Path:
    """The path of a file's journal."""
    return path.with_name(f"{path.name}.journal")
