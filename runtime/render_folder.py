"""The folder of one video: its files by name, who may write to it, and how it begins.

The folder is the state of the render. `video.json` comes last, and its presence alone means that the video is done.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from ttt_video_engine.runtime.errors import OutputError, RenderBusy
from ttt_video_engine.runtime.files import atomic_write, check_folder, make_folder, sync, writing
from ttt_video_engine.runtime.prompts import PROMPTS
from ttt_video_engine.runtime.run_record import RECORD, RunRecord, differences, read_record, write_record
from ttt_video_engine.runtime.step_state import HISTORY, LATENTS, states_in

TEXT, VIDEO, CONTACT, PREVIEW = "text.safetensors", "video.mp4", "contact.png", "preview.png"
SIDECAR, FAILURE, LOCK = "video.json", "error.json", ".lock"
FAILURE_VERSION = 1

_PRODUCTS = (FAILURE, PROMPTS, TEXT, HISTORY, LATENTS, VIDEO, CONTACT, PREVIEW, RECORD)
_PARTIAL = re.compile(
    r"\.(?:state-\d{4,}\.safetensors|" + "|".join(re.escape(name) for name in (*_PRODUCTS, SIDECAR)) + r")"
    r"\.\d+\.partial\.\w+",
    re.ASCII,
)
"""What `atomic_write` leaves of these files when its process is killed."""


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
        raise OutputError(
            f"{folder}: was begun with other inputs: {', '.join(found)}; "
            "render it with those, use --overwrite or another --output-dir"
        )


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
    """Writes `error.json`. Raises OutputError where it cannot be written."""
    failure = {
        "format_version": FAILURE_VERSION,
        "stage": stage,
        "error": type(error).__name__,
        "message": str(error),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(folder / FAILURE) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(failure), indent=2) + b"\n")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes this process the one that writes to the folder, which is made where it is missing.

    The claim is a lock of the operating system, which ends with its process however that ends. What a killed process
    left half-written is removed. Raises RenderBusy where another process has the folder.
    """
    path = folder / LOCK
    with writing(folder):
        make_folder(folder)
    lock = FileLock(path, blocking=False)
    try:
        with writing(path):
            lock.acquire()
    except Timeout:
        raise RenderBusy(f"{folder}: is being rendered by {_owner(path)}; wait for it, or stop it") from None
    try:
        with writing(path):
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        for partial in folder.iterdir():
            if _PARTIAL.fullmatch(partial.name):
                partial.unlink(missing_ok=True)
        yield
    finally:
        # It goes while it is locked: filelock, from 3.21, sees that a file it opened before is gone. One that cannot be
        # removed claims nothing.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _remove(path: Path) -> None:
    """Raises OutputError where a file that is there cannot be removed."""
    with writing(path):
        path.unlink(missing_ok=True)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return f"process {int(owner['pid'])} on {str(owner['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
