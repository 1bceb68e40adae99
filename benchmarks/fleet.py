"""What a fleet of GPUs renders, simulated: `python benchmarks/fleet.py`, a minute; `--plot FILE` also draws it.

A discrete-event simulation (SimPy) of GPUs that take 63-second videos of the 5B model from an endless queue, step by
step. GPUs fail, are taken away (preempted), and some are slow. A GPU that comes back continues a video from its last
step, whose state is in the object store, or, without states, begins it again. No figure here was measured on a GPU:
a step costs its FLOPs at an assumed speed, and `Fleet` has the other assumptions with their sources.
"""

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import simpy

from ttt_video_engine.planning.flops import video_flops
from ttt_video_engine.runtime.presets import full

HOUR = 3600.0
SIZES = (1, 10, 100, 1000, 10_000)
LENGTH, NUM_STEPS = "63s", 50


@dataclass(frozen=True)
class Fleet:
    """Rates are per GPU and hour, times in seconds, sizes in bytes."""

    gpus: int
    checkpoint_every: int | None = 1
    """Steps from one stored state to the next; None stores none."""
    preemptions: float = 0.0
    """None on machines of one's own. On spot machines, one in 10 to 20 hours is usual: an assumption."""
    step: float = 0.0
    rest: float = 0.0
    """Text and decoding."""
    state: int = 2 * 253 * 16 * 60 * 90 * 4
    """Latents and x0, each [253, 16, 60, 90] in float32."""
    video: int = 60_000_000
    """An mp4 of 63 s, 720x480, 8 Mbit/s: an assumption."""
    failures: float = 419 / (54 * 24 * 16_384)
    """Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100s."""
    replacement: float = 600.0
    """From the loss of a GPU to one that has loaded the bundle: an assumption."""
    slow_share: float = 0.02
    slow_factor: float = 1.5
    """2 % of the GPUs take half as long again: an assumption."""


@dataclass
class Result:
    """Sums over a simulation."""

    videos: int = 0
    worked: float = 0.0
    wasted: float = 0.0
    """GPU-seconds of work that was lost and done again."""
    stored: int = 0
    losses: int = 0


def simulate(fleet: Fleet, hours: float, seed: int = 0) -> Result:
    """`hours` of a fleet that starts idle."""
    environment, result, random = simpy.Environment(), Result(), Random(seed)
    for number in range(fleet.gpus):
        slow = number < fleet.gpus * fleet.slow_share
        environment.process(_gpu(environment, fleet, result, random, fleet.slow_factor if slow else 1.0))
    environment.run(until=hours * HOUR)
    return result


def _gpu(
    environment: simpy.Environment, fleet: Fleet, result: Result, random: Random, slowness: float
) -> Generator[simpy.Event]:
    """A place in the fleet. A lost GPU leaves its video to the next one there, with as many steps as are stored."""
    step, rest = fleet.step * slowness, fleet.rest * slowness
    every = fleet.checkpoint_every or NUM_STEPS + 1
    lost_at = _next_loss(environment.now, fleet, random)
    done = 0
    while True:
        needed = (NUM_STEPS - done) * step + rest
        if environment.now + needed <= lost_at:
            yield environment.timeout(needed)
            result.videos += 1
            result.worked += needed
            result.stored += fleet.video + fleet.state * _states(done, NUM_STEPS, every)
            done = 0
            continue
        worked = lost_at - environment.now
        yield environment.timeout(worked)
        reached = min(done + int(worked / step), NUM_STEPS)
        stored = max(done, reached // every * every)
        result.losses += 1
        result.worked += worked
        result.wasted += worked - (stored - done) * step
        result.stored += fleet.state * _states(done, stored, every)
        done = stored
        yield environment.timeout(fleet.replacement)
        lost_at = _next_loss(environment.now, fleet, random)


def _states(before: int, after: int, every: int) -> int:
    """How many are stored from one number of steps to another."""
    return after // every - before // every


def _next_loss(now: float, fleet: Fleet, random: Random) -> float:
    return now + random.expovariate((fleet.failures + fleet.preemptions) / HOUR)


def with_costs(fleet: Fleet, tflops: float) -> Fleet:
    """The fleet with what a video of the 5B model costs at so many sustained TFLOP/s."""
    flops = video_flops(full("mlp"), LENGTH, NUM_STEPS)
    speed = tflops * 1e12
    return replace(fleet, step=flops.transformer_step / speed, rest=(flops.text_encoder + flops.vae_decoder) / speed)


def row(fleet: Fleet, hours: float, name: str) -> str:
    """A row in Markdown."""
    result = simulate(fleet, hours)
    cells = (
        f"{fleet.gpus:,}",
        name,
        "none" if fleet.checkpoint_every is None else f"every {fleet.checkpoint_every}",
        f"{result.videos / hours:,.1f}",
        f"{result.losses / hours:,.2f}",
        f"{result.wasted / max(result.worked, 1):.2%}",
        f"{result.stored / hours / 1e9:,.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def table(sizes: Sequence[int], tflops: float, hours: float) -> str:
    """All fleets, in Markdown."""
    head = ("GPUs", "losses from", "states", "videos/h", "losses/h", "work done twice", "GB/h stored")
    lines = ["| " + " | ".join(head) + " |", "| ---: | --- | --- | ---: | ---: | ---: | ---: |"]
    for gpus in sizes:
        for name, preemptions in (("failures", 0.0), ("and preemption in 12 h", 1 / 12)):
            for every in (1, 10, None):
                fleet = with_costs(Fleet(gpus, every, preemptions), tflops)
                lines.append(row(fleet, hours, name))
    return "\n".join(lines)


def plot(path: Path, tflops: float, hours: float) -> None:
    """Work done twice over the rate of losses, with states and without."""
    from matplotlib.figure import Figure

    between = (1, 2, 4, 8, 16, 32, 64, 128)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for every, label in ((None, "no states: begin again"), (10, "a state every 10 steps"), (1, "after every step")):
        fleets = [with_costs(Fleet(200, every, 1 / mean), tflops) for mean in between]
        results = [simulate(fleet, hours) for fleet in fleets]
        axes.plot(between, [100 * one.wasted / one.worked for one in results], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="hours between losses of a GPU", ylabel="work done twice, %")
    axes.set_xticks(between, [str(mean) for mean in between])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained TFLOP/s of a GPU (assumed)")
    parser.add_argument("--hours", type=float, default=72.0)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    fleet = with_costs(Fleet(1), arguments.tflops)
    print(f"{LENGTH}, TTT-MLP, {NUM_STEPS} steps of {fleet.step:.1f} s, text and decoding {fleet.rest:.1f} s\n")
    print(table(SIZES, arguments.tflops, arguments.hours))
    if arguments.plot is not None:
        plot(arguments.plot, arguments.tflops, arguments.hours)


if __name__ == "__main__":
    main()
