"""Ending a long run without losing what it did since its last checkpoint."""

import signal
from types import FrameType


class StopRequest:
    """`made` turns true when the process is asked to end (SIGTERM) or interrupted (SIGINT)."""

    def __init__(self) -> None:
        self.made = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._make)

    def _make(self, number: int, frame: FrameType | None) -> None:
        self.made = True
