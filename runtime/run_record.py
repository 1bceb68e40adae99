"""run.json: everything that fixes what a render's folder comes to, written before its first step."""

import hashlib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from ttt_video_engine.runtime.errors import OutputError, brief
from ttt_video_engine.runtime.files import atomic_write, read_file
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import MAX_FILE_BYTES, Scene
from ttt_video_engine.runtime.video import with_crf

RECORD = "run.json"
_CHOSEN = ("engine", "provider")
"""Of the environment, what a user chooses: another would give another video."""
_OF_THE_FILE = ("codec", "crf")
"""Settings that change the mp4 and nothing that a render resumes from."""
_OF_THE_MP4 = ("settings.fps", "settings.codec", "settings.crf")
_MAX_SHOWN = 40
_MAX_BYTES = 2 * MAX_FILE_BYTES
"""Of a file; what the largest storyboard comes to."""


class BundleRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What made the video. `sha256` is that of `bundle.json`, which holds those of all other files. `quantize` is not
    written where the bundle is not quantised."""

    sha256: str
    preset: str
    ttt: str
    dtype: str
    quantize: str | UnsetType = UNSET


class RunRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of `run.json`. `environment` and `versions` are those of the first start."""

    format_version: Literal[1] = 1
    length: str
    scenes: tuple[Scene, ...]
    settings: Settings
    bundle: BundleRecord
    environment: dict[str, str]
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """Digest of everything that determines latents. Every file that a render resumes from holds it."""
        # Through JSON, as it is read back: a rate of 16 is 16.0 there.
        fixed = _fixed(msgspec.json.decode(msgspec.json.encode(self), type=RunRecord))
        for name in _OF_THE_FILE:
            del fixed["settings"][name]
        return hashlib.sha256(msgspec.json.encode(dict(sorted(fixed.items())))).hexdigest()


def read_record(folder: Path) -> RunRecord | None:
    """What a folder was begun with; None for one that was not. Raises OutputError where it cannot be read."""
    path = folder / RECORD
    try:
        return msgspec.json.decode(read_file(path, _MAX_BYTES), type=RunRecord)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OutputError(
            f"{path}: cannot be read ({brief(error)}); use --overwrite or another --output-dir"
        ) from error


def write_record(folder: Path, record: RunRecord) -> None:
    """Raises OutputError where the disk is full or fails."""
    with atomic_write(folder / RECORD) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def differences(old: RunRecord, new: RunRecord) -> list[str]:
    """What would make another video, such as "settings.seed 42 → 43"; empty where `new` can resume `old`."""
    return list(_compare("", _fixed(old), _fixed(new)))


def options_of_the_mp4(old: RunRecord, new: RunRecord) -> str | None:
    """Options of `decode` that make the mp4 of `new` of the latents of `old`; None where more than the mp4 differs."""
    if any(found.partition(" ")[0] not in _OF_THE_MP4 for found in differences(old, new)):
        return None
    before, after = _fixed(old)["settings"], _fixed(new)["settings"]
    names = [path.partition(".")[2] for path in _OF_THE_MP4]
    return " ".join(f"--{name} {after[name]}" for name in names if before[name] != after[name])


def changes(old: RunRecord, new: RunRecord) -> list[str]:
    """What may round differently: versions and hardware, such as "numpy 2.4.5 → 2.4.6"."""
    return [
        *_compare("", _rest(old.environment), _rest(new.environment)),
        *_compare("", old.versions, new.versions),
    ]


def _fixed(record: RunRecord) -> dict[str, Any]:
    """As JSON has it; a CRF that an older record leaves to the codec is stated."""
    fixed: dict[str, Any] = msgspec.to_builtins(
        {
            "length": record.length,
            "scenes": record.scenes,
            "settings": with_crf(record.settings),
            "bundle": record.bundle,
            **{name: record.environment[name] for name in _CHOSEN if name in record.environment},
        }
    )
    return fixed


def _rest(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _CHOSEN}


def _compare(path: str, old: Any, new: Any) -> Iterator[str]:
    """The leaves of two JSON values that differ, each with its path; scenes count from 1."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _compare(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True), 1):
            yield from _compare(f"{path} {number}", before, after)
    elif old != new:
        skip = _common(old, new) if isinstance(old, str) and isinstance(new, str) else 0
        yield f"{_shown(path)} {_shown(old, skip)} → {_shown(new, skip)}"


def _common(old: str, new: str) -> int:
    """How much of the start to leave out, so that a short excerpt shows where two texts part."""
    parts = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    return parts - _MAX_SHOWN // 4 if max(len(old), len(new)) > _MAX_SHOWN and parts > _MAX_SHOWN // 2 else 0


def _shown(value: Any, skip: int = 0) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return f"{len(value)} of them"
    text = "…" * (skip > 0) + str(value)[skip:]
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
