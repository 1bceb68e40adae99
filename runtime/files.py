"""Writes files that are either complete or absent: beside their target first, then renamed.

A power cut must not leave a name without its content. So a file is synced to disk before it is renamed, and its folder
afterwards.
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ttt_video_engine.runtime.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2(2)."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` to write to, and renames it to `target` when the block succeeds.

    `target` is then on disk, name and content. Where the block fails or is interrupted, the partial file is deleted.
    Raises OutputError that names the target where the disk is full or fails, or the folder cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial{target.suffix}")
    with writing(target):
        make_folder(target.parent)
        try:
            yield partial
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns an OSError of a write into an OutputError that names `target`."""
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
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            raise OutputError(f"{target}: cannot be replaced ({error.strerror}); choose another folder") from error
        if error.errno == errno.ENOENT:
            raise OutputError(f"{target}: cannot be written (its folder was removed); run again") from error
        if error.errno == errno.EIO:
            raise OutputError(f"{target}: cannot be written ({error.strerror}); check the disk") from error
        raise


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk. Raises OSError where the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and the parents that it lacks, on the disk when this returns. Raises OSError where that fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """As `sync`, for a folder and everything in it. Links are not followed."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(root))


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names atomically, so that neither is ever missing. Returns False where the system cannot.

    Both must exist, on one file system. Raises OSError where the swap fails.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def check_folder(folder: Path) -> None:
    """Raises OutputError unless files can be written in `folder`, which need not exist yet."""
    try:
        for path in (folder, *folder.absolute().parents):
            if path.is_symlink() and not path.exists():
                raise OutputError(
                    f"{folder}: {path} is a link to {path.readlink()}, which is not there; choose another"
                )
        existing = folder if folder.exists() else _existing_parent(folder)
    except OSError as error:  # a folder above that cannot be searched
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: {existing} is not a writable folder; choose another folder")


def replaceable_path(folder: Path) -> Path:
    """The real path, links resolved, of a folder that is to be created, or replaced by a rename.

    Raises OutputError for a folder that a rename cannot or must not replace: a mount point, a loop of links, or the
    current folder, which the user's shell would continue to show with its old content.
    """
    try:
        real = folder.resolve()
        if Path.cwd().is_relative_to(real):
            raise OutputError(
                f"{folder}: is the current folder of this command; run it in another folder, or choose another output"
            )
        if os.path.ismount(real) or str(real) in _mount_points():
            raise OutputError(f"{folder}: is a mount point, which cannot be replaced; choose a folder in it")
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or "its links form a loop"
        raise OutputError(f"{folder}: cannot be written ({cause}); choose another folder") from error
    return real


def check_space(target: Path, needs: Mapping[str, int]) -> None:
    """Raises OutputError unless the disk of `target` has room for all `needs`: bytes by their purpose."""
    free, total = shutil.disk_usage(_existing_parent(target)).free, sum(needs.values())
    if total > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.items())
        raise OutputError(
            f"{target}: needs up to {total / 1e9:.1f} GB ({parts}); the disk has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where the file system has none. Neither is to be modified."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises OSError for anything else, which may never end or never begin, and for a file of more than `limit` bytes.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes; at most {limit}", str(path))
        return file.read(limit + 1)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mount_points() -> set[str]:
    """Mount points, bind mounts included, which `ismount` misses. Empty where the system does not list them."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines}


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
