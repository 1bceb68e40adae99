"""How far a command is: bars with the time that remains on a terminal, a line a stage elsewhere."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows stages on standard error; `update` is a `runtime.callbacks.Progress`.

    `passing` stages leave nothing behind: no bar when they are done, and no line where there is no terminal.
    """

    def __init__(self, *, passing: bool = False) -> None:
        self._passing = passing
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._stage: TaskID | None = None

    def update(self, stage: str, done: int, total: int) -> None:
        """A stage begins (done is 0) or has come further."""
        if not self._console.is_terminal:
            if self._passing:
                return
            if done == 0:
                sys.stderr.write(f"{stage}: {total} to do\n")
            elif done % max(1, total // 5) == 0 or done == total:
                sys.stderr.write(f"{stage}: {done}/{total}\n")
            return
        if done == 0 or self._stage is None:
            self._stage = self._bars.add_task(stage, total=total)
        self._bars.update(self._stage, completed=done)
        if self._passing and done == total:
            self._bars.remove_task(self._stage)
            self._stage = None

    def line(self, text: str) -> None:
        """Prints a line, above the bars where there are some."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
