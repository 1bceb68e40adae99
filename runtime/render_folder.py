"""The folder of one video: its files by name, who may write to it, and how it begins.

The folder is the state of the render. `video.json` comes last, and its presence alone means that the video is done.
"""

import json
import os
import re
import shlex
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from ttt_video_engine.runtime.errors import OutputError, RenderBusy
from ttt_video_engine.runtime.files import atomic_write, check_folder, make_folder, read_file, sync, writing
from ttt_video_engine.runtime.prompts import PROMPTS
from ttt_video_engine.runtime.run_record import (
    RECORD,
    RunRecord,
    differences,
    options_of_the_mp4,
    read_record,
    write_record,
)
from ttt_video_engine.runtime.step_state import HISTORY, LATENTS, is_state, states_in, steps_of

TEXT, VIDEO, CONTACT, PREVIEW = "text.safetensors", "video.mp4", "contact.png", "preview.png"
SIDECAR, FAILURE, LOCK = "video.json", "error.json", ".lock"
FAILURE_VERSION = 1
_MAX_DIFFERENCES = 8  # that a message names
_MAX_OWNER = 1000  # bytes of what a lock says of its owner

_PRODUCTS = (FAILURE, PROMPTS, TEXT, HISTORY, LATENTS, VIDEO, CONTACT, PREVIEW, RECORD)
_PARTIAL = re.compile(
    r"\.(?:state-\d{4,}\.safetensors|" + "|".join(re.escape(name) for name in (*_PRODUCTS, SIDECAR)) + r")"
    r"\.\d+\.partial\.\w+",
    re.ASCII,
)
"""What `atomic_write` leaves of these files when its process is killed."""


def is_kept(name: str) -> bool:
    """Whether a file of this name is a whole product of a render: no lock, and nothing half-written."""
    return name in (*_PRODUCTS, SIDECAR) or is_state(name)


def kept_files(folder: Path) -> list[Path]:
    """The whole files of a render: what says how it was begun first, what says that it is done last."""
    order = {RECORD: 0, SIDECAR: 2}
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if is_kept(path.name)), key=lambda path: (order.get(path.name, 1), path.name))


def progress(names: Iterable[str]) -> tuple[int, int]:
    """How far a render with these files is; more of it compares greater."""
    found = set(names)
    stages = ((SIDECAR, 4), (LATENTS, 3), (TEXT, 1), (RECORD, 0))
    steps = max((steps_of(name) for name in found if is_state(name)), default=0)
    stage = next((stage for name, stage in stages if name in found), -1)
    return (2, steps) if steps and stage < 3 else (stage, 0)


def is_done(folder: Path) -> bool:
    """Whether the video is complete."""
    return (folder / SIDECAR).exists()


def check_begin(folder: Path, record: RunRecord, *, overwrite: bool) -> None:
    """Raises OutputError unless the folder can be written and is new, begun with the same record, or overwritten."""
    check_folder(folder)
    for name in (*_PRODUCTS, SIDECAR, LOCK):
        if (folder / name).is_dir():
            raise OutputError(f"{folder / name}: is a folder, where a file is to be written; move it away")
    if overwrite:
        return
    begun = read_record(folder)
    if begun is None:
        made = next((folder / name for name in (SIDECAR, VIDEO, LATENTS) if (folder / name).exists()), None)
        if made is not None:
            raise OutputError(
                f"{made}: exists, and no {RECORD} says what made it; use --overwrite or another --output-dir"
            )
    elif found := differences(begun, record):
        more = f" and {len(found) - _MAX_DIFFERENCES} more" if len(found) > _MAX_DIFFERENCES else ""
        named = ", ".join(found[:_MAX_DIFFERENCES]) + more
        raise OutputError(f"{folder}: was begun with other inputs: {named}; {_cure(folder, begun, record)}")


