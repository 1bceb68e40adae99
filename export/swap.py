"""Replaces a bundle by a finished stage. Files in the bundle's folder that are not the bundle's stay there.

There is a complete bundle at every moment. The two folders are exchanged in one system call. Where the system has no
such call, the old bundle is first renamed to `retired_folder`, where opening a bundle finds it. If the process is
killed, `finish_replacement` continues: a folder beside the bundle that has a manifest, but no record of a stage, is a
bundle that was replaced.
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
"""A stage's record of its finished files. It distinguishes a stage from every other folder."""


class _Listing(Struct):
    """The fields that every version of `bundle.json` has."""

    format_version: int
    model: dict[str, Any]
    graphs: dict[str, Any]
    files: dict[str, FileEntry]


def stage_folder(output: Path) -> Path:
    """The folder in which an export builds the next bundle for `output`."""
    return output.with_name(f".{output.name}.partial")


def bundle_files(folder: Path) -> set[str]:
    """Names of the files that the bundle in `folder` lists; empty if the folder is missing or empty.

    Raises OutputError if the folder holds anything but a bundle: an export must not replace it.
    """
    if not folder.exists() or _is_empty(folder):
        return set()
    names = _listed_files(folder)
    if names is None:
        raise OutputError(f"{folder}: exists and is not a bundle; choose another folder or remove it")
    return names


def replace_bundle(stage: Path, output: Path) -> None:
    """Renames a stage that is complete and synced to `output`, and removes the bundle that was there.

    Raises OutputError, before anything changes, if a file that is not the old bundle's has the name of a new file.
    """
    for name in _foreign_files(output, bundle_files(output)):
        for conflict in _conflicts(output / name, stage / name):
            raise OutputError(f"{conflict}: the new bundle has a file of this name; move it and export again")
    if not output.exists():
        os.replace(stage, output)
    elif not exchange(stage, output):
        os.replace(output, retired_folder(output))
        os.replace(stage, output)
    sync(output.parent)
    finish_replacement(output)


def finish_replacement(output: Path) -> None:
    """Finishes a replacement that was interrupted: restores the old bundle, or removes it if the new one is in place.

    Raises OutputError if the folder for the old bundle exists and holds anything else.
    """
    retired = retired_folder(output)
    if retired.exists() and _listed_files(retired) is None and not _is_empty(retired):
        raise OutputError(f"{retired}: the export needs this folder for the bundle that it replaces; move it away")
    if _listed_files(retired) is not None and not output.exists():
        os.replace(retired, output)
        sync(output.parent)
    if not output.is_dir() or _listed_files(output) is None:
        return
    (output / FINISHED).unlink(missing_ok=True)
    for folder in (retired, stage_folder(output)):
        if folder.is_dir() and not (folder / FINISHED).exists():
            _remove_replaced(folder, output)


def remove_files(folder: Path, matches: Callable[[str], bool]) -> None:
    """Removes the files whose names match, then the folders that are empty."""
    for root, _, files in os.walk(folder, topdown=False):
        for path in (Path(root, file) for file in files):
            if matches(path.relative_to(folder).as_posix()):
                path.unlink()
        with suppress(OSError):  # not empty
            os.rmdir(root)


def _remove_replaced(folder: Path, output: Path) -> None:
    """Removes a replaced bundle, its manifest last. Files that are not the bundle's move to `output`."""
    names = _listed_files(folder) or set()
    for name in list(_foreign_files(folder, names)) if names else []:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        _move(folder / name, output / name)
    remove_files(folder, lambda name: name in names and name != MANIFEST)
    if folder.is_dir() and os.listdir(folder) == [MANIFEST]:
        remove_files(folder, lambda name: name == MANIFEST)


def _listed_files(folder: Path) -> set[str] | None:
    """Names of the files that a bundle's manifest lists, itself included; None without a readable manifest."""
    try:
        listing = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return {*listing.files, MANIFEST, FINISHED}


def _foreign_files(folder: Path, names: set[str]) -> Iterator[str]:
    """Files, links and whole folders in `folder` that do not belong to the bundle with the files `names`."""
    parents = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    pending = sorted(folder.iterdir()) if folder.is_dir() else []
    while pending:
        path = pending.pop()
        name = path.relative_to(folder).as_posix()
        if name in parents and path.is_dir() and not path.is_symlink():
            pending += sorted(path.iterdir())
        elif name not in names:
            yield name


def _conflicts(source: Path, target: Path) -> Iterator[Path]:
    """Paths in `source` that cannot be moved to `target`, because the target exists."""
    if not os.path.lexists(target):
        return
    if not _are_folders(source, target):
        yield source
        return
    for child in sorted(source.iterdir()):
        yield from _conflicts(child, target / child.name)


def _move(source: Path, target: Path) -> None:
    """Moves a file or a folder. Merges folders, replaces nothing; what cannot be moved stays."""
    with suppress(OSError):
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
