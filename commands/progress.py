"""Shows the progress of a command: bars with the remaining time on a terminal, lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows stages on standard error; `update` is a `runtime.callbacks.Progress`.

    Each stage has one bar; a stage that begins again gets a new bar in its place. With `passing`, a bar is removed when
    its stage is done, and nothing is printed without a terminal.
    """

    def __init__(self, *, passing: bool = False, console: Console | None = None) -> None:
        self._passing = passing
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._last: tuple[str, int, int] | None = None

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` parts of a stage are complete. A stage begins with 0."""
        if self._last == (stage, done, total):  # repeated for small tensors, where parts are MiB
            return
        self._last = (stage, done, total)
        if self._console.is_terminal:
            self._show_bar(stage, done, total)
        elif not self._passing:
            self._print_line(stage, done, total)

    def line(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show_bar(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self._remove_bar(stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if self._passing and done == total:
            self._remove_bar(stage)

    def _remove_bar(self, stage: str) -> None:
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))

    def _print_line(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self.line(f"{stage}: {total} to do")
        elif done % max(1, total // 5) == 0 or done == total:
            self.line(f"{stage}: {done}/{total}")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
