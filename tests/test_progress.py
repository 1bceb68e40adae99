"""The progress display on a terminal of rich's, and where there is none."""

from io import StringIO

import pytest
from rich.console import Console

from ttt_video_engine.commands.progress import ProgressDisplay


def display(*, terminal: bool, passing: bool = False) -> tuple[ProgressDisplay, StringIO]:
    screen = StringIO()
    console = Console(force_terminal=terminal, file=screen, width=80, color_system=None)
    return ProgressDisplay(passing=passing, console=console), screen


def bars(shown: ProgressDisplay) -> list[tuple[str, float, float | None]]:
    return [(task.description, task.completed, task.total) for task in shown._bars.tasks]


def test_a_stage_has_one_bar_however_often_it_says_zero() -> None:
    shown, _ = display(terminal=True)
    with shown:
        for done in (0, 0, 0, 1, 1, 2):
            shown.update("transformer MiB", done, 2)
        assert bars(shown) == [("transformer MiB", 2, 2)]


def test_a_stage_that_begins_again_replaces_its_bar() -> None:
    """Two videos after each other."""
    shown, _ = display(terminal=True)
    with shown:
        for done in (0, 1, 2):
            shown.update("denoise", done, 2)
        shown.update("decode", 0, 3)
        shown.update("decode", 3, 3)
        shown.update("denoise", 0, 2)
        shown.update("denoise", 1, 2)
        assert bars(shown) == [("decode", 3, 3), ("denoise", 1, 2)]


def test_passing_stages_leave_no_bar() -> None:
    shown, screen = display(terminal=True, passing=True)
    with shown:
        for stage in ("text_encoder MiB", "transformer MiB"):
            for done in (0, 0, 1, 4):
                shown.update(stage, done, 4)
                assert len(bars(shown)) == (done < 4)
        shown.update("empty", 0, 0)
        assert bars(shown) == []
        shown.line("text_encoder: new")
    assert "text_encoder: new" in screen.getvalue()


@pytest.mark.parametrize("passing", [False, True])
def test_without_a_terminal_there_are_lines(passing: bool) -> None:
    shown, screen = display(terminal=False, passing=passing)
    with shown:
        for done in (0, 0, *range(1, 11)):
            shown.update("denoise", done, 10)
    lines = screen.getvalue().splitlines()
    steps = [f"denoise: {done}/10" for done in (2, 4, 6, 8, 10)]
    assert lines == ([] if passing else ["denoise: 10 to do", *steps])
