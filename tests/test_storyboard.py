"""Storyboards: what is read, and what is said of every file that cannot be."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import column, line, names, numbers, refused_with, scene, video

from ttt_video_engine.runtime.config import SCENES_PER_LENGTH
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.storyboard import Scene, Storyboard, length_of, load_storyboards

EXAMPLES = Path(__file__).parent.parent / "storyboards"

EXAMPLE = '{"text": "…"}'
"""What a message shows of how a scene is written."""
TRANSITION = "requires_scene_transition"

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
    names(message, path)
    return message


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
    ("content", "values"),
    [
        ('"a"', ('"a"', EXAMPLE)),
        ("[]", ("list", EXAMPLE)),
        ("{}", ("text",)),
        ('{"text": 3}', ("text", 3)),
        ('{"text": null}', ("text", "null")),
        ('{"text": "\\ud83d"}', ("text", "\\u")),
        ('{"text": "b", "requires_scene_transition": "yes"}', (TRANSITION, '"yes"', "true", "false")),
        ('{"text": "b", "requires_scene_transition": 1}', (TRANSITION, 1, "true", "false")),
        ('{"text": "b", "neg_text": ["c"]}', ("neg_text", "list")),
        ('{"txt": "b"}', ("txt", "text")),
        ('{"text": "b", "negative_text": "c"}', ("negative_text", "neg_text")),
        ('{"text": "b", "z": 1}', ("z", "text", TRANSITION, "neg_text")),
    ],
)
def test_bad_scene(tmp_path: Path, content: str, values: tuple[object, ...]) -> None:
    scenes = f'[{{"text": "a"}}, {content}]'
    two = f'[[{{"text": "a"}}], {scenes}]'
    names(error_of(write(tmp_path, "one.json", scenes)), scene(2), *values)
    names(error_of(write(tmp_path, "two.json", two)), video(2), scene(2), *values)
    names(error_of(write(tmp_path, "one.jsonl", f"\n{scenes}\n")), line(2), scene(2), *values)
    after = write(tmp_path, "two.jsonl", f'[{{"text": "a"}}]\n\n{scenes}')
    names(error_of(after), line(3), video(2), scene(2), *values)


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("a.json", '[\n{"text": "a",}]', (line(2), "column")),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', (line(2), column(1), ".jsonl")),
        ("a.jsonl", '\n[\n{"text": "a"}\n]', (line(2), column(2))),
        ("a.json", "[" * 100_000, (line(1),)),
        ("a.json", "9" * 5_000, (line(1),)),
        ("a.json", '{"text": "a"}', ("object", EXAMPLE)),
        ("a.json", "null", ("null", EXAMPLE)),
        ("a.jsonl", '{"text": "a"}', (line(1), "object", EXAMPLE)),
        ("a.json", '[[{"text": "a"}], 7]', (video(2), 7, EXAMPLE)),
        ("a.json", "[]", ("list", EXAMPLE)),
        ("a.json", '[[{"text": "a"}], []]', (video(2), EXAMPLE)),
        ("a.jsonl", "[]", (line(1), EXAMPLE)),
        ("a.json", " ", (EXAMPLE,)),
        ("a.jsonl", "\n\n", (EXAMPLE,)),
        ("a.json", b'[\n{"text": "\xff"}]', (line(2), "UTF-8")),
        ("a.yaml", "- a", (".yaml", ".json", ".jsonl")),
        ("a", "[]", (".json", ".jsonl")),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: str | bytes, values: tuple[object, ...]) -> None:
    names(error_of(write(tmp_path, name, content)), *values)


def test_missing_file(tmp_path: Path) -> None:
    error_of(tmp_path / "none.json")


def test_folder(tmp_path: Path) -> None:
    names(error_of(tmp_path), ".json", ".jsonl")


@pytest.mark.parametrize("others", [0, 1, 2])
def test_jsonl_counts_its_other_bad_lines(tmp_path: Path, others: int) -> None:
    lines = ['[{"text": "a"}]', "[{}]", *["[}"] * others, '[{"text": "b"}]']
    message = error_of(write(tmp_path, "many.jsonl", "\n".join(lines)))
    names(message, line(2), video(2), scene(1), "text")
    # Of numbers there are those three places, and how many more bad lines there are.
    assert numbers(message) == [2, 2, 1, *[others] * (others > 0)]


def storyboard_of(num_scenes: int) -> Storyboard:
    return Storyboard("kitchen", (Scene("a"),) * num_scenes, "kitchen.json")


@pytest.mark.parametrize(("length", "num_scenes"), SCENES_PER_LENGTH.items())
def test_length_by_number_of_scenes(length: str, num_scenes: int) -> None:
    assert length_of(storyboard_of(num_scenes), SCENES_PER_LENGTH) == length


@pytest.mark.parametrize(
    ("num_scenes", "available", "values"),
    [
        (2, ["9s", "3s"], (2, 1, "3s", 3, "9s", "export", "--length 6s")),
        (3, ["3s"], (3, 1, "3s", "export", "--length 9s")),
        (1, [], (1, "export", "--length 3s")),
    ],
)
def test_length_that_the_bundle_lacks(num_scenes: int, available: list[str], values: tuple[object, ...]) -> None:
    with refused_with(StoryboardError, "kitchen.json", *values):
        length_of(storyboard_of(num_scenes), available)


def test_examples_have_the_length_they_are_named_after() -> None:
    for path in sorted(EXAMPLES.glob("*.json*")):
        for board in load_storyboards(path):
            assert path.stem.endswith(f"-{length_of(board, SCENES_PER_LENGTH)}")
