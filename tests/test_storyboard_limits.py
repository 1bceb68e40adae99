"""Storyboards at their limits: what is refused before anything is rendered, how fast, and what is said of it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ttt_video_engine.runtime import storyboard as module
from ttt_video_engine.runtime.config import MAX_SCENES
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.storyboard import MAX_FILE_BYTES, MAX_TEXT, MAX_VIDEOS, load_storyboards

Run = Callable[..., tuple[int, str, str]]
A_VIDEO = '[{"text": "a"}]'


def error_of(path: Path) -> str:
    with pytest.raises(StoryboardError) as caught:
        load_storyboards(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


def written(folder: Path, content: str, name: str = "a.json") -> Path:
    path = folder / name
    path.write_text(content, "utf-8")
    return path


# Keys and characters


@pytest.mark.parametrize(
    ("scene", "key"),
    [
        ('{"text": "a", "text": "b"}', "text"),
        ('{"text": "a", "neg_text": "b", "neg_text": "b"}', "neg_text"),
        ('{"z": 1, "z": 1}', "z"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, scene: str, key: str) -> None:
    found = error_of(written(tmp_path, f'[[{{"text": "a"}}], [{{"text": "a"}}, {scene}]]'))
    assert "video 2, scene 2" in found and f'"{key}"' in found
    assert "line 3, video 2, scene 1" in error_of(written(tmp_path, f"{A_VIDEO}\n\n[{scene}]", "a.jsonl"))


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}', '[{"text": {"a": 1, "a": 2}}]'])
def test_a_key_twice_in_an_object_that_does_not_belong_there(tmp_path: Path, content: str) -> None:
    assert "an object" in error_of(written(tmp_path, content))


@pytest.mark.parametrize("field", ["text", "neg_text"])
def test_nul_is_refused(tmp_path: Path, field: str) -> None:
    found = error_of(written(tmp_path, json.dumps([{"text": "a", field: "ab\0c"}])))
    assert f"scene 1, {field}" in found and "NUL" in found and "position 3" in found


def test_other_control_characters_are_left_to_the_tokenizer(tmp_path: Path) -> None:
    text = "a\tb\x1b\x7f\x01"
    (board,) = load_storyboards(written(tmp_path, json.dumps([{"text": text}])))
    assert board.scenes[0].text == text


# What exports of the public code hold


def test_a_null_transition_is_none(tmp_path: Path) -> None:
    content = '[{"text": "a", "requires_scene_transition": null, "neg_text": null}]'
    (board,) = load_storyboards(written(tmp_path, content))
    assert board.scenes[0].requires_scene_transition is False and board.scenes[0].neg_text == ""


def test_an_empty_text_is_taken_with_a_warning(tmp_path: Path) -> None:
    content = '[[{"text": "a"}], [{"text": ""}, {"text": "b"}, {"text": " \\n"}]]'
    first, second = load_storyboards(written(tmp_path, content))
    assert first.warnings == []
    (warning,) = second.warnings
    assert "a.json: video 2" in warning and "scene 1, 3" in warning
    assert second.scenes[0].text == ""


def test_sample_prints_the_warning(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    board = written(tmp_path, '[{"text": ""}]', "bear.json")
    options = ("--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--num-steps", 1)
    code, out, err = run("sample", board, *options)
    assert code == 0 and out.startswith("video: ")
    assert err.startswith("warning: bear.json: scene 1, text: ")


# Names


@pytest.mark.parametrize("name", ["...json", "..json"])
def test_a_name_that_leads_out_of_the_output_is_refused(tmp_path: Path, name: str) -> None:
    assert "rename" in error_of(written(tmp_path, A_VIDEO, name))


def test_a_name_that_is_too_long_with_its_number_is_refused(tmp_path: Path) -> None:
    name = "é" * 125 + ".json"  # 255 bytes
    assert len(load_storyboards(written(tmp_path, A_VIDEO, name))) == 1
    assert len(load_storyboards(written(tmp_path, f"[{','.join([A_VIDEO] * 999)}]", name))) == 999
    found = error_of(written(tmp_path, f"[{','.join([A_VIDEO] * MAX_VIDEOS)}]", name))
    assert "256" in found and "255" in found and "rename" in found


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "rename" in error_of(written(tmp_path, A_VIDEO, os.fsdecode(b"a\xff.json")))


# Sizes


def test_a_text_at_its_limit_is_read_and_one_over_is_refused(tmp_path: Path) -> None:
    (board,) = load_storyboards(written(tmp_path, json.dumps([{"text": "é" * MAX_TEXT}])))
    assert len(board.scenes[0].text) == MAX_TEXT
    for field in ("text", "neg_text"):
        found = error_of(written(tmp_path, json.dumps([{"text": "a", field: "é" * (MAX_TEXT + 1)}])))
        assert f"scene 1, {field}" in found and str(MAX_TEXT + 1) in found and str(MAX_TEXT) in found


def test_scenes_and_videos_at_their_limits(tmp_path: Path) -> None:
    video = json.dumps([{"text": "a"}] * MAX_SCENES)
    assert len(load_storyboards(written(tmp_path, "\n".join([video] * MAX_VIDEOS), "a.jsonl"))) == MAX_VIDEOS
    found = error_of(written(tmp_path, json.dumps([{"text": "a"}] * (MAX_SCENES + 1))))
    assert str(MAX_SCENES + 1) in found and str(MAX_SCENES) in found
    for name, content in (
        ("a.json", f"[{','.join([A_VIDEO] * (MAX_VIDEOS + 1))}]"),
        ("a.jsonl", f"{A_VIDEO}\n" * 10001),
    ):
        found = error_of(written(tmp_path, content, name))
        assert str(MAX_VIDEOS + 1) in found and str(MAX_VIDEOS) in found


def test_a_file_over_its_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # no blocks: a terabyte in name only
    assert f"{MAX_FILE_BYTES >> 20} MiB" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[" + "{}," * (MAX_FILE_BYTES // 3 - 3) + "{}]"),
        ("a.json", "[" * MAX_FILE_BYTES),
        ("a.json", '[{"' + "k" * (MAX_FILE_BYTES - 100) + '": 1}]'),
        ("a.json", '[{"text": "' + "t" * (MAX_FILE_BYTES - 100) + '"}]'),
        ("a.json", '[{"text": 1, "z": "' + "t w" * (MAX_FILE_BYTES // 3 - 100) + '"}]'),
        ("a.jsonl", "[}\n" * MAX_VIDEOS),
        ("a.jsonl", "[}\n" * (MAX_FILE_BYTES // 3)),
    ],
    ids=["objects", "nested", "key", "text", "value", "bad lines", "too many bad lines"],
)
def test_a_bad_file_of_the_largest_size_is_refused_in_seconds(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, content, name)
    start = time.process_time()
    error_of(path)
    assert time.process_time() - start < 10


def test_reading_stops_after_a_few_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    real = module._parse

    def noted(text: str, *rest: Any, **named: Any) -> object:
        parsed.append(text)
        return real(text, *rest, **named)

    monkeypatch.setattr(module, "_parse", noted)
    assert error_of(written(tmp_path, "[}\n" * 5000, "a.jsonl")).endswith("(and at least 9 more bad lines)")
    assert len(parsed) == 10
