"""What `sample` shows of a render: progress and warnings on standard error, the path of each video on standard output.

It is fed by the events of the pipeline and knows nothing else of it.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import IO, cast

from rich.console import Console

from ttt_video_engine.commands.progress import ProgressDisplay
from ttt_video_engine.commands.streams import LossyStream
from ttt_video_engine.planning.table import text_table
from ttt_video_engine.runtime.errors import printable
from ttt_video_engine.runtime.events import (
    DecodeStarted,
    Event,
    Outcome,
    PreviewWritten,
    RenderWarning,
    StepDone,
    TextEncoded,
    VideoBusy,
    VideoDone,
    VideoFailed,
    VideoSkipped,
    VideoStarted,
    VideoStopped,
    WindowDecoded,
)


class RenderDisplay:
    """`show` is an `on_event`. `several` videos are told apart; `quiet` keeps standard output for something else.

    Videos that are rendered `at_once`, by several workers, have lines of their own and no bars.
    """

    def __init__(self, *, several: bool, quiet: bool = False, at_once: bool = False) -> None:
        self.output = LossyStream(sys.stdout)
        self._several, self._quiet, self._at_once = several, quiet, at_once
        self.progress = ProgressDisplay(console=Console(file=cast(IO[str], LossyStream(sys.stderr))))
        self._texts_shown = False

    def show(self, event: Event) -> None:
        """Shows one event."""
        update, line = self._update, self.progress.line
        match event:
            case RenderWarning():
                line(f"warning: {printable(event.message)}")
            case TextEncoded():
                if not self._texts_shown:
                    update("text", 0, event.total)
                    self._texts_shown = True
                update("text", event.done, event.total)
            case VideoStarted():
                if self._several:
                    line(f"{event.video}: denoising")
                update("denoise", 0, event.num_steps)
                if event.steps_done:
                    line(f"{event.video}: resumes after step {event.steps_done} of {event.num_steps}")
                    update("denoise", event.steps_done, event.num_steps)
            case StepDone():
                update("denoise", event.steps_done, event.num_steps)
            case PreviewWritten():
                line(f"preview after step {event.steps_done}: {event.path}")
            case DecodeStarted():
                if self._several:
                    line(f"{event.video}: decoding")
                update("decode", 0, event.num_windows)
            case WindowDecoded():
                update("decode", event.windows_done, event.num_windows)
            case VideoFailed():
                if self._several:
                    line(f"failed: {printable(event.message)}")
            case VideoDone():
                self.result(f"video: {event.path}")

    def _update(self, stage: str, done: int, total: int) -> None:
        if not self._at_once:
            self.progress.update(stage, done, total)

    def result(self, text: str) -> None:
        """A line of standard output, above the bars where both are one terminal."""
        if self._quiet:
            return
        if self.output.isatty():
            self.progress.line(text)
        else:
            self.output.write(f"{text}\n")


def summary(names: Iterable[str], outcomes: Mapping[str, Outcome]) -> list[str]:
    """A table of the outcomes of videos that were not done before, and the counts of the others."""
    by_name = {name: outcomes.get(name) for name in names}
    skipped, busy = (
        sum(isinstance(outcome, kind) for outcome in by_name.values()) for kind in (VideoSkipped, VideoBusy)
    )
    rows = [
        (name, *_shown(outcome))
        for name, outcome in by_name.items()
        if not isinstance(outcome, VideoSkipped | VideoBusy)
    ]
    lines = text_table([("video", "result", ""), *rows]) if rows else []
    if skipped:
        lines.append(f"{skipped} of {len(by_name)} done before")
    if busy:
        lines.append(f"{busy} of {len(by_name)} being rendered by others")
    return lines


def _shown(outcome: Outcome | None) -> tuple[str, str]:
    match outcome:
        case VideoDone():
            return "done", f"{sum(outcome.seconds.values()):.1f} s"
        case VideoFailed():
            return "failed", printable(str(outcome.error) or type(outcome.error).__name__)
        case VideoStopped():
            return "stopped", f"{outcome.steps_done} of {outcome.num_steps} steps"
    return "not finished", ""
