"""Signals that stop a long command: the first after the current step, so that it can be resumed, a second at once."""

import os
import shlex
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from ttt_video_engine.runtime.events import Event, StopRendering

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_NOTICE = b"\nstopping after this step; once more stops at once\n"


class StopSignals:
    """Within its block, the first signal is noted, and `check` stops the render at the next event.

    Nothing is raised where the signal arrives, so that what is being written is written. A signal that is ignored, as
    by nohup, stays so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def check(self, event: Event) -> None:
        """An `on_event`. Raises StopRendering once a signal has arrived."""
        if self.received is not None:
            raise StopRendering

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, _NOTICE)

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def resuming_command(program: str, arguments: Sequence[str]) -> str:
    """The command line that resumes: without options that would restart or stop it again."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--stop-after":
            next(rest, None)
        elif argument != "--overwrite" and not argument.startswith("--stop-after="):
            kept.append(argument)
    return shlex.join((program, *kept))
