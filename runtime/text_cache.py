"""Embeddings of prompts, kept by content: a scene that was encoded once is not encoded again.

The text encoder is the largest component after the transformer, and most scenes of a storyboard that is rendered again,
and every empty negative prompt, are the same as before.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write

LIMIT = 2 << 30
"""Bytes that the files of a cache may take; the ones that were used longest ago go first."""

Floats = NDArray[np.float32]


class TextCache:
    """Embeddings [N, d_model] by the token ids [N] of a scene, in one folder for all encoders.

    `encoder` is everything else that they depend on. The cache never fails: what cannot be read is encoded again, and
    what cannot be written is not kept.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self._folder, self._encoder = folder, encoder

    def get(self, ids: NDArray[np.int64]) -> Floats | None:
        """What was put for these ids, or None."""
        path = self._path(ids)
        try:
            embedding = np.load(path, allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return None
        whole = isinstance(embedding, np.ndarray) and embedding.dtype == np.float32 and embedding.ndim == 2
        return embedding if whole and len(embedding) == len(ids) and np.isfinite(embedding).all() else None

    def put(self, ids: NDArray[np.int64], embedding: Floats) -> None:
        """Keeps an embedding, and drops the oldest beyond the limit."""
        try:
            with atomic_write(self._path(ids)) as partial:
                np.save(partial, embedding, allow_pickle=False)
            self._prune()
        except (OSError, OutputError):
            return

    def _path(self, ids: NDArray[np.int64]) -> Path:
        content = self._encoder.encode() + b"\0" + np.ascontiguousarray(ids, dtype="<i8").tobytes()
        return self._folder / f"{hashlib.sha256(content).hexdigest()}.npy"

    def _prune(self) -> None:
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*.npy"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= LIMIT:
                return
            path.unlink(missing_ok=True)
            total -= size


def default_folder() -> Path:
    """Where a user's caches lie (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt-video" / "text"
