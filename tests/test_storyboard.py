"""Storyboards: what is read, and what is said of every file that cannot be."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_video_engine.runtime.config import SCENES_PER_LENGTH
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.storyboard import Scene, Storyboard, length_of, load_storyboards

EXAMPLES = Path(__file__).parent.parent / "storyboards"

SCENES = st.lists(
    st.builds(
        Scene,
        text=st.text().filter(lambda text: "\0" not in text),
        requires_scene_transition=st.booleans(),
        neg_text=st.text().filter(lambda text: "\0" not in text),
    ),
    min_size=1,
    max_size=4,
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path: Path) -> str:
    with pytest.raises(StoryboardError) as caught:
        load_storyboards(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def as_json(scenes: list[Scene]) -> list[dict[str, object]]:
    return [{name: getattr(scene, name) for name in Scene.__struct_fields__} for scene in scenes]


def test_one_video_with_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "kitchen.json", '[{"text": "a"}, {"text": "b", "neg_text": null}]')
    assert load_storyboards(path) == [Storyboard("kitchen", (Scene("a"), Scene("b")), "kitchen.json")]


def test_a_list_of_one_video_keeps_the_plain_name(tmp_path: Path) -> None:
    path = write(tmp_path, "kitchen.json", '[[{"text": "a"}]]')
    assert load_storyboards(path) == [Storyboard("kitchen", (Scene("a"),), "kitchen.json")]


def test_json_of_several_videos_is_numbered(tmp_path: Path) -> None:
    boards = load_storyboards(write(tmp_path, "many.json", '[[{"text": "a"}], [{"text": "b"}]]'))
    assert [(board.name, board.source) for board in boards] == [
        ("many-001", "many.json: video 1"),
        ("many-002", "many.json: video 2"),
    ]


def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path) -> None:
    text = '\ufeff[{"text": "a\u2028b"}]\r\n\r\n  \n[{"text": "c"}]'
    boards = load_storyboards(write(tmp_path, "many.JSONL", text))
    assert [(board.name, board.source) for board in boards] == [
        ("many-001", "many.JSONL: line 1"),
        ("many-002", "many.JSONL: line 4"),
    ]
    assert boards[0].scenes[0].text == "a\u2028b"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(videos=st.lists(SCENES, min_size=1, max_size=3), ascii_only=st.booleans())
def test_what_is_written_is_read(tmp_path: Path, videos: list[list[Scene]], ascii_only: bool) -> None:
    values = [as_json(scenes) for scenes in videos]
    lines = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    for path in (
        write(tmp_path, "v.json", json.dumps(values, ensure_ascii=ascii_only)),
        write(tmp_path, "v.jsonl", lines),
    ):
        assert [list(board.scenes) for board in load_storyboards(path)] == videos


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ('"a"', 'scene 2: found "a"; must be an object such as {"text": "…"}'),
        ("[]", 'scene 2: found a list; must be an object such as {"text": "…"}'),
        ("{}", "scene 2, text: missing; say what the scene shows"),
        ('{"text": 3}', "scene 2, text: found 3; must be a string in quotes"),
        ('{"text": null}', "scene 2, text: found null; must be a string in quotes"),
        ('{"text": "\\ud83d"}', "scene 2, text: found half of a \\u surrogate pair"),
        (
            '{"text": "b", "requires_scene_transition": "yes"}',
            'scene 2, requires_scene_transition: found "yes"; must be true or false',
        ),
        (
            '{"text": "b", "requires_scene_transition": 1}',
            "scene 2, requires_scene_transition: found 1; must be true or false",
        ),
        ('{"text": "b", "neg_text": ["c"]}', "scene 2, neg_text: found a list; must be a string in quotes"),
        ('{"txt": "b"}', 'scene 2: unknown field "txt"; did you mean text?'),
        ('{"text": "b", "negative_text": "c"}', 'unknown field "negative_text"; did you mean neg_text?'),
        ('{"text": "b", "z": 1}', 'unknown field "z"; known are text, requires_scene_transition, neg_text'),
    ],
)
def test_bad_scene(tmp_path: Path, scene: str, message: str) -> None:
    video = f'[{{"text": "a"}}, {scene}]'
    one = error_of(write(tmp_path, "one.json", video))
    assert one.startswith("scene 2") and message in one
    assert error_of(write(tmp_path, "two.json", f'[[{{"text": "a"}}], {video}]')) == f"video 2, {one}"
    assert error_of(write(tmp_path, "one.jsonl", f"\n{video}\n")) == f"line 2, {one}"
    assert error_of(write(tmp_path, "two.jsonl", f'[{{"text": "a"}}]\n\n{video}')) == f"line 3, video 2, {one}"


A_VIDEO = 'a video is a list of scenes, [{"text": "…"}, …]'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"text": "a",}]', "line 2, column "),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', "line 2, column 1: not JSON (Extra data); correct it, or name"),
        ("a.jsonl", '\n[\n{"text": "a"}\n]', "line 2, column 2: not JSON (Expecting value); each line must hold one"),
        ("a.json", "[" * 100_000, "line 1: not a storyboard (maximum recursion depth exceeded"),
        ("a.json", "9" * 5_000, "line 1: not a storyboard (Exceeds the limit"),
        ("a.json", '{"text": "a"}', f"top level is an object; {A_VIDEO}, or a list of videos"),
        ("a.json", "null", f"top level is null; {A_VIDEO}, or a list of videos"),
        ("a.jsonl", '{"text": "a"}', f"line 1, found an object; {A_VIDEO}"),
        ("a.json", '[[{"text": "a"}], 7]', f"video 2, found 7; {A_VIDEO}"),
        ("a.json", "[]", f"found an empty list; {A_VIDEO}"),
        ("a.json", '[[{"text": "a"}], []]', f"video 2, found an empty list; {A_VIDEO}"),
        ("a.jsonl", "[]", f"line 1, found an empty list; {A_VIDEO}"),
        ("a.json", " ", f"the file is empty; {A_VIDEO}"),
        ("a.jsonl", "\n\n", f"the file is empty; {A_VIDEO}"),
        ("a.json", b'[\n{"text": "\xff"}]', "line 2: not UTF-8 (invalid start byte); save the file as UTF-8"),
        ("a.yaml", "- a", "extension is '.yaml'; must be .json (one video or a list) or .jsonl (one a line)"),
        ("a", "[]", "extension is none; must be .json (one video or a list) or .jsonl (one a line)"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert message in error_of(write(tmp_path, name, content))


def test_missing_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.json") == "cannot be read (No such file or directory); check the path"


def test_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path) == "is a folder; name a .json or .jsonl file"


@pytest.mark.parametrize(("others", "ending"), [(0, ""), (1, " (and 1 more bad line)"), (2, " (and 2 more bad lines)")])
def test_jsonl_counts_its_other_bad_lines(tmp_path: Path, others: int, ending: str) -> None:
    lines = ['[{"text": "a"}]', "[{}]", *["[}"] * others, '[{"text": "b"}]']
    message = error_of(write(tmp_path, "many.jsonl", "\n".join(lines)))
    assert message == f"line 2, video 2, scene 1, text: missing; say what the scene shows{ending}"


def storyboard_of(num_scenes: int) -> Storyboard:
    return Storyboard("kitchen", (Scene("a"),) * num_scenes, "kitchen.json")


@pytest.mark.parametrize(("length", "num_scenes"), SCENES_PER_LENGTH.items())
def test_length_by_number_of_scenes(length: str, num_scenes: int) -> None:
    assert length_of(storyboard_of(num_scenes), SCENES_PER_LENGTH) == length


@pytest.mark.parametrize(
    ("num_scenes", "available", "message"),
    [
        (2, ["9s", "3s"], "2 scenes, but the bundle renders 1 (3s) or 3 (9s); add or remove scenes"),
        (
            3,
            ["3s"],
            "3 scenes, but the bundle renders 1 (3s); add or remove scenes, "
            "or export the bundle with `export --length 9s`",
        ),
        (
            1,
            [],
            "1 scene, but the bundle renders no length; add or remove scenes, "
            "or export the bundle with `export --length 3s`",
        ),
    ],
)
def test_length_that_the_bundle_lacks(num_scenes: int, available: list[str], message: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        length_of(storyboard_of(num_scenes), available)
    assert str(caught.value) == f"kitchen.json: {message}"


def test_examples_have_the_length_they_are_named_after() -> None:
    for path in sorted(EXAMPLES.glob("*.json*")):
        for board in load_storyboards(path):
            assert path.stem.endswith(f"-{length_of(board, SCENES_PER_LENGTH)}")
