"""Previews: written at the steps asked for, never in the way of a render."""

from pathlib import Path

import pytest
from PIL import Image
from stand_in import board, render

from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.events import Event, PreviewWritten, RenderWarning, VideoDone, VideoStopped
from ttt_video_engine.runtime.settings import Settings


def test_a_preview_after_every_n_steps_and_where_it_stops(shared_bundle: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    outcomes = render(
        shared_bundle,
        tmp_path,
        board("bear", "A bear."),
        settings=Settings(num_steps=7),
        on_event=events.append,
        preview_every=2,
        stop_after=5,
    )
    written = [event for event in events if isinstance(event, PreviewWritten)]
    assert [event.steps_done for event in written] == [2, 4, 5]
    assert isinstance(outcomes["bear"], VideoStopped)
    with Image.open(tmp_path / "bear/preview.png") as picture:
        assert picture.format == "PNG" and picture.width > 96


def test_a_preview_that_fails_is_a_warning(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise BackendError("no memory for a preview")

    monkeypatch.setattr("ttt_video_engine.runtime.phases.preview_frames", fail)
    events: list[Event] = []
    outcomes = render(
        shared_bundle,
        tmp_path,
        board("bear", "A bear."),
        settings=Settings(num_steps=2),
        on_event=events.append,
        preview_every=1,
    )
    warnings = [event.message for event in events if isinstance(event, RenderWarning)]
    assert isinstance(outcomes["bear"], VideoDone)
    assert len(warnings) == 1 and "no memory for a preview" in warnings[0] and "preview.png" in warnings[0]
