"""Storyboards: the text of every scene of every video, read from JSON or JSONL and checked before any of it is used.

A video is a list of scenes, `[{"text": …, "requires_scene_transition": …, "neg_text": …}, …]`. A `.json` file holds one
video or a list of videos, a `.jsonl` file one video a line.
"""

import json
import textwrap
from collections.abc import Collection
from pathlib import Path

from msgspec import Struct

from ttt_video_engine.runtime.config import SCENES_PER_LENGTH
from ttt_video_engine.runtime.errors import StoryboardError, hint

_A_VIDEO = 'a video is a list of scenes, [{"text": "…"}, …]'


class Scene(Struct, frozen=True, forbid_unknown_fields=True):
    """Three seconds of video. `requires_scene_transition`: a change of scene leads from the one before to this one."""

    text: str
    requires_scene_transition: bool = False
    neg_text: str = ""


class Storyboard(Struct, frozen=True):
    """One video. `source` says where it stands, such as `kitchen.json` or `many.jsonl: line 3`."""

    name: str
    scenes: tuple[Scene, ...]
    source: str


def load_storyboards(path: Path) -> list[Storyboard]:
    """Every video of a `.json` or `.jsonl` file, in order.

    A video is named after the file, with -001, -002, … where the file holds several. Raises StoryboardError, one line
    that names file, line, video, scene and field, unless all of them can be rendered.
    """
    text = _read(path)
    videos = _videos_of_lines(path, text) if path.suffix.lower() == ".jsonl" else _videos_of_json(path, text)
    several = len(videos) > 1
    return [
        Storyboard(name=f"{path.stem}-{number:03d}" if several else path.stem, scenes=scenes, source=path.name + place)
        for number, (place, scenes) in enumerate(videos, 1)
    ]


def length_of(storyboard: Storyboard, available: Collection[str]) -> str:
    """The length name, such as "9s", that a storyboard's number of scenes asks for.

    Raises StoryboardError where that is not one of the `available` lengths of the bundle.
    """
    count = len(storyboard.scenes)
    length = next((name for name, num_scenes in SCENES_PER_LENGTH.items() if num_scenes == count), None)
    if length in available and length is not None:
        return length
    rendered = " or ".join(f"{n} ({name})" for name, n in SCENES_PER_LENGTH.items() if name in available)
    cure = "add or remove scenes" + (f", or export the bundle with `export --length {length}`" if length else "")
    number = f"{count} scene{'s' * (count != 1)}"
    raise StoryboardError(f"{storyboard.source}: {number}, but the bundle renders {rendered or 'no length'}; {cure}")


# Where a video stands in its file, such as ": line 3", and its scenes.
_Video = tuple[str, tuple[Scene, ...]]


def check_length(storyboards: list[Storyboard], length: str) -> None:
    """Raises StoryboardError unless every storyboard has as many scenes as a video of `length`."""
    for storyboard in storyboards:
        if len(storyboard.scenes) != SCENES_PER_LENGTH[length]:
            raise StoryboardError(
                f"{storyboard.source}: has {len(storyboard.scenes)} scenes, a {length} video has "
                f"{SCENES_PER_LENGTH[length]}; change the scenes or --length"
            )


def _read(path: Path) -> str:
    if path.is_dir():
        raise StoryboardError(f"{path}: is a folder; name a .json or .jsonl file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoryboardError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if path.suffix.lower() not in (".json", ".jsonl"):
        found = repr(path.suffix) if path.suffix else "none"
        raise StoryboardError(
            f"{path}: extension is {found}; must be .json (one video or a list) or .jsonl (one a line)"
        )
    try:
        # Some editors put a byte order mark before UTF-8.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StoryboardError(f"{path}: line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if not text.strip():
        raise StoryboardError(f"{path}: the file is empty; {_A_VIDEO}")
    return text


def _videos_of_json(path: Path, text: str) -> list[_Video]:
    cure = "correct it, or name the file .jsonl if it holds one video a line"
    value = _parse(text, f"{path}: ", cure)
    if not isinstance(value, list):
        raise StoryboardError(f"{path}: top level is {_shown(value)}; {_A_VIDEO}, or a list of videos")
    if not value or not isinstance(value[0], list):
        return [("", _scenes(value, f"{path}: "))]
    if len(value) == 1:
        return [("", _scenes(value[0], f"{path}: "))]
    return [(f": video {i}", _scenes(video, f"{path}: video {i}, ")) for i, video in enumerate(value, 1)]


def _videos_of_lines(path: Path, text: str) -> list[_Video]:
    # Not splitlines(): a JSON string may hold the other line separators of Unicode.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    cure = "each line must hold one whole video; a video over several lines belongs in a .json file"
    videos: list[_Video] = []
    errors: list[StoryboardError] = []
    for video_number, (line_number, line) in enumerate(lines, 1):
        video = f"video {video_number}, " if len(lines) > 1 else ""
        try:
            value = _parse(line, f"{path}: {video}", cure, first_line=line_number)
            videos.append((f": line {line_number}", _scenes(value, f"{path}: line {line_number}, {video}")))
        except StoryboardError as error:
            errors.append(error)
    if len(errors) > 1:
        others = len(errors) - 1
        raise StoryboardError(f"{errors[0]} (and {others} more bad line{'s' * (others > 1)})") from errors[0]
    if errors:
        raise errors[0]
    return videos


def _parse(text: str, where: str, cure: str, first_line: int = 1) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise StoryboardError(f"{where}line {line}, column {error.colno}: not JSON ({error.msg}); {cure}") from error
    except (ValueError, RecursionError) as error:
        # What json says of numbers of thousands of digits, and of lists nested a thousand deep.
        raise StoryboardError(f"{where}line {first_line}: not a storyboard ({error}); {_A_VIDEO}") from error
    return value


def _scenes(value: object, where: str) -> tuple[Scene, ...]:
    if not isinstance(value, list):
        raise StoryboardError(f"{where}found {_shown(value)}; {_A_VIDEO}")
    if not value:
        raise StoryboardError(f"{where}found an empty list; {_A_VIDEO}")
    return tuple(_scene(scene, f"{where}scene {number}") for number, scene in enumerate(value, 1))


def _scene(value: object, where: str) -> Scene:
    if not isinstance(value, dict):
        raise StoryboardError(f'{where}: found {_shown(value)}; must be an object such as {{"text": "…"}}')
    for name in value:
        if name not in Scene.__struct_fields__:
            raise StoryboardError(f"{where}: unknown field {_shown(name)}; {hint(name, Scene.__struct_fields__)}")
    if "text" not in value:
        raise StoryboardError(f"{where}, text: missing; say what the scene shows")
    # A null stands for the default.
    neg_text = value.get("neg_text")
    transition = value.get("requires_scene_transition", False)
    if not isinstance(transition, bool):
        raise StoryboardError(f"{where}, requires_scene_transition: found {_shown(transition)}; must be true or false")
    text = _string(value["text"], f"{where}, text")
    if not text.strip():
        raise StoryboardError(f"{where}, text: found {_shown(text)}; say what the scene shows")
    return Scene(text, transition, "" if neg_text is None else _string(neg_text, f"{where}, neg_text"))


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise StoryboardError(f"{where}: found {_shown(value)}; must be a string in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise StoryboardError(f"{where}: found half of a \\u surrogate pair, which is no character; write both or none")
    return value


def _shown(value: object) -> str:
    """A value as JSON spells it, on one short line that any terminal prints."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return textwrap.shorten(json.dumps(value), 60, placeholder=" …")
