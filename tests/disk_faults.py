"""`make diskfaults`: fails each call of a command that reaches the disk in turn, and runs the command again.

Real processes of `sample` and `decode` work on the disk of `recorded_disk.py`. One call fails, as on a full or broken
disk, or every call from there on that needs space. The command must not report a success that is none, must name what
it could not write in one line, and must come to the same bytes afterwards.
"""

import argparse
import errno
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from messages import ERROR, TRACE
from recorded_disk import GROWING, RecordedDisk, Tree, memory_folder, mounted, reason_not_to_mount
from render_processes import Ended, Processes, processes
from stand_in import storyboard_file

NAME = "bear"
FOLDER = f"out/{NAME}"
PRODUCTS = ("video.mp4", "latents.safetensors")

PREVIEWS, LEFTOVERS = {"preview.png"}, {"history.json", ".lock"}
"""What a render does without, and what may lie beside a video that is done, and is read by nothing."""

FAULTS: dict[str, Callable[[int, int, str], int]] = {
    "ENOSPC": lambda at, number, kind: errno.ENOSPC if number == at else 0,
    "EIO": lambda at, number, kind: errno.EIO if number == at else 0,
    "full": lambda at, number, kind: errno.ENOSPC if number >= at and kind in GROWING else 0,
}
"""errno of the call `number` of a kind, where the fault is `at` a number. "full" is a disk that stays full."""


@dataclass(frozen=True)
class Command:
    """A command, after `before` was run without a fault; its `files` must come out the same."""

    name: str
    arguments: tuple[object, ...]
    files: tuple[str, ...]
    before: tuple[object, ...] = ()


def commands(bundle: Path, scratch: Path) -> tuple[Command, ...]:
    board = storyboard_file(scratch / f"{NAME}.json", [{"text": "A bear."}])
    disk = scratch / "disk"
    sample = ("sample", board, "--bundle", bundle, "--output-dir", disk / "out", "--num-steps", 3)
    decode = ("decode", disk / FOLDER, "--bundle", bundle, "--crf", 40)
    return (
        Command("sample", (*sample, "--preview-every", 2), PRODUCTS),
        Command("sample --overwrite", (*sample, "--seed", 7, "--overwrite"), PRODUCTS, before=sample),
        Command("decode", decode, PRODUCTS, before=sample),
    )


class Faults:
    """Runs a command with faults. `calls` is how many of its calls can fail."""

    def __init__(self, command: Command, run: Processes, scratch: Path) -> None:
        self._command, self._run, self._scratch = command, run, scratch
        self._before = RecordedDisk()
        if command.before:
            with self._disk() as self._before:
                ended = self._do(command.before)
                expect(ended.code == 0, ended.err)
        with self._disk() as disk:
            ended = self._do(command.arguments)
            expect(ended.code == 0, ended.err)
            self.calls = disk.fallible
            self._expected, self._names = self._files(disk), set(disk.tree(FOLDER))

    def check(self, at: int, fault: str) -> str:
        """What failed, and how the command took it. Raises AssertionError where it was wrong."""
        with self._disk() as disk:
            disk.fail(lambda number, kind: FAULTS[fault](at, number, kind))
            ended = self._do(self._command.arguments)
            if not disk.failed:
                return "no call"
            failed = ", ".join(disk.failed)
            self._check_ended(ended, disk, failed)
            disk.fail(lambda number, kind: 0)
            again = self._do(self._command.arguments)
            expect(again.code == 0, f"after {failed} failed, the command again ends with {again.code}: {again.err}")
            expect(self._files(disk) == self._expected, f"after {failed} failed, the command again makes other bytes")
            left = set(disk.tree(FOLDER))
            expect(self._names - PREVIEWS <= left <= self._names | LEFTOVERS, f"after {failed} failed, left are {left}")
            return "ended with an error" if ended.code else "not needed"

    def _check_ended(self, ended: Ended, disk: RecordedDisk, failed: str) -> None:
        if ended.code == 0:
            expect(self._files(disk) == self._expected, f"{failed} failed, the command reports success, and it is none")
            expect("video.json" in disk.tree(FOLDER), f"{failed} failed, the command reports success, and is not done")
            return
        expect(ended.code in (1, 2), f"{failed} failed, and the command ends with {ended.code}: {ended.err}")
        errors = [line for line in ended.err.splitlines() if line.startswith(ERROR)]
        expect(len(errors) == 1 and TRACE not in ended.err, f"{failed} failed, and this is no line: {ended.err}")
        expect(ended.err.splitlines()[-1] == errors[0], f"{failed} failed, and the error is not the last: {ended.err}")
        path = f"{self._scratch / 'disk'}/"
        named = any(_target(call) in errors[0] for call in disk.failed)
        expect(path in errors[0] and named, f"{failed} failed, and is not named: {errors[0]}")

    def _do(self, arguments: Sequence[object]) -> Ended:
        return self._run.run(*arguments, cache=self._scratch / "disk/cache")

    @contextmanager
    def _disk(self) -> Iterator[RecordedDisk]:
        """A disk as the command before has left it."""
        disk = self._before.copy()
        with mounted(disk, self._scratch / "disk"):
            yield disk

    def _files(self, disk: RecordedDisk) -> Tree:
        tree = disk.tree(FOLDER)
        return {name: tree.get(name) for name in self._command.files}


def _target(failed: str) -> str:
    """The name under which a call that failed would have left its file; a folder's is that of all files in it."""
    name = failed.partition(" ")[2]
    unfinished = re.fullmatch(r"\.(.+)\.\d+\.partial\.\w+", name)
    return unfinished[1] if unfinished else name.replace(".partial", "")


def expect(holds: bool, otherwise: str) -> None:
    """As `assert`, in a module that pytest does not rewrite."""
    if not holds:
        raise AssertionError(otherwise)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a tiny bundle with the length 3s")
    parser.add_argument("--only", help="one of the commands, such as decode")
    parser.add_argument("--fault", choices=list(FAULTS), action="append")
    options = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, processes(Path(folder)) as run:
        scratch = Path(folder)
        (scratch / "disk").mkdir()
        if reason := reason_not_to_mount(scratch / "disk"):
            print(reason, file=sys.stderr)
            return 2
        for command in commands(options.bundle, scratch):
            if command.name != (options.only or command.name):
                continue
            faults = Faults(command, run, scratch)
            for fault in options.fault or FAULTS:
                start = time.perf_counter()
                results: Counter[str] = Counter()
                for at in range(faults.calls):
                    try:
                        results[faults.check(at, fault)] += 1
                    except AssertionError as error:
                        results["wrong"] += 1
                        print(f"{command.name}, {fault} at call {at}: {error}", file=sys.stderr)
                wrong += results["wrong"]
                counts = ", ".join(f"{count} {result}" for result, count in sorted(results.items()))
                seconds = time.perf_counter() - start
                print(f"{command.name}, {fault}: {faults.calls} calls, {counts} ({seconds:.0f} s)", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
