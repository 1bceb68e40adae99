"""Storyboards: the text of every scene of every video, read from JSON or JSONL and checked before any of it is used.

A video is a list of scenes, `[{"text": …, "requires_scene_transition": …, "neg_text": …}, …]`. A `.json` file holds one
video or a list of videos, a `.jsonl` file one video a line.
"""

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from msgspec import Struct

from ttt_video_engine.runtime.config import MAX_SCENES, length_name, num_scenes
from ttt_video_engine.runtime.errors import StoryboardError, hint

MAX_FILE_BYTES = 16 << 20
MAX_VIDEOS = 10_000
MAX_TEXT = 20_000
"""Limits of a file, each far beyond what is rendered: a scene keeps about 500 tokens, some 2,500 characters."""

_MAX_NAME_BYTES = 255  # of a folder, on the file systems in use
_MAX_ERRORS = 10  # bad lines that are counted before reading stops

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

    @property
    def warnings(self) -> list[str]:
        """What can be rendered but is seldom meant, one line each."""
        empty = [str(number) for number, scene in enumerate(self.scenes, 1) if not scene.text.strip()]
        return [f"{self.source}: scene {', '.join(empty)}, text: empty; say what the scene shows"] if empty else []


def load_storyboards(path: Path) -> list[Storyboard]:
    """Every video of a `.json` or `.jsonl` file, in order.

    A video is named after the file, with -001, -002, … where the file holds several. Raises StoryboardError, one line
    that names file, line, video, scene and field, unless all of them can be rendered.
    """
    text = _read(path)
    videos = _videos_of_lines(path, text) if path.suffix.lower() == ".jsonl" else _videos_of_json(path, text)
    several = len(videos) > 1
    _check_name(path, f"{path.stem}-{len(videos):03d}" if several else path.stem)
    return [
        Storyboard(name=f"{path.stem}-{number:03d}" if several else path.stem, scenes=scenes, source=path.name + place)
        for number, (place, scenes) in enumerate(videos, 1)
    ]


def length_of(storyboard: Storyboard, available: Collection[str]) -> str:
    """The length name, such as "9s", that a storyboard's number of scenes asks for.

    Raises StoryboardError where that is not one of the `available` lengths of the bundle.
    """
    count = len(storyboard.scenes)
    length = length_name(count)
    if length in available:
        return length
    rendered = " or ".join(f"{num_scenes(name)} ({name})" for name in sorted(available, key=num_scenes))
    raise StoryboardError(
        f"{storyboard.source}: has {_scene_count(count)}, but the bundle renders {rendered or 'no length'}; to add "
        f"{length}, run `ttt-video export --length {length}` with the options that made the bundle; weights stay"
    )


# Where a video stands in its file, such as ": line 3", and its scenes.
_Video = tuple[str, tuple[Scene, ...]]


def check_length(storyboards: list[Storyboard], length: str) -> None:
    """Raises StoryboardError unless every storyboard has as many scenes as a video of `length`.

    Raises ConfigError for a length that no video can have.
    """
    scenes = num_scenes(length)
    for storyboard in storyboards:
        if len(storyboard.scenes) != scenes:
            raise StoryboardError(
                f"{storyboard.source}: has {_scene_count(len(storyboard.scenes))}, a {length} video has "
                f"{scenes}; change the scenes or --length"
            )


def _scene_count(count: int) -> str:
    return f"{count} scene{'s' * (count != 1)}"


