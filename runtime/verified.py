"""Files whose digests were taken, noted in the user's cache, so that what is untouched is not read again.

A note is an empty file. Its name is the digest of where the file is, its size, its times and what it held: whatever
touches the file changes its ctime, which no program can set, and so leaves it without a note.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ttt_video_engine.runtime.user_cache import cache_folder


def is_noted(status: os.stat_result, sha256: str) -> bool:
    """Whether a file of this status was noted to have this digest."""
    path = _path(status, sha256)
    return path is not None and path.exists()


def note(status: os.stat_result, sha256: str) -> None:
    """Notes that the file, which had this status before it was read, has this digest; nothing where it cannot be."""
    path = _path(status, sha256)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _path(status: os.stat_result, sha256: str) -> Path | None:
    folder = cache_folder("verified")
    known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)
    return None if folder is None else folder / hashlib.sha256(repr(known).encode()).hexdigest()
