"""Records in the user's cache which files have a verified digest, so that an unchanged file is not read again.

A record is an empty file, named by a hash of the file's device, inode, size, times and SHA-256. Any change of the file
changes its ctime, which no program can set, so the record no longer matches.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ttt_video_engine.runtime.user_cache import cache_folder


def is_verified(status: os.stat_result, sha256: str) -> bool:
    """Whether a file with this status is recorded to have this digest."""
    path = _path(status, sha256)
    return path is not None and path.exists()


def mark_verified(status: os.stat_result, sha256: str) -> None:
    """Records that a file has this digest. `status` is from before it was read. Does nothing without a cache folder."""
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
