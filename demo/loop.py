"""The loop of both trainings: resumes from the last checkpoint, logs every step, saves every few minutes."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

from demo.command_line import Folders
from demo.stopping import StopRequest

_SAVE_SECONDS = 180
_TOLD_EVERY = 50


class Training(Protocol):
    """A run whose steps depend on its seed, their number and the weights alone."""

    @property
    def finished(self) -> bool: ...

    def advance(self) -> Any:
        """Makes one step; a dataclass of what there is to log, with `step`, and `str` of it for people."""

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...

    def start_from(self, checkpoint: Path) -> None:
        """Takes the weights of a published checkpoint and the number of steps they were trained for."""


def train(training: Training, folders: Folders, name: str) -> None:
    """Trains until the last stage ends or the process is asked to; NAME.pt and NAME.jsonl go to the output folder."""
    checkpoint, log_file = folders.output / f"{name}.pt", folders.output / f"{name}.jsonl"
    if checkpoint.is_file():
        training.load(checkpoint)
    elif folders.start_from is not None:
        training.start_from(folders.start_from)
    saved, stop = time.monotonic(), StopRequest()
    with log_file.open("a") as log:
        while not (training.finished or stop.made):
            start = time.monotonic()
            told = training.advance()
            line = {**vars(told), "seconds": round(time.monotonic() - start, 2)}
            print(json.dumps(line), file=log, flush=True)
            if told.step % _TOLD_EVERY == 0:
                print(f"{told}, {line['seconds']} s", flush=True)
            if time.monotonic() - saved > _SAVE_SECONDS or training.finished or stop.made:
                training.save(checkpoint)
                saved = time.monotonic()
