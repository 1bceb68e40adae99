"""Held-out storyboards of the demo, and what is measured on their videos."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from demo.evaluate import done_videos, frames_of, judged
from demo.held_out import asked_for, held_out
from demo.judge import judge
from demo.quality import BASE, ROWS, Row, measured, psnr
from demo.scenes import render
from demo.without_ttt import without_ttt
from ttt_video_engine.runtime.render_folder import SIDECAR, VIDEO
from ttt_video_engine.runtime.storyboard import load_storyboards
from ttt_video_engine.runtime.video import VideoFormat, write_video

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four storyboards whose videos show exactly what they tell, and one that is not done."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(1, 6):
        video = folder / f"judge-3-{number:03d}"
        video.mkdir()
        script, _ = asked_for(video.name)
        write_video(video / VIDEO, [render(script)], VideoFormat(16), width=96, height=64)
        if number < 5:
            (video / SIDECAR).write_text(json.dumps({"passes": 90 + number, "seconds": {"denoise": number}}))
    return folder


def test_a_video_s_name_tells_what_it_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "judge-3.jsonl"
    file.write_bytes(held_out(file.stem, 3))
    for board in load_storyboards(file):
        script, captions = asked_for(board.name)
        assert [scene.text for scene in board.scenes] == captions
        assert [scene.requires_scene_transition for scene in board.scenes] == [scene.cut for scene in script]
    with pytest.raises(ValueError):
        asked_for("bear")


def test_only_finished_videos_are_judged(videos: Path) -> None:
    done = done_videos(videos)
    assert [video.name for video in done] == [f"judge-3-{number:03d}" for number in range(1, 5)]
    scores = judge(judged(done))
    assert min(scores.background, scores.figure, scores.colour, scores.direction, scores.carried, scores.cuts) == 1


def test_a_row_tells_passes_seconds_and_scores(videos: Path) -> None:
    cells = [cell.strip() for cell in measured(BASE, done_videos(videos), videos).markdown.strip("|").split("|")]
    assert cells == [BASE.name, "4", "92", "2.5", "–", *["100%"] * 5]


def test_a_row_is_compared_with_the_videos_of_the_same_storyboards(videos: Path, tmp_path: Path) -> None:
    """Here with each other's, so that they differ as much as two storyboards do."""
    for video, other in itertools.permutations(done_videos(videos)[:2]):
        shutil.copytree(other, tmp_path / video.name)
    result = measured(Row("a row"), done_videos(videos)[:2], tmp_path)
    assert result.psnr is not None and 5 < result.psnr < 20


def test_psnr_is_that_of_a_known_error() -> None:
    frames = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    assert psnr(frames, frames) == float("inf")
    assert psnr(frames + np.uint8(1), frames) == pytest.approx(48.13, abs=0.01)


def test_rows_have_folders_of_their_own() -> None:
    assert len({row.folder for row in ROWS}) == len(ROWS) and BASE in ROWS


def test_frames_come_back_from_the_mp4(videos: Path) -> None:
    script, _ = asked_for("judge-3-001")
    frames = frames_of(videos / "judge-3-001")
    assert frames.shape == (145, 64, 96, 3) and psnr(frames, render(script)) > 25


def test_a_copy_without_ttt_has_closed_gates(tmp_path: Path) -> None:
    checkpoint = ROOT / "demo/checkpoint"
    num_closed = without_ttt(checkpoint, tmp_path / "copy")
    name = "transformer/model.safetensors"
    before, after = load_file(checkpoint / name), load_file(tmp_path / "copy" / name)
    changed = [key for key in before if not before[key].equal(after[key])]
    assert len(changed) == num_closed == 6 * 4
    assert not any(after[key].any() for key in changed)
