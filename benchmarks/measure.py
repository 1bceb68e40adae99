"""Timing and tables, shared by the benchmarks."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from threading import Event, Thread

PAUSE = 0.25
"""Seconds; OpenMP runtimes spin for up to 0.2."""


def interleaved(calls: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each call, taken in turn so that a change in the machine's load meets all of them alike.

    Each is called once before, unmeasured: the first call allocates. Before each there is a pause, for the threads of
    the one before spin on in wait of more work.
    """
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, taken in zip(calls, seconds, strict=True):
            time.sleep(PAUSE)
            taken.append(_seconds_of(call))
    return [median(taken) for taken in seconds]


def median_of_processes(arguments: Sequence[str], repetitions: int) -> float:
    """Median wall seconds of a Python process, start and end included. Raises CalledProcessError where it fails."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return interleaved([run], repetitions)[0]


def peak_memory() -> int:
    """Peak bytes of this process alone: what `getrusage` says on Linux has the parent's peak in it, kept over exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def forget_peak() -> None:
    """Lets `peak_memory` start again from what is held now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def private_memory() -> Iterator[Callable[[], int]]:
    """Gives a function that says the peak bytes of this process within the block, files that are mapped left out: the
    system drops those where it needs room. Looked at ten times a second, on Linux."""
    found, ended = [0], Event()

    def look() -> None:
        while not ended.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
            found[0] = max(found[0], now)

    watcher = Thread(target=look)
    watcher.start()
    try:
        yield lambda: found[0]
    finally:
        ended.set()
        watcher.join()


def print_row(row: list[str]) -> list[str]:
    """Shows a row as soon as it is measured: a table of long runs is worth something before it is whole."""
    print("  ".join(row), file=sys.stderr, flush=True)
    return row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
