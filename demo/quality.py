r"""What settings cost, and what they do to the videos of held-out storyboards:

    python -m demo.quality --bundle bundles/demo --int8 bundles/demo-int8 --without-ttt bundles/demo-without-ttt \
        --output output/quality

prints a table in Markdown and writes its numbers to quality.json. Every row is a queue of `ttt-video sample`, so a run
that was ended is resumed by the same command, and rows that are done are only judged. Two processes, each on a core of
its own, share the videos of a row.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from demo.evaluate import done_videos, frames_of, judged
from demo.held_out import held_out
from demo.judge import judge
from demo.scenes import Frames
from ttt_video_engine.runtime.render_folder import SIDECAR

_ROOT = Path(__file__).parents[1]
SCORES = ("background", "figure", "colour", "direction", "carried")
"""Of a judge's, the columns of the table."""
_PROCESSES = 2
_STEPS = 50
"""Of the videos that PSNR compares with."""
_FEWER = 10
"""Steps of the rows that vary something else."""

BundleName = Literal["trained", "without-ttt", "int8"]


@dataclass(frozen=True)
class Row:
    """One line of the table: videos of `num_scenes` scenes, rendered in `num_steps` with some options of `sample`, or
    by PyTorch with the transformer in `half` precision."""

    name: str
    options: tuple[str, ...] = ()
    num_steps: int = _FEWER
    num_scenes: int = 3
    bundle: BundleName = "trained"
    half: str = ""

    @property
    def folder(self) -> str:
        kind = (str(self.num_scenes), self.bundle, self.half or "onnx", str(self.num_steps))
        return "_".join((*kind, *self.options)).replace(":", "-")

    @property
    def command(self) -> tuple[str, ...]:
        """What renders storyboards; without files and bundle."""
        start = ("-m", "demo.half", self.half) if self.half else ("cli.py", "sample")
        return (*start, "--num-steps", str(self.num_steps), *self.options)


WITH_AND_WITHOUT: tuple[tuple[str, BundleName], ...] = (("with TTT", "trained"), ("without TTT", "without-ttt"))
BASE = Row(f"{_STEPS} steps", num_steps=_STEPS)
ROWS = (
    BASE,
    *(Row(f"{steps} steps", num_steps=steps) for steps in (20, _FEWER)),
    Row("without TTT", bundle="without-ttt"),
    *(
        Row(f"{num_scenes} scenes, {name}", num_scenes=num_scenes, bundle=bundle)
        for num_scenes in (6, 21)
        for name, bundle in WITH_AND_WITHOUT
    ),
    Row("guided in 0:0.5", ("--guidance-interval", "0:0.5")),
    Row("20 steps, step cache 0.1", ("--step-cache", "0.1"), num_steps=20),
    *(Row(f"guidance scale {scale}", ("--guidance-scale", str(scale))) for scale in (1, 6)),
    *(Row(f"{kind}, scale 6", ("--guidance", kind, "--guidance-scale", "6")) for kind in ("dynamic", "upstream")),
    Row("DPM-Solver++(2M) SDE", ("--sampler", "dpmpp-2m-sde")),
    Row("a negative prompt", ("--negative-prompt", "A figure in the desert at night.")),
    Row("30 steps", num_steps=30),
    Row("int8", bundle="int8"),
    *(Row(f"{dtype}, in PyTorch", half=dtype) for dtype in ("bfloat16", "float16")),
)


def psnr(frames: Frames, reference: Frames) -> float:
    """In decibels, over 8 bits; infinite for equal frames."""
    error = np.square(frames.astype(np.float32) - reference.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@dataclass(frozen=True)
class Result:
    """A row's means over its videos: passes of the transformer, seconds of denoising (a median), PSNR in dB to the
    videos of `BASE`, None where there are none to compare with, and shares of scenes."""

    row: Row
    videos: int
    passes: float
    seconds: float
    psnr: float | None
    scores: dict[str, float]

    @property
    def markdown(self) -> str:
        near = "–" if self.psnr is None else f"{self.psnr:.1f}"
        shares = (f"{share:.0%}" for share in self.scores.values())
        cells = (self.row.name, str(self.videos), f"{self.passes:.0f}", f"{self.seconds:.1f}", near, *shares)
        return "| " + " | ".join(cells) + " |"


def _only_on(core: int) -> Callable[[], None]:
    """A process computes with a thread for every core that it may run on."""
    return lambda: os.sched_setaffinity(0, {core})


def render(row: Row, bundle: Path, output: Path, count: int) -> list[Path]:
    """Renders what is not done yet of a row; its videos."""
    storyboards = output / f"judge-{row.num_scenes}.jsonl"
    storyboards.write_bytes(held_out(storyboards.stem, count))
    folder = output / row.folder
    files = (str(storyboards.resolve()), "--bundle", str(bundle.resolve()), "--output-dir", str(folder.resolve()))
    shards = [
        (sys.executable, *row.command, *files, "--shard", f"{part + 1}/{_PROCESSES}") for part in range(_PROCESSES)
    ]
    environment, cores = {**os.environ, "OMP_NUM_THREADS": "1"}, sorted(os.sched_getaffinity(0))
    with (output / f"{row.folder}.log").open("w") as log:
        running = [
            subprocess.Popen(shard, cwd=_ROOT, env=environment, stdout=log, stderr=log, preexec_fn=_only_on(core))
            for shard, core in zip(shards, itertools.cycle(cores), strict=False)
        ]
        if any([process.wait() for process in running]):
            raise SystemExit(f"{row.name}: rendering failed; see {log.name}")
    return done_videos(folder)[:count]


def measured(row: Row, videos: list[Path], reference: Path) -> Result:
    """What the videos of a row cost and show; `reference` is the folder of those of 50 steps."""
    sidecars = [msgspec.json.decode((video / SIDECAR).read_bytes()) for video in videos]
    pairs = [(video, reference / video.name) for video in videos if row.num_scenes == BASE.num_scenes and row != BASE]
    scores = judge(judged(videos))
    return Result(
        row,
        len(videos),
        float(np.mean([sidecar["passes"] for sidecar in sidecars])),
        float(np.median([sidecar["seconds"]["denoise"] for sidecar in sidecars])),
        float(np.mean([psnr(*map(frames_of, pair)) for pair in pairs])) if pairs else None,
        {name: getattr(scores, name) for name in SCORES},
    )


def table(rows: Iterable[Row], bundles: dict[BundleName, Path], output: Path, count: int) -> Iterator[Result]:
    """Renders and prints row by row, and gives the results."""
    head = ("settings", "videos", "passes", "seconds", "PSNR", *SCORES)
    print("| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1), flush=True)
    for row in rows:
        # A clip of 21 scenes costs as much as seven of three.
        videos = render(row, bundles[row.bundle], output, max(1, count * 3 // row.num_scenes))
        result = measured(row, videos, output / BASE.folder)
        print(result.markdown, flush=True)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--without-ttt", type=Path, required=True, help="the same, its gates closed")
    parser.add_argument("--int8", type=Path, required=True, help="the same, exported with --quantize int8")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50, help="storyboards of three scenes")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    bundles: dict[BundleName, Path] = {
        "trained": arguments.bundle,
        "without-ttt": arguments.without_ttt,
        "int8": arguments.int8,
    }
    results = []
    for result in table(ROWS, bundles, arguments.output, arguments.count):
        results.append(result)
        (arguments.output / "quality.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))


if __name__ == "__main__":
    main()
