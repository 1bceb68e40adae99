"""Files from elsewhere: which of them are opened, and the error for one that is damaged."""

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_video_engine.runtime.errors import CheckpointError

CURE = "fetch the file again"
_MOST_CHARACTERS = 200


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises CheckpointError, which names `path`, for every error in the block; a CheckpointError passes unchanged.

    The block is to hold calls that parse the file and nothing else: on a damaged file the libraries raise almost
    anything, from AttributeError to RecursionError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)}); {CURE}") from error


def regular_size(path: Path, *, at_most: int | None = None) -> int:
    """The size in bytes of a regular file, or of the one that a link leads to.

    Raises CheckpointError for everything else, since opening a pipe or a device may block forever, and for a file of
    more than `at_most` bytes.
    """
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; give the file itself or a link to it")
    if at_most is not None and status.st_size > at_most:
        raise CheckpointError(f"{path}: has {status.st_size:,} bytes; must have at most {at_most:,}; {CURE}")
    return status.st_size


def check_printable(names: Iterable[str], path: Path) -> None:
    """Raises CheckpointError for a name in `path` that would break the line of a later message."""
    for name in names:
        if not name.isprintable():
            raise CheckpointError(f"{path}: has a name that cannot be printed, {name!r}; {CURE}")


def one_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class. Free of control characters."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:_MOST_CHARACTERS]
    return "".join(character if character.isprintable() else "�" for character in first)
