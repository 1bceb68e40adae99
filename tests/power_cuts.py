"""`make powercut`: cuts the power at every moment of a render, and resumes it from every folder that this can leave.

A real process renders three steps on a disk that records what reaches it. `crash_states.py` says what may be left of
each moment. From there the render must come to the same bytes, without a step that had been reported as done.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from crash_states import PowerCuts, final_tree
from recorded_disk import Call, RecordedDisk, Tree, memory_folder, mounted, reason_not_to_mount
from render_processes import Processes, processes
from stand_in import DONE, files_in, products, render, steps_of, storyboard_file

from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.events import Event, VideoDone, VideoSkipped
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import load_storyboards

NUM_STEPS = 3
NAME = "bear"
LEFTOVERS = {"history.json", ".lock"}
"""What may lie beside a video that was done before the cut, and is read by nothing."""


@dataclass(frozen=True)
class Scenario:
    """A command whose power is cut, on an empty disk or, with `before`, on one where that command has ended."""

    name: str
    settings: Settings
    before: Settings | None = None

    def commands(self, file: Path, bundle: Path, disk: Path) -> Iterator[list[object]]:
        for settings in (self.before, self.settings):
            if settings is not None:
                yield [
                    *("sample", file, "--bundle", bundle, "--output-dir", disk / "new/out"),
                    *("--num-steps", settings.num_steps, "--sampler", settings.sampler, "--seed", settings.seed),
                    *(["--overwrite"] * (settings is self.settings and self.before is not None)),
                ]


SCENARIOS = (
    Scenario("ddim", Settings(num_steps=NUM_STEPS)),
    Scenario("dpmpp-2m-sde", Settings(num_steps=NUM_STEPS, sampler="dpmpp-2m-sde")),
    Scenario("--overwrite", Settings(num_steps=NUM_STEPS, seed=7), before=Settings(num_steps=NUM_STEPS)),
)


@dataclass(frozen=True)
class Recording:
    """What a scenario did to the disk. Its first `settled` calls are those of `before`."""

    scenario: Scenario
    calls: list[Call]
    settled: int
    tree: Tree


@dataclass
class State:
    """A folder that a cut can leave; `marks` is what had been reported before the latest cut that leaves it."""

    tree: Tree
    marks: frozenset[str]
    after: str

    @property
    def steps_done(self) -> int:
        return max((int(mark.split()[1]) for mark in self.marks if mark.startswith("StepDone ")), default=0)


def record(scenario: Scenario, bundle: Path, scratch: Path, run: Processes) -> Recording:
    """Runs the scenario's commands on a recorded disk. Raises OSError where none can be mounted."""
    disk, mount = RecordedDisk(), scratch / "disk"
    mount.mkdir(exist_ok=True)
    file = storyboard_file(scratch / f"{NAME}.json", [{"text": "A bear."}])
    with mounted(disk, mount):
        settled = 0
        for command in scenario.commands(file, bundle, mount):
            settled = len(disk.calls)
            ended = run.run(*command, cache=scratch / "cache", marks=mount)
            if ended.code:
                raise RuntimeError(ended.err)
    if final_tree(disk.calls) != disk.tree():
        raise AssertionError("the calls that were recorded do not make what is on the disk")
    return Recording(scenario, disk.calls, settled, disk.tree(f"new/out/{NAME}"))


def states_of(recording: Recording) -> tuple[int, list[State]]:
    """The number of crash points, and the distinct folders that they leave."""
    cuts = PowerCuts(recording.calls, recording.settled)
    found: dict[bytes, State] = {}
    for crash in cuts.states():
        since = recording.calls[recording.settled : crash.done]
        marks = frozenset(call.name.strip() for call in since if call.kind == "mark")
        last = recording.calls[crash.done - 1] if crash.done else Call("nothing")
        found[crash.digest] = State(crash.tree, marks, f"call {crash.done}, {last.kind} {last.name}".rstrip())
    return cuts.points, list(found.values())


