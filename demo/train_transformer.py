"""Trains text encoder and transformer: `python -m demo.train_transformer --output DIR`. The same command resumes.

A step depends on the seed, its number and the weights alone, so a run that was cut off goes on bit by bit.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.average import Average
from demo.command_line import output_folder
from demo.config import MODEL
from demo.data import make_batch
from demo.fast import use_fast_parts
from demo.files import load, save
from demo.model import new_model
from demo.noise import add_noise, alpha_table, draw_timesteps
from demo.optimise import Optimiser
from demo.stopping import StopRequest
from ttt_video_engine.runtime.config import ModelConfig

SEED = 0
_SAVE_SECONDS = 180


@dataclass(frozen=True)
class Stage:
    """Steps up to `until`. They take turns with `batches`, each (scenes of a clip, clips). `text_rate` is the share of
    its learning rate that the text encoder takes: T5 does not scale its attention, and so is easily taught too fast.
    Half of the timesteps are drawn from `high` on."""

    until: int
    batches: tuple[tuple[int, int], ...]
    text_rate: float = 0.3
    high: int = 850


STAGES = (
    Stage(480, ((1, 8),), text_rate=1.0, high=650),
    Stage(822, ((1, 4),), text_rate=1.0, high=650),  # T5's attention had begun to saturate
    Stage(1600, ((1, 4),), high=650),
    Stage(2181, ((3, 3),), high=650),
    Stage(3249, ((1, 8), (3, 3)), high=650),  # places and colours right; where the figure goes, not yet
    Stage(16000, ((1, 8), (3, 3))),  # one scene: what words mean; three: what earlier scenes named
    Stage(22000, ((6, 2), (3, 3))),
    Stage(24000, ((21, 1), (3, 3))),
    Stage(40000, ((1, 8), (3, 3), (6, 2))),
)


@dataclass(frozen=True)
class Log:
    """What a step tells: its timesteps and the loss at each."""

    step: int
    num_scenes: int
    timesteps: list[int]
    losses: list[float]
    norm: float


class Training:
    """The state of a run. Make it, `load` a checkpoint if there is one, then `advance` step by step."""

    def __init__(self, seed: int, stages: Sequence[Stage] = STAGES, config: ModelConfig = MODEL) -> None:
        self.seed, self.stages, self.num_done = seed, stages, 0
        self.model = new_model(seed, config)
        self.optimiser = Optimiser(self.model, stages[-1].until)
        self.average = Average(self.model)
        self._table = alpha_table()

    @property
    def finished(self) -> bool:
        return self.num_done >= self.stages[-1].until

    def advance(self) -> Log:
        """One step: a batch, its noise, the loss, the weights."""
        step = self.num_done
        stage = next(stage for stage in self.stages if step < stage.until)
        num_scenes, size = stage.batches[step % len(stage.batches)]
        batch = make_batch(self.seed, step, size, num_scenes)
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + step)
        timesteps = draw_timesteps(size, stage.high, generator)
        noised, velocity = add_noise(batch.latents, timesteps, self._table, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.model(noised, batch.ids, timesteps)
        losses = (predicted.float() - velocity).square().flatten(1).mean(1)
        losses.mean().backward()
        norm = self.optimiser.step(step, stage.text_rate)
        self.average.update(self.model, step)
        self.num_done += 1
        return Log(step, num_scenes, timesteps.tolist(), losses.tolist(), norm)

    def save(self, path: Path) -> None:
        """Replaces the checkpoint at `path` as a whole."""
        state = {
            "num_done": self.num_done,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.weights,
        }
        save(state, path)

    def load(self, path: Path) -> None:
        state = load(path)
        self.num_done = state["num_done"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.weights.update(state["average"])


def main() -> None:
    folder = output_folder(__doc__)
    checkpoint, log_file = folder / "transformer.pt", folder / "transformer.jsonl"
    torch.set_num_threads(1)
    use_fast_parts()
    training = Training(SEED)
    if checkpoint.is_file():
        training.load(checkpoint)
    saved, stop = time.monotonic(), StopRequest()
    with log_file.open("a") as log:
        while not (training.finished or stop.made):
            start = time.monotonic()
            told = training.advance()
            seconds = round(time.monotonic() - start, 2)
            line = {**told.__dict__, "losses": [round(loss, 4) for loss in told.losses], "seconds": seconds}
            print(json.dumps(line), file=log, flush=True)
            if told.step % 50 == 0:
                mean = sum(told.losses) / len(told.losses)
                print(f"step {told.step}: loss {mean:.3f}, norm {told.norm:.2f}, {seconds} s", flush=True)
            if time.monotonic() - saved > _SAVE_SECONDS or training.finished or stop.made:
                training.save(checkpoint)
                saved = time.monotonic()


if __name__ == "__main__":
    main()
