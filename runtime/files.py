"""Files that are either whole or not there: written beside their target, on the disk, then renamed.

A name that a power cut leaves behind must not stand for a file without its bytes: what claims to be complete is synced
before it is renamed, and its folder after.
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ttt_video_engine.runtime.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2(2)."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Gives a path beside `target` to write to, and renames it to `target` when the block ends well.

    `target` then is on the disk, and so is its name. Whatever ends the block otherwise, ctrl-C too, removes what was
    written. A full or failing disk or a folder that cannot be written becomes an OutputError that names the target.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial{target.suffix}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
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
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            raise OutputError(f"{target}: cannot be replaced ({error.strerror}); choose another folder") from error
        if error.errno == errno.EIO:
            raise OutputError(f"{target}: cannot be written ({error.strerror}); check the disk") from error
        raise


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk. Raises OSError where the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # file systems without folders of their own to sync
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """As `sync`, for a folder and all that is in it; links are not followed."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(root))


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step, so that neither is ever missing; False where the system cannot.

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
    for path in (folder, *folder.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{folder}: {path} is a link to {path.readlink()}, which is not there; choose another")
    existing = folder if folder.exists() else _existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: {existing} is not a folder that can be written; choose another")


def check_replaceable(folder: Path) -> Path:
    """The real path of a folder to be made, or to be replaced by a rename, links followed.

    Raises OutputError for what a rename cannot replace, or must not: a mount point, a loop of links, and the folder
    that the command runs in, which its shell would go on to see as it was.
    """
    try:
        real = folder.resolve()
        if Path.cwd().is_relative_to(real):
            raise OutputError(f"{folder}: is the folder that this command runs in; run it elsewhere, or name another")
        if os.path.ismount(real) or str(real) in _mount_points():
            raise OutputError(f"{folder}: is a mount point, which cannot be replaced; name a folder in it")
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or "its links lead nowhere"
        raise OutputError(f"{folder}: cannot be written ({cause}); choose another folder") from error
    return real


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


def _mount_points() -> set[str]:
    """Of this process, bind mounts too, which `ismount` does not see; none where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines}


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
