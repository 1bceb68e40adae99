"""The frames that stand for a video: the right ones, whatever the windows, drawn before the video counts as done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_in import StandInLoader, board

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.contact_frames import FramePicker
from ttt_video_engine.runtime.contact_sheet import scene_frames
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.settings import Settings


@pytest.mark.parametrize("windows", [[49], [9, 8, 8, 8, 8, 8], [1] * 49])
def test_the_windows_make_no_difference(windows: list[int]) -> None:
    frames = np.arange(49, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    indices = scene_frames(3, 49, 4)
    picker = FramePicker(indices)
    for window in np.split(frames, np.cumsum(windows)[:-1]):
        picker.see(window)
    np.testing.assert_array_equal(picker.frames[:, :, 0, 0, 0], indices)


def test_the_sheet_is_drawn_before_the_video_is_done(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def draw(target: Path, frames: NDArray[np.uint8], captions: Sequence[str], footer: str, **named: float) -> None:
        assert (target.parent / "video.mp4").exists() and not (target.parent / "video.json").exists()
        drawn.append((target, frames.shape, captions, footer))

    bundle = open_bundle(shared_bundle)
    monkeypatch.setattr("ttt_video_engine.runtime.phases.draw_contact_sheet", draw)
    pipeline = Pipeline(bundle, StandInLoader(bundle))
    pipeline.render([board("bear", "One.", "Two.", "Three.")], Settings(num_steps=1, seed=7), tmp_path)
    ((target, shape, captions, footer),) = drawn
    assert (target, shape) == (tmp_path / "bear/contact.png", (3, 4, 64, 96, 3))
    assert captions == ["One.", "Two.", "Three."] and "seed 7" in footer and (tmp_path / "bear/video.json").exists()
