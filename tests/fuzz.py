"""Feeds every reader of a render's files with inputs that are nearly right, and counts what comes of them.

    python tests/fuzz.py [--cases 100000] [--seed 1] [--kind NAME]

The same seed gives the same cases. hypothesis draws them, and shrinks one that fails; it is kept in `fuzz-failures/`. A
case fails where anything but one of the project's own errors is raised, where it takes seconds or much memory, or where
it touches a file outside its folder.
"""

import argparse
import faulthandler
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from fuzz_inputs import Content
from fuzz_kinds import Kind, kinds, one_line
from hypothesis import HealthCheck, Phase, given, seed, settings

from ttt_video_engine.runtime.errors import TTTVideoError

ROOT = Path(__file__).parents[1]
FAILURES = Path("fuzz-failures")
MEMORY = 1 << 30
"""Bytes of address space that a case may add."""
SECONDS = 600
"""50 cases that take longer hang. Slow ones take 15 seconds on an idle machine."""
BATCH = 2000
"""Cases of one call of hypothesis, which keeps a record of them."""


class Leaves(BaseException):
    """Raised where a case touches something outside its folder."""


class Guard:
    """Watches a case: what it does to files, by the events that Python reports beforehand, and how long it takes.

    Where 50 cases take `seconds`, the process ends with a trace, wherever it is; the files of the case stay where they
    are.
    """

    _CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    _NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")

    def __init__(self, seconds: float) -> None:
        self.folder: str | None = None
        self._seconds, self._cases = seconds, 0
        sys.addaudithook(self._on_event)

    @contextmanager
    def armed(self, folder: Path) -> Iterator[None]:
        self.folder = os.path.realpath(folder)
        if self._cases % 50 == 0:  # it starts a thread
            faulthandler.dump_traceback_later(self._seconds, exit=True)
        self._cases += 1
        try:
            yield
        finally:
            self.folder = None

    def rest(self) -> None:
        """The cases are over: the process may run for as long as it likes."""
        faulthandler.cancel_dump_traceback_later()

    def _on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event in self._NEVER:
            raise Leaves(f"{event} {arguments!r:.300}")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
            self._inside(event, path)
        elif event in self._CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                self._inside(event, path)

    def _inside(self, event: str, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path) != os.devnull:
            # The folder of it, as the name itself may be a link that is replaced.
            found = os.path.realpath(os.path.dirname(os.fsdecode(path)) or ".")
            if self.folder is not None and os.path.commonpath([found, self.folder]) != self.folder:
                raise Leaves(f"{event} {path!r:.300}")


def fuzz(kind: Kind, cases: int, work: Path, guard: Guard, first_seed: int = 1) -> Counter[str]:
    """Tries so many cases of a kind in the folder `work`, and counts what came of them.

    Raises what a failing case raised. `work` then holds the case, as small as it could be made.
    """
    outcomes: Counter[str] = Counter()

    def one(content: Content) -> None:
        _empty(work)
        with guard.armed(work):
            try:
                outcome = kind.target(work, content)
            except TTTVideoError as error:
                one_line(str(error))
                outcome = type(error).__name__
        outcomes[outcome] += 1

    number = 0
    work.mkdir(parents=True, exist_ok=True)
    try:
        while (left := cases - outcomes.total()) > 0:
            # Without a database: what is found is to be found again by the same seed alone.
            limits = settings(
                max_examples=min(left, BATCH),
                phases=(Phase.generate,) if kind.slow else (Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                derandomize=False,
                database=None,
                deadline=None,
            )
            seed(first_seed * 1_000_003 + number)(limits(given(kind.contents)(one)))()
            number += 1
    finally:
        guard.rest()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other cases")
    parser.add_argument("--kind", help="one kind alone")
    options = parser.parse_args()
    # In memory where there is such a folder: most of the time is that of a disk otherwise.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as name:
        temporary = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(temporary / "cache")
        bundle = _exported(temporary)
        # Nothing here ends in a power cut, and a disk that syncs takes milliseconds a file.
        with patch("os.fsync"):
            every = [kind for kind in kinds(bundle, temporary / "valid") if options.kind in (None, kind.name)]
            return _fuzz_all(every, options.cases, options.seed, temporary / "case")


def _fuzz_all(every: list[Kind], cases: int, first_seed: int, work: Path) -> int:
    """Prints a line a kind, and a trace for each that failed. Returns the exit code."""
    _limit_memory()
    guard = Guard(SECONDS)
    total, failed, start = 0, 0, time.monotonic()
    slow = sum(kind.slow for kind in every)
    shares = sum(kind.share for kind in every)
    for kind in every:
        wanted = kind.slow or max(1, -(-(cases - slow) * kind.share // shares))
        began = time.monotonic()
        try:
            outcomes = fuzz(kind, wanted, work, guard, first_seed)
        except (Exception, Leaves) as error:
            traceback.print_exception(error)
            failed += 1
            print(f"{kind.name:22} failed; its files are in {_keep(kind, work)}", flush=True)
            continue
        total += outcomes.total()
        listed = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
        print(f"{kind.name:22} {outcomes.total():6} cases {time.monotonic() - began:5.0f} s: {listed}", flush=True)
    print(f"{total} cases, {failed} of {len(every)} kinds failed, seed {first_seed}, {time.monotonic() - start:.0f} s")
    return 1 if failed or total < cases else 0


def _exported(folder: Path) -> Path:
    """A bundle, made by another process: this one needs no torch, whose address space would hide what a case adds."""
    command = ["cli.py", "export", "--preset", "tiny", "--length", "3s", "--output", str(folder / "bundle")]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "bundle"


def _limit_memory() -> None:
    """Lets an allocation that is far too large fail, as it would on a machine with less memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _empty(work: Path) -> None:
    """Removes what is in the folder of the cases; the folder stays, as that is faster."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _keep(kind: Kind, work: Path) -> Path:
    """Copies the files of the last case, which is the smallest that fails: of each what is no tail of zeros."""
    kept = FAILURES / kind.name.replace(" ", "-")
    shutil.rmtree(kept, ignore_errors=True)
    for path in work.rglob("*"):
        if path.is_file():
            copy = kept / path.relative_to(work)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                copy.write_bytes(file.read(8 << 20).rstrip(b"\0"))
    return kept


if __name__ == "__main__":
    sys.exit(main())