def _cure(folder: Path, begun: RunRecord, record: RunRecord) -> str:
    """What to do about another record. Another mp4 of the same latents needs no new render."""
    options = options_of_the_mp4(begun, record)
    if options is None or (is_done(folder) and not (folder / LATENTS).exists()):
        return "render it with those, use --overwrite or another --output-dir"
    first = "" if is_done(folder) else "finish it with those, then "
    return f"use --overwrite, or {first}run: ttt-video decode {shlex.quote(str(folder))} --bundle BUNDLE {options}"


def begin(folder: Path, record: RunRecord, *, overwrite: bool) -> None:
    """Writes `run.json` if the folder has none or is overwritten. Only for the process that has claimed the folder."""
    check_begin(folder, record, overwrite=overwrite)
    if overwrite:
        clear(folder)
    _remove(folder / FAILURE)
    if read_record(folder) is None:
        write_record(folder, record)


def clear(folder: Path) -> None:
    """Removes what renders write, and nothing else; first what says that the video is done.

    That is off the disk before the next goes, as a power cut may undo any removal that is not.
    """
    _remove(folder / SIDECAR)
    with writing(folder):
        sync(folder)
    for path in (*states_in(folder).values(), *(folder / name for name in _PRODUCTS)):
        _remove(path)


def remove_states(folder: Path) -> None:
    """Removes what only the steps needed, once the latents are finished."""
    for path in (*states_in(folder).values(), folder / TEXT):
        _remove(path)


def note_failure(folder: Path, stage: str, error: Exception) -> None:
    """Writes `error.json` unless the folder was removed. Raises OutputError where it cannot be written."""
    if not folder.is_dir():
        return
    failure = {
        "format_version": FAILURE_VERSION,
        "stage": stage,
        "error": type(error).__name__,
        "message": str(error),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(folder / FAILURE) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(failure), indent=2) + b"\n")


class Claim:
    """The right of this process to write to a folder, for as long as its lock is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = (folder / LOCK).stat()

    @property
    def holds(self) -> bool:
        """Whether the lock is still that of this process: it is gone with a folder that was removed or replaced."""
        try:
            return os.path.samestat((self._folder / LOCK).stat(), self._lock)
        except OSError:
            return False

    def check(self) -> None:
        """Raises OutputError unless it holds. What is written after that may be beside the files of another process."""
        if not self.holds:
            raise OutputError(f"{self._folder}: was removed or replaced while its video was rendered; run again")


@contextmanager
def claimed(folder: Path, *, begun: bool = False) -> Iterator[Claim]:
    """Makes this process the one that writes to the folder, which is made where it is missing, unless it was `begun`.

    The claim is a lock of the operating system, which ends with its process however that ends. What a killed process
    left half-written is removed. Raises RenderBusy where another process has the folder, OutputError where it cannot
    be written or was removed since it was begun.
    """
    path = folder / LOCK
    if begun and not folder.is_dir():
        raise OutputError(f"{folder}: was removed while its video was rendered; run again")
    with writing(folder):
        make_folder(folder)
    lock = FileLock(path, blocking=False)
    try:
        with writing(path):
            lock.acquire()
    except Timeout:
        raise RenderBusy(f"{folder}: is being rendered by {_owner(path)}; wait for it, or stop it") from None
    claim = None
    try:
        with writing(path):
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            claim = Claim(folder)
        for partial in folder.iterdir():
            if _PARTIAL.fullmatch(partial.name):
                partial.unlink(missing_ok=True)
        yield claim
    finally:
        # It goes while it is locked: filelock, from 3.21, sees that a file it opened before is gone. One that cannot be
        # removed claims nothing.
        with suppress(OSError):
            if claim is None or claim.holds:
                path.unlink(missing_ok=True)
        lock.release()


def _remove(path: Path) -> None:
    """Removes a file if it exists. Raises OutputError where that fails."""
    with writing(path):
        path.unlink(missing_ok=True)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(read_file(path, _MAX_OWNER))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
