"""Checks of untrusted files, and the errors for damaged ones."""

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_video_engine.runtime.errors import CheckpointError

FETCH_AGAIN = "fetch the file again"
"""The advice in messages about damaged files."""

_MAX_CHARACTERS = 200


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Converts every exception in the block to a CheckpointError that names `path`; a CheckpointError is not changed.

    The block must only parse the file. For damaged files, the libraries raise almost any class, from AttributeError to
    RecursionError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)}); {FETCH_AGAIN}") from error


def regular_size(path: Path, *, at_most: int | None = None) -> int:
    """The size in bytes of a regular file, or of the target of a link.

    Raises CheckpointError for other kinds of files, because opening a pipe or a device may block forever, and for a
    file larger than `at_most` bytes.
    """
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; give the file itself or a link to it")
    if at_most is not None and status.st_size > at_most:
        raise CheckpointError(f"{path}: has {status.st_size:,} bytes; must have at most {at_most:,}; {FETCH_AGAIN}")
    return status.st_size


def check_printable(names: Iterable[str], path: Path) -> None:
    """Raises CheckpointError if a name in `path` has control characters, which would break the line of a message."""
    for name in names:
        if not name.isprintable():
            raise CheckpointError(f"{path}: has a name that cannot be printed, {name!r}; {FETCH_AGAIN}")


def one_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class, without control characters."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:_MAX_CHARACTERS]
    return "".join(character if character.isprintable() else "�" for character in first)