class Resumer:
    """Resumes from states in this process, below `scratch`."""

    def __init__(self, recording: Recording, bundle: Path, scratch: Path) -> None:
        self._recording, self._bundle, self._root = recording, bundle, scratch / "resumed"
        self._board = load_storyboards(scratch / f"{NAME}.json")
        self._expected = {name: recording.tree[name] for name in ("video.mp4", "latents.safetensors")}

    def check_recording(self) -> None:
        """Raises AssertionError unless an uninterrupted render on another disk comes to the recorded bytes."""
        with self._laid({}) as folder:
            self._render(folder.parent, [])
            expect(products(folder) == self._expected, "the recorded render differs from one in this process")

    def check(self, state: State) -> None:
        """Raises AssertionError where a state is not what it claims, or does not come to the same bytes."""
        check_claims(state)
        with self._laid(state.tree) as folder:
            events: list[Event] = []
            self._render(folder.parent, events, may_refuse=self._may_refuse(state))
            expect(products(folder) == self._expected, "it comes to other bytes")
            finished = isinstance(events[-1], VideoSkipped)
            extra = set(files_in(folder)) - set(DONE)
            expect(set(DONE) <= set(files_in(folder)), f"files are missing: {files_in(folder)}")
            expect(all(name in LEFTOVERS or ".partial." in name for name in extra) if finished else not extra,
                   f"files are left over: {extra}")  # fmt: skip
            expect(len(steps_of(events)) <= NUM_STEPS - state.steps_done, "a step is done again")

    def _may_refuse(self, state: State) -> bool:
        """Before an overwriting render has begun anew, the folder may still be that of the old one."""
        return self._recording.scenario.before is not None and not state.marks

    def _render(self, out: Path, events: list[Event], *, may_refuse: bool = False) -> None:
        for overwrite in (False, True) if may_refuse else (False,):
            try:
                outcome = render(
                    self._bundle,
                    out,
                    *self._board,
                    settings=self._recording.scenario.settings,
                    on_event=events.append,
                    overwrite=overwrite,
                )[NAME]
                break
            except OutputError:
                if overwrite or not may_refuse:
                    raise
        expect(isinstance(outcome, VideoDone | VideoSkipped), str(outcome))

    @contextmanager
    def _laid(self, tree: Tree) -> Iterator[Path]:
        """The folder of the video, in a copy of the tree that goes in the end."""
        try:
            for path, data in tree.items():
                place = self._root / path
                place.parent.mkdir(parents=True, exist_ok=True)
                if data is None:
                    place.mkdir(exist_ok=True)
                else:
                    place.write_bytes(data)
            yield self._root / "new/out" / NAME
        finally:
            shutil.rmtree(self._root, ignore_errors=True)


def check_claims(state: State) -> None:
    """Raises AssertionError where a file that says so is not what it says, or one is missing of what was reported."""
    start = f"new/out/{NAME}/"
    files = {path.removeprefix(start): data for path, data in state.tree.items() if path.startswith(start) and data}
    if "video.json" in files:
        expect("video.mp4" in files and "run.json" in files, "video.json without video.mp4 or run.json")
        sidecar, begun = json.loads(files["video.json"]), json.loads(files["run.json"])
        expect(sha256(files["video.mp4"]).hexdigest() == sidecar["sha256"], "video.json beside another mp4")
        expect(sidecar["settings"] == begun["settings"], "video.json of another render than run.json")
    elif "VideoDone" in state.marks:
        raise AssertionError("the video was reported as done, and has no video.json")
    elif state.steps_done and "latents.safetensors" not in files:
        kept = [name for name in files if name.startswith("state-")]
        expect(f"state-{state.steps_done:04d}.safetensors" in kept, f"step {state.steps_done} was done, left is {kept}")


def expect(holds: bool, otherwise: str) -> None:
    """As `assert`, in a module that pytest does not rewrite."""
    if not holds:
        raise AssertionError(otherwise)


def failures(states: Iterable[State], check: Callable[[State], None]) -> list[str]:
    """What is wrong with each state that does not resume."""
    found = []
    for state in states:
        try:
            check(state)
        except Exception as error:
            found.append(f"after {state.after}: {type(error).__name__}: {error}; left were {sorted(state.tree)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a tiny bundle with the length 3s")
    parser.add_argument("--scenario", choices=[scenario.name for scenario in SCENARIOS], action="append")
    options = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, processes(Path(folder)) as run:
        scratch = Path(folder)
        (scratch / "disk").mkdir()
        if reason := reason_not_to_mount(scratch / "disk"):
            print(reason, file=sys.stderr)
            return 2
        for scenario in SCENARIOS:
            if scenario.name in (options.scenario or [scenario.name]):
                start = time.perf_counter()
                recording = record(scenario, options.bundle, scratch, run)
                resumer = Resumer(recording, options.bundle, scratch)
                resumer.check_recording()
                points, states = states_of(recording)
                lost = failures(states, resumer.check)
                print("".join(f"{line}\n" for line in lost[:20]), end="", file=sys.stderr)
                wrong += len(lost)
                print(
                    f"{scenario.name}: {len(recording.calls) - recording.settled} calls, {points} crash points, "
                    f"{len(states)} distinct folders, {len(states) - len(lost)} resumed to identical bytes, "
                    f"{len(lost)} lost ({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
