"""What `sample` does around a render: display, logs and signals; then the exit code for the outcomes of the videos."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import typer

from ttt_video_engine.commands.render_display import RenderDisplay, summary
from ttt_video_engine.commands.stopping import StopSignals, resuming_command
from ttt_video_engine.commands.streams import LossyStream
from ttt_video_engine.runtime.errors import CheckFailed, RenderBusy
from ttt_video_engine.runtime.events import (
    Event,
    OnEvent,
    Outcome,
    VideoBusy,
    VideoFailed,
    VideoSkipped,
    VideoStopped,
    to_json,
)
from ttt_video_engine.runtime.files import writing

Render = Callable[[OnEvent, StopSignals], dict[str, Outcome]]
"""Renders, reports each event, and returns the outcomes of the videos by name."""


def run_and_report(
    names: list[str],
    render: Render,
    display: RenderDisplay,
    *,
    log_json: Path | None,
    wandb: AbstractContextManager[OnEvent],
) -> None:
    """Renders the videos of these names, displays and logs; exits with the code for their outcomes."""
    # What is left for wandb to send is sent last, when a signal ends the command at once.
    with (
        wandb as log_wandb,
        _json_log(log_json, display) as log,
        StopSignals() as signals,
        display.progress,
    ):

        def on_event(event: Event) -> None:
            for client in (log, log_wandb, display.show, signals.check):
                client(event)

        outcomes = render(on_event, signals)
    if len(names) > 1 or any(isinstance(outcome, VideoSkipped) for outcome in outcomes.values()):
        for line in summary(names, outcomes):
            display.progress.line(line)
    stopped = any(isinstance(outcome, VideoStopped) for outcome in outcomes.values())
    if stopped or signals.received is not None:
        display.progress.line(f"stopped; resume with: {resuming_command('ttt-video', sys.argv[1:])}")
    if signals.received is not None:
        raise typer.Exit(128 + signals.received)
    _report(outcomes)
    if display.output.failed:
        raise typer.Exit(1)


def _report(outcomes: dict[str, Outcome]) -> None:
    """Raises CheckFailed where a video failed, RenderBusy where the only one is rendered by another process."""
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, VideoFailed)]
    if len(outcomes) == 1 and failed:
        raise CheckFailed(failed[0].message) from failed[0].error
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(outcomes)} videos failed: {', '.join(one.video for one in failed)}")
    match list(outcomes.values()):
        case [VideoBusy(message=message)]:
            raise RenderBusy(message)


@contextmanager
def _json_log(path: Path | None, display: RenderDisplay) -> Iterator[OnEvent]:
    """An `on_event` that writes a line of JSON for each event, at once; to nowhere where there is no path."""
    if path is None:
        yield lambda event: None
        return
    with ExitStack() as stack:
        output = display.output
        if path != Path("-"):
            with writing(path):
                output = LossyStream(stack.enter_context(path.open("a", encoding="utf-8")))

        def write(event: Event) -> None:
            output.write(to_json(event))
            display.output.failed |= output.failed

        yield write
