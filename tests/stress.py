"""`make stress`: kills real renders at random moments, and runs each command again until it is done.

Processes of `ttt-video sample` and `ttt-video decode` get SIGKILL, whatever they do, at moments that a seed draws. When
a command is done in the end, its files must be those of one that nothing interrupted, and no step that was reported as
done may have been done twice.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stand_in import storyboard_file

ROOT = Path(__file__).parents[1]
NAME = "bear"
NUM_STEPS = 4
PRODUCTS = ("video.mp4", "latents.safetensors")
SAMPLERS = ("ddim", "dpmpp-2m-sde")
LIMIT = 300
"""Seconds that a command may take."""

MOMENTS = ("run.json", "text.safetensors", "state", "latents.safetensors", "video.partial.mp4", ".video.mp4",
           "video.mp4", "contact.png", "video.json")  # fmt: skip
"""What appears in the folder one after the other. A kill comes between two of them."""


@dataclass
class Tally:
    """What came of the kills, by the phase that they hit, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.kills += other.kills
        self.lost += other.lost
        self.errors += other.errors


@dataclass(frozen=True)
class Render:
    """A command and the folder it writes to, `log` being what it reports."""

    arguments: tuple[str, ...]
    folder: Path
    log: Path

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "cli.py", *self.arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder.parent / "cache")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def seen(self) -> dict[str, float]:
        """The moments that have come, with the newest step for "state"."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        found = {name: 1.0 for name in names if name in MOMENTS}
        if any(name.startswith(".video.mp4.") for name in names):
            found[".video.mp4"] = 1.0
        if states := [float(name[6:10]) for name in names if name.startswith("state-")]:
            found["state"] = max(states)
        return found

    def products(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in PRODUCTS}


def sample(bundle: Path, scratch: Path, sampler: str) -> Render:
    board = storyboard_file(scratch / f"{NAME}.json", [{"text": "A bear."}])
    log = scratch / "events.jsonl"
    options = ("--num-steps", NUM_STEPS, "--sampler", sampler, "--log-json", log)
    arguments = ("sample", board, "--bundle", bundle, "--output-dir", scratch / "out", *options)
    return Render(tuple(map(str, arguments)), scratch / "out" / NAME, log)


def decode(bundle: Path, render: Render) -> Render:
    arguments = ("decode", render.folder, "--bundle", bundle, "--crf", 40)
    return Render(tuple(map(str, arguments)), render.folder, render.log)


def uninterrupted(render: Render) -> dict[str, float]:
    """Runs a command to its end. Seconds after its start at which each moment came."""
    moments: dict[str, float] = {}
    before = render.seen()
    start = time.monotonic()
    with render.start() as process:
        while process.poll() is None:
            for moment, value in render.seen().items():
                if value > before.get(moment, 0.0):
                    moments.setdefault(moment, time.monotonic() - start)
            time.sleep(0.005)
        if process.returncode:
            raise RuntimeError(process.stderr.read() if process.stderr else "")
    return {**moments, "end": time.monotonic() - start}


@dataclass(frozen=True)
class Whole:
    """What a command comes to without a kill, and when its moments come."""

    moments: dict[str, float]
    products: dict[str, bytes]

    @classmethod
    def of(cls, render: Render) -> "Whole":
        return cls(uninterrupted(render), render.products())


def kill_once(render: Render, moments: dict[str, float], draw: random.Random) -> str | None:
    """Starts the command, kills it, and says in which phase it was; None where it was done before.

    Raises RuntimeError where the command fails or hangs.
    """
    before = render.seen()
    ahead = [moment for moment in MOMENTS if moment in moments and (moment not in before or moment == "state")]
    if "latents.safetensors" in before:
        ahead = [moment for moment in ahead if MOMENTS.index(moment) > MOMENTS.index("latents.safetensors")]
    near = ahead[:3]  # so that a render is killed in many phases, one after the other
    moment = draw.choice([*near, *near, "start"])
    times = sorted((0.0, *moments.values()))
    came = moments.get(moment, 0.0)
    after = draw.uniform(0.0, next((later for later in times if later > came), came) - came)
    deadline = time.monotonic() + LIMIT
    with render.start() as process:
        while moment != "start" and render.seen().get(moment, 0.0) <= before.get(moment, 0.0):
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.001)
        try:
            process.wait(min(after, LIMIT))
        except subprocess.TimeoutExpired:
            process.kill()
        _, err = process.communicate()
    if process.returncode > 0:
        raise RuntimeError(err)
    return phase(render) if process.returncode < 0 else None


def phase(render: Render) -> str:
    """Where a process was killed, by the files that it left."""
    names = os.listdir(render.folder) if render.folder.exists() else []
    partial = {name.split(".")[1] for name in names if ".partial." in name and name.startswith(".")}
    if render.arguments[0] == "decode":
        return "decode again, writing" if partial or "video.partial.mp4" in names else "decode again"
    if "video.json" in names:
        return "done, not ended"
    if partial & {"video", "contact"} or "video.mp4" in names:
        return "writing the video"
    if partial:
        return "writing a state, a text or a record"
    if "video.partial.mp4" in names:
        return "decoding"
    if "latents.safetensors" in names:
        return "loading the decoder"
    if any(name.startswith("state-") for name in names):
        return "denoising"
    return "before the first step" if names else "start"


def killed_until_done(render: Render, whole: Whole, kills: int, draw: random.Random) -> Tally:
    """Up to `kills` kills of one command, then runs it to its end and compares."""
    tally = Tally()
    old = render.products() if render.arguments[0] == "decode" else None
    try:
        while tally.kills.total() < kills:
            hit = kill_once(render, whole.moments, draw)
            if hit is None:
                break
            tally.kills[hit] += 1
            if old is not None and render.products() not in (old, whole.products):
                raise RuntimeError("neither the old video nor the new one is there")
        uninterrupted(render)
        if render.products() != whole.products:
            raise RuntimeError(f"it came to other bytes than without kills; see {render.folder}")
        check_steps(render.log)
    except (RuntimeError, OSError) as error:
        tally.lost = tally.kills.total()
        tally.errors.append(f"{render.folder}: {error}")
    return tally


def check_steps(log: Path) -> None:
    """Raises RuntimeError where a process began before a step that one before it had reported."""
    done = 0
    for line in log.read_text().splitlines():
        if not line.endswith("}"):
            continue
        event = json.loads(line[line.rindex('{"event"') :])  # a kill may have cut the line that it is added to
        if event["event"] == "VideoStarted" and event["steps_done"] < done:
            raise RuntimeError(f"step {done} was reported as done, and the render resumed after {event['steps_done']}")
        if event["event"] == "StepDone":
            done = event["steps_done"]


@dataclass(frozen=True)
class Plan:
    """How many kills, drawn from what seed, of how many commands at a time; of which samplers, and of `decode` too."""

    kills: int
    seed: int = 0
    jobs: int = 1
    samplers: tuple[str, ...] = SAMPLERS
    decodes: bool = True

    def commands(self, bundle: Path, place: Path, sampler: str) -> list[Render]:
        """A render in a new folder, and what decodes it again."""
        place.mkdir()
        render = sample(bundle, place, sampler)
        return [render, decode(bundle, render)] if self.decodes else [render]


def stress(bundle: Path, scratch: Path, plan: Plan) -> Tally:
    """Kills renders with each sampler in turn, and decodes each again, until there were as many kills as planned."""
    wholes = {
        sampler: [Whole.of(command) for command in plan.commands(bundle, scratch / sampler, sampler)]
        for sampler in plan.samplers
    }

    def work(job: int) -> Tally:
        draw, tally, number = random.Random(f"{plan.seed} {job}"), Tally(), job
        mine = plan.kills // plan.jobs + (job < plan.kills % plan.jobs)
        while tally.kills.total() < mine:
            sampler = plan.samplers[number % len(plan.samplers)]
            commands = plan.commands(bundle, scratch / f"{number:04d}", sampler)
            for command, whole in zip(commands, wholes[sampler], strict=True):
                most = draw.randint(3, 10) if command is commands[0] else draw.randint(1, 3)
                one = killed_until_done(command, whole, min(mine - tally.kills.total(), most), draw)
                tally.add(one)
                if one.errors:
                    break
            print(f"{tally.kills.total()} kills of job {job + 1}, {tally.lost} lost", file=sys.stderr, flush=True)
            number += plan.jobs
        return tally

    total = Tally()
    with ThreadPoolExecutor(plan.jobs) as pool:
        for tally in pool.map(work, range(plan.jobs)):
            total.add(tally)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="a tiny bundle with the length 3s")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = stress(options.bundle.resolve(), Path(folder), Plan(options.kills, options.seed, options.jobs))
    for error in tally.errors:
        print(error, file=sys.stderr)
    for hit, count in tally.kills.most_common():
        print(f"{count:4} kills: {hit}")
    kills = tally.kills.total()
    print(f"{kills} kills, {kills - tally.lost} survived, {tally.lost} lost ({time.monotonic() - start:.0f} s)")
    return 1 if tally.lost or tally.errors else 0


if __name__ == "__main__":
    sys.exit(main())
