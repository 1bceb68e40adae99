"""Trains text encoder and transformer: `python -m demo.train_transformer --output DIR`. The same command resumes.

A new training begins with random weights, or, with `--start-from demo/checkpoint`, with the published ones.

A step depends on the seed, its number and the weights alone, so a run that was interrupted is resumed bit by bit, if
it has as many threads as before: one, or as many as OMP_NUM_THREADS says.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.average import Average
from demo.command_line import training_folders
from demo.config import MODEL
from demo.data import make_batch
from demo.fast import use_fast_parts
from demo.files import load, published, save
from demo.loop import train
from demo.model import new_model
from demo.noise import add_noise, alpha_table, draw_timesteps
from demo.optimise import Optimiser
from demo.rates import warm_up
from ttt_video_engine.runtime.config import ModelConfig

SEED = 0


@dataclass(frozen=True)
class Stage:
    """Steps up to `until`. They take turns with `batches`, each (scenes of a clip, clips). `text_rate` is the share of
    its learning rate that the text encoder takes: T5 does not scale its attention, and so is easily taught too fast.
    `high_share` of the timesteps are drawn from `high` on, the others from all. `rates` are the shares of the learning
    rates at the beginning of the stage and at its end."""

    until: int
    batches: tuple[tuple[int, int], ...]
    text_rate: float = 0.3
    high: int = 700
    high_share: float = 0.75
    rates: tuple[float, float] = (1.0, 1.0)
    figure_weight: float = 1.0
    """What an error where a figure is counts, in errors elsewhere. One figure differs from another in few latents."""


_LATE = ((3, 4), (6, 2), (3, 4), (1, 8), (3, 4), (6, 2), (3, 4), (6, 2), (3, 4), (1, 8), (3, 4), (21, 1))
"""Batches of the last stage: it takes turns with more than fit into a line of STAGES."""

STAGES = (
    Stage(480, ((1, 8),), text_rate=1.0, high=650, high_share=0.5),
    Stage(822, ((1, 4),), text_rate=1.0, high=650, high_share=0.5),  # T5's attention had begun to saturate
    Stage(1600, ((1, 4),), high=650, high_share=0.5),
    Stage(2181, ((3, 3),), high=650, high_share=0.5),
    Stage(3038, ((1, 8), (3, 3)), high=650, high_share=0.5),  # places and colours right; where the figure goes, not yet
    Stage(7250, ((1, 8), (3, 3))),  # one scene: what words mean; three: what earlier scenes named
    Stage(8368, ((1, 8), (3, 3)), high_share=0.6, rates=(1.0, 0.293)),  # published
    Stage(10978, ((1, 8), (3, 3)), high_share=0.6),
    # The word for the motion still changed nothing at any timestep: where noise hides all, only the text can tell it.
    Stage(12700, ((1, 8),), text_rate=1.0, high=900, high_share=1.0),  # so far at an even speed, from here on slowing
    Stage(14140, ((1, 8),), text_rate=1.0, high=900, high_share=1.0),  # then `demo.train_text`
    Stage(15150, ((1, 8),), high=850, high_share=0.9),
    Stage(16400, ((1, 8), (3, 3)), high=850, high_share=0.75),
    Stage(17600, ((1, 8), (3, 3)), high_share=0.6, rates=(1.0, 0.02)),  # published
    Stage(17850, ((1, 8), (3, 3)), high_share=0.6),
    Stage(19660, ((3, 3), (1, 8), (3, 3), (6, 2)), high_share=0.6, figure_weight=4),
    Stage(20450, ((3, 3), (1, 8), (3, 3), (6, 2), (21, 1)), high_share=0.6, rates=(1.0, 0.02), figure_weight=4),
    # At full rates the loss stays above that of the published weights: most of it is the optimiser's own noise.
    # The wrong word for the figure changes the loss most between timesteps 800 and 975, and hardly below 600.
    Stage(22900, ((3, 3), (1, 8), (3, 3), (6, 2)), high=780, high_share=0.8, rates=(0.4, 0.02), figure_weight=8),
    Stage(
        24200, ((3, 3), (1, 8), (3, 3), (6, 2)), high=780, high_share=0.8, rates=(0.35, 0.02), figure_weight=8
    ),  # published
    # More clips of three scenes a step, as the learning rates are low and what a later scene keeps is learned last.
    Stage(25700, _LATE, high=780, high_share=0.8, rates=(0.35, 0.02), figure_weight=8),  # published
)


@dataclass(frozen=True)
class Log:
    """What a step tells: its timesteps and the unweighted loss at each."""

    step: int
    num_scenes: int
    timesteps: list[int]
    losses: list[float]
    norm: float

    def __str__(self) -> str:
        return f"step {self.step}: loss {sum(self.losses) / len(self.losses):.3f}, norm {self.norm:.2f}"


class Training:
    """The state of a run. Make it, `load` a checkpoint if there is one, then `advance` step by step."""

    def __init__(self, seed: int, stages: Sequence[Stage] = STAGES, config: ModelConfig = MODEL) -> None:
        self.seed, self.stages = seed, stages
        self.num_done = self.first = 0
        self.model = new_model(seed, config)
        self.optimiser = Optimiser(self.model)
        self.average = Average(self.model)
        self._table = alpha_table()

    @property
    def finished(self) -> bool:
        return self.num_done >= self.stages[-1].until

    def advance(self) -> Log:
        """One step: a batch, its noise, the loss, the weights."""
        step = self.num_done
        begin, stage = self._stage(step)
        num_scenes, size = stage.batches[step % len(stage.batches)]
        batch = make_batch(self.seed, step, size, num_scenes)
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + step)
        timesteps = draw_timesteps(size, stage.high, stage.high_share, generator)
        noised, velocity = add_noise(batch.latents, timesteps, self._table, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.model(noised, batch.ids, timesteps)
        errors = (predicted.float() - velocity).square()
        losses = errors.detach().flatten(1).mean(1)
        (errors * torch.where(batch.figures, stage.figure_weight, 1.0)).mean().backward()
        before, after = stage.rates
        share = before + (after - before) * (step - begin) / (stage.until - begin)
        norm = self.optimiser.step(share * warm_up(step, self.first), stage.text_rate)
        self.average.update(self.model, step)
        self.num_done += 1
        return Log(step, num_scenes, timesteps.tolist(), [round(loss, 4) for loss in losses.tolist()], norm)

    def _stage(self, step: int) -> tuple[int, Stage]:
        """The stage of a step, and the step that it begins with."""
        begin = 0
        for stage in self.stages:
            if step < stage.until:
                return begin, stage
            begin = stage.until
        raise ValueError(f"step {step} is beyond the last stage")

    def save(self, path: Path) -> None:
        """Replaces the checkpoint at `path` as a whole."""
        state = {
            "num_done": self.num_done,
            "first": self.first,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.weights,
        }
        save(state, path)

    def load(self, path: Path) -> None:
        state = load(path)
        self.num_done, self.first = state["num_done"], state["first"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.weights.update(state["average"])

    def start_from(self, checkpoint: Path) -> None:
        """Takes published weights: the optimisers begin without a memory, so the learning rates rise anew."""
        for part, prefix in (("transformer", "transformer."), ("text_encoder", "text_encoder.t5.")):
            self.num_done, weights = published(checkpoint / part)
            self.model.load_state_dict({prefix + name: value for name, value in weights.items()}, strict=False)
        self.first = self.num_done
        self.average = Average(self.model)


def main() -> None:
    folders = training_folders(__doc__)
    # Not a thread for every core: beside other work, threads wait for each other.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    use_fast_parts()
    train(Training(SEED), folders, "transformer")


if __name__ == "__main__":
    main()
