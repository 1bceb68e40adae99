"""How much of a large file is on the disk, so that writing it can go on after a kill or a power cut."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from ttt_video_engine.runtime.files import atomic_write, writing

_CHUNK = 16 << 20


class _Note(Struct):
    key: dict[str, str]
    end: int
    sha256: str


class Journal:
    """Beside the file at `path`, which is made from `key`: up to where it is written, and the digest of that."""

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        self.path = journal_of(path)
        self._file = path
        self._key = key

    def resume(self, out: BinaryIO) -> tuple["hashlib._Hash", int]:
        """Leaves `out` at the end of what is good in it; gives the digest of that, and its size."""
        digest, note = hashlib.sha256(), self._read()
        left = note.end
        while left and (part := out.read(min(left, _CHUNK))):
            digest.update(part)
            left -= len(part)
        end = note.end
        if digest.hexdigest() != note.sha256:
            digest, end = hashlib.sha256(), 0
        out.seek(end)
        out.truncate()
        return digest, end

    def note(self, out: BinaryIO, end: int, sha256: str) -> None:
        """Notes `end`, once what is before it is on the disk. The system need not keep that in memory any longer.

        Raises OutputError where the disk fails.
        """
        with writing(self._file):
            out.flush()
            os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
        with atomic_write(self.path) as partial:
            partial.write_bytes(msgspec.json.encode(_Note(self._key, end, sha256)))

    def _read(self) -> _Note:
        nothing = _Note(self._key, 0, hashlib.sha256().hexdigest())
        try:
            note = msgspec.json.decode(self.path.read_bytes(), type=_Note)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return nothing
        return note if note.key == self._key else nothing


def journal_of(path: Path) -> Path:
    """Where the journal of a file lies."""
    return path.with_name(f"{path.name}.journal")
