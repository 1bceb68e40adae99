"""The frames that stand for a video: the right ones, whatever the windows, drawn before the video counts as done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_in import StandInLoader, board

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.contact_frames import FramePicker, contact_indices
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.settings import Settings


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert contact_indices(48, 3, 2).tolist() == [[4, 12], [20, 28], [36, 44]]


@pytest.mark.parametrize("windows", [[49], [9, 8, 8, 8, 8, 8], [1] * 49])
def test_the_windows_make_no_difference(windows: list[int]) -> None:
    frames = np.arange(49, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    picker = FramePicker(contact_indices(49, 3))
    for window in np.split(frames, np.cumsum(windows)[:-1]):
        picker.see(window)
    np.testing.assert_array_equal(picker.frames[:, :, 0, 0, 0], contact_indices(49, 3))


def test_the_sheet_is_drawn_before_the_video_is_done(shared_bundle: Path, tmp_path: Path) -> None:
    drawn: list[Any] = []

    def draw(target: Path, frames: NDArray[np.uint8], captions: Sequence[str], footer: str) -> None:
        assert (target.parent / "video.mp4").exists() and not (target.parent / "video.json").exists()
        drawn.append((target, frames.shape, captions, footer))

    bundle = open_bundle(shared_bundle)
    pipeline = Pipeline(bundle, StandInLoader(bundle), draw_contact_sheet=draw)
    pipeline.render([board("bear", "One.", "Two.", "Three.")], Settings(num_steps=1, seed=7), tmp_path)
    ((target, shape, captions, footer),) = drawn
    assert (target, shape) == (tmp_path / "bear/contact.png", (3, 4, 64, 96, 3))
    assert captions == ["One.", "Two.", "Three."] and "seed 7" in footer and (tmp_path / "bear/video.json").exists()