def _check_name(path: Path, name: str) -> None:
    """Raises StoryboardError unless a folder of the output can have this name, the longest that the file gives."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise StoryboardError(f"{path}: the file's name is not UTF-8; rename the file") from error
    if name in (".", ".."):
        raise StoryboardError(f"{path}: a video cannot be named {name!r}, as the file is; rename the file")
    if size > _MAX_NAME_BYTES:
        raise StoryboardError(
            f"{path}: makes a folder whose name has {size} bytes; at most {_MAX_NAME_BYTES}: rename the file"
        )


def _read(path: Path) -> str:
    if path.is_dir():
        raise StoryboardError(f"{path}: is a folder; name a .json or .jsonl file")
    if path.suffix.lower() not in (".json", ".jsonl"):
        found = repr(path.suffix) if path.suffix else "none"
        raise StoryboardError(
            f"{path}: extension is {found}; must be .json (one video or a list) or .jsonl (one a line)"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StoryboardError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > MAX_FILE_BYTES:
        raise StoryboardError(f"{path}: is over {MAX_FILE_BYTES >> 20} MiB; divide it into several files")
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
    _check_videos(path, len(value))
    return [(f": video {i}", _scenes(video, f"{path}: video {i}, ")) for i, video in enumerate(value, 1)]


def _videos_of_lines(path: Path, text: str) -> list[_Video]:
    # Not splitlines(): a JSON string may hold the other line separators of Unicode.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    cure = "each line must hold one whole video; a video over several lines belongs in a .json file"
    _check_videos(path, len(lines))
    videos: list[_Video] = []
    errors: list[StoryboardError] = []
    for video_number, (line_number, line) in enumerate(lines, 1):
        video = f"video {video_number}, " if len(lines) > 1 else ""
        try:
            value = _parse(line, f"{path}: {video}", cure, first_line=line_number)
            videos.append((f": line {line_number}", _scenes(value, f"{path}: line {line_number}, {video}")))
        except StoryboardError as error:
            errors.append(error)
            if len(errors) == _MAX_ERRORS:
                break
    if len(errors) > 1:
        others = len(errors) - 1
        least = "at least " * (len(errors) == _MAX_ERRORS)
        raise StoryboardError(f"{errors[0]} (and {least}{others} more bad line{'s' * (others > 1)})") from errors[0]
    if errors:
        raise errors[0]
    return videos


def _check_videos(path: Path, count: int) -> None:
    if count > MAX_VIDEOS:
        raise StoryboardError(f"{path}: has {count} videos; at most {MAX_VIDEOS}: divide it into several files")


class _RepeatedKey(Struct, frozen=True):
    """Stands for a JSON object in which a key occurs twice."""

    key: str


def _object(pairs: list[tuple[str, object]]) -> object:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(key for key, _ in pairs)
    return _RepeatedKey(next(key for key, count in counts.items() if count > 1))


def _parse(text: str, where: str, cure: str, first_line: int = 1) -> object:
    try:
        value: object = json.loads(text, object_pairs_hook=_object)
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
    if len(value) > MAX_SCENES:
        raise StoryboardError(f"{where}found {len(value)} scenes; a video has at most {MAX_SCENES}")
    return tuple(_scene(scene, f"{where}scene {number}") for number, scene in enumerate(value, 1))


def _scene(value: object, where: str) -> Scene:
    if isinstance(value, _RepeatedKey):
        raise StoryboardError(f"{where}: key {_shown(value.key)} occurs twice; leave one out")
    if not isinstance(value, dict):
        raise StoryboardError(f'{where}: found {_shown(value)}; must be an object such as {{"text": "…"}}')
    for name in value:
        if name not in Scene.__struct_fields__:
            cure = hint(name[:_MAX_SHOWN], Scene.__struct_fields__)
            raise StoryboardError(f"{where}: unknown field {_shown(name)}; {cure}")
    if "text" not in value:
        raise StoryboardError(f"{where}, text: missing; say what the scene shows")
    # A null stands for the default.
    neg_text, transition = value.get("neg_text"), value.get("requires_scene_transition")
    if not isinstance(transition, bool | None):
        raise StoryboardError(f"{where}, requires_scene_transition: found {_shown(transition)}; must be true or false")
    return Scene(
        text=check_text(value["text"], f"{where}, text"),
        requires_scene_transition=bool(transition),
        neg_text="" if neg_text is None else check_text(neg_text, f"{where}, neg_text"),
    )


def check_text(value: object, where: str) -> str:
    """Text that the tokenizer can take. Control characters other than NUL are left to it: T5's drops them."""
    if not isinstance(value, str):
        raise StoryboardError(f"{where}: found {_shown(value)}; must be a string in quotes")
    if len(value) > MAX_TEXT:
        raise StoryboardError(f"{where}: has {len(value)} characters; at most {MAX_TEXT}: shorten it")
    if "\0" in value:
        raise StoryboardError(f"{where}: has a NUL character at position {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        cure = "write both or none"
        raise StoryboardError(f"{where}: found half of a \\u surrogate pair, which is no character; {cure}") from error
    return value


_MAX_SHOWN = 60


def _shown(value: object) -> str:
    """A value as JSON spells it, on one short line that any terminal prints."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict | _RepeatedKey):
        return "an object"
    # Cut before it is spelled: a string may have millions of characters.
    text = json.dumps(value[: _MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"
