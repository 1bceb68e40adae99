"""Files that are either whole or not there: written beside their target, then renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ttt_video_engine.runtime.errors import OutputError


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Gives a path beside `target` to write to, and renames it to `target` when the block ends well.

    Whatever ends the block otherwise, ctrl-C too, removes what was written. A full disk or a folder that cannot be
    written becomes an OutputError that names the target.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial{target.suffix}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns what the system says when it cannot write into an OutputError about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(target)).free
            raise OutputError(
                f"{target}: the disk is full ({free >> 20} MiB free); free some space, run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"{target}: cannot be written ({error.strerror}); choose another folder") from error
        raise


def check_folder(folder: Path) -> None:
    """Raises OutputError unless files can be written in `folder`, which need not exist yet."""
    existing = folder if folder.exists() else _existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: {existing} is not a folder that can be written; choose another")


def check_space(target: Path, needs: Mapping[str, int]) -> None:
    """Raises OutputError unless the disk of `target` has as many bytes free as all `needs`, by what needs them."""
    free, total = shutil.disk_usage(_existing_parent(target)).free, sum(needs.values())
    if total > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.items())
        raise OutputError(
            f"{target}: takes up to {total / 1e9:.1f} GB ({parts}), the disk has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that will not be written to again; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
