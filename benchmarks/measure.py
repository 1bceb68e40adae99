"""Timing, memory and tables for the benchmarks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from threading import Event, Thread

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for demo/, which is not installed

PAUSE = 0.25
"""Seconds between calls. OpenMP threads spin for up to 0.2 s after their work."""

CHUNK_BYTES = 16 << 20
"""Bytes that the disk's speed is measured with at a time."""


def interleaved(calls: Sequence[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each call. The calls take turns, so that a change in the machine's load affects all of them.

    Each is called once unmeasured, because the first call allocates memory. A pause before each call lets the threads
    of the previous one stop spinning.
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
    """Median wall seconds of a Python process, start and end included. Raises CalledProcessError if it fails."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return interleaved([run], repetitions)[0]


def peak_memory() -> int:
    """Peak resident memory of this process in bytes. On Linux, `getrusage` would include the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak() -> None:
    """Resets `peak_memory` to the current memory, on Linux. Has no effect elsewhere."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def private_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the peak anonymous memory of this process in the block, in bytes.

    Memory-mapped files do not count: the system can evict them. Sampled ten times per second; Linux only.
    """
    peak, ended = [0], Event()

    def sample() -> None:
        while not ended.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], now)

    watcher = Thread(target=sample)
    watcher.start()
    try:
        yield lambda: peak[0]
    finally:
        ended.set()
        watcher.join()


def disk_speed(path: Path, size: int) -> tuple[float, float]:
    """Sequential write and read speed of the disk, in bytes per second, with a file of `size` bytes."""
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(chunk)
        os.fsync(file.fileno())
    written = size / (time.perf_counter() - start)
    drop_page_cache(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(CHUNK_BYTES):
            pass
    read = size / (time.perf_counter() - start)
    path.unlink()
    return written, read


def drop_page_cache(path: Path) -> None:
    """Drops files from the page cache, so that reading them reads the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_row(row: list[str]) -> list[str]:
    """Prints a row to standard error as soon as it is measured, and returns it."""
    print("  ".join(row), file=sys.stderr, flush=True)
    return row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
