"""A finished folder takes the place of a bundle; files in the bundle's folder that are not the bundle's stay in it.

There is a bundle at every moment: two names are exchanged in one step, and where the system has no such step, the old
bundle lies at `retired_folder`, where opening finds it. After a kill at any moment `settle` goes on: a folder beside
the bundle with a manifest, but without what a stage notes, is a bundle that was replaced.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from msgspec import Struct

from ttt_video_engine.runtime.bundle import MANIFEST, FileEntry, retired_folder
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import exchange, sync

FINISHED = "finished.json"
"""What a stage notes, and what tells a stage from any other folder."""


class _Listing(Struct):
    """What every format of `bundle.json` has."""

    format_version: int
    model: dict[str, Any]
    graphs: dict[str, Any]
    files: dict[str, FileEntry]


def stage_folder(output: Path) -> Path:
    """Where the successor of a bundle grows."""
    return output.with_name(f".{output.name}.partial")


def bundle_files(folder: Path) -> set[str]:
    """Names of the files of the bundle in `folder`, whole or damaged; none where there is nothing.

    Raises OutputError where the folder holds anything, but no bundle of ours: it is not ours to replace.
    """
    if not folder.exists() or _is_empty(folder):
        return set()
    names = _listed(folder)
    if names is None:
        raise OutputError(f"{folder}: exists and is not a bundle; choose another folder or remove it")
    return names


def replace_bundle(stage: Path, output: Path) -> None:
    """Gives a stage that is complete and on the disk the name `output`, and clears the bundle away that had it.

    Raises OutputError, before anything has changed, where a file that is not the bundle's has the name of a new one.
    """
    for name in _strangers(output, bundle_files(output)):
        for clash in _clashes(output / name, stage / name):
            raise OutputError(f"{clash}: is not of the bundle and has the name of a file of it; move it, export again")
    if not output.exists():
        os.replace(stage, output)
    elif not exchange(stage, output):
        os.replace(output, retired_folder(output))
        os.replace(stage, output)
    sync(output.parent)
    settle(output)


def settle(output: Path) -> None:
    """Ends a replacement that was begun: what lies beside `output` is put back or cleared away.

    Raises OutputError where a folder that is not of an export is in the way.
    """
    retired = retired_folder(output)
    if retired.exists() and _listed(retired) is None and not _is_empty(retired):
        raise OutputError(f"{retired}: is where an export keeps the bundle that it replaces; move it away")
    if _listed(retired) is not None and not output.exists():
        os.replace(retired, output)
        sync(output.parent)
    if not output.is_dir() or _listed(output) is None:
        return
    (output / FINISHED).unlink(missing_ok=True)
    for folder in (retired, stage_folder(output)):
        if folder.is_dir() and not (folder / FINISHED).exists():
            _clear(folder, output)


def remove_files(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Removes the files of these names, and the folders that are then empty."""
    for root, _, files in os.walk(folder, topdown=False):
        for path in (Path(root, file) for file in files):
            if is_ours(path.relative_to(folder).as_posix()):
                path.unlink()
        with suppress(OSError):  # where it is not empty
            os.rmdir(root)


def _clear(folder: Path, output: Path) -> None:
    """Removes a bundle that was replaced, its manifest last; what is not its own moves into its successor."""
    names = _listed(folder) or set()
    for name in list(_strangers(folder, names)) if names else []:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        _move(folder / name, output / name)
    remove_files(folder, lambda name: name in names and name != MANIFEST)
    if folder.is_dir() and os.listdir(folder) == [MANIFEST]:
        remove_files(folder, lambda name: name == MANIFEST)


def _listed(folder: Path) -> set[str] | None:
    try:
        listing = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return {*listing.files, MANIFEST, FINISHED}


def _strangers(folder: Path, names: set[str]) -> Iterator[str]:
    """Files, links and whole folders in `folder` that are not of the bundle of these `names`."""
    parents = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    left = sorted(folder.iterdir()) if folder.is_dir() else []
    while left:
        path = left.pop()
        name = path.relative_to(folder).as_posix()
        if name in parents and path.is_dir() and not path.is_symlink():
            left += sorted(path.iterdir())
        elif name not in names:
            yield name


def _clashes(source: Path, target: Path) -> Iterator[Path]:
    """What of `source` cannot be moved to `target`, for there is something else."""
    if not os.path.lexists(target):
        return
    if not _are_folders(source, target):
        yield source
        return
    for child in sorted(source.iterdir()):
        yield from _clashes(child, target / child.name)


def _move(source: Path, target: Path) -> None:
    """Moves a file or a folder, into a folder of that name where there is one; replaces nothing."""
    with suppress(OSError):  # what cannot be moved stays where it is
        if not os.path.lexists(target):
            os.rename(source, target)
        elif _are_folders(source, target):
            for child in sorted(source.iterdir()):
                _move(child, target / child.name)
            source.rmdir()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _are_folders(*paths: Path) -> bool:
    return all(path.is_dir() and not path.is_symlink() for path in paths)
