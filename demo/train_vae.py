"""Trains the decoder for the fixed encoder: `python -m demo.train_vae --output DIR`. The same command resumes.

It learns from pieces of 17 frames, the first window of decoding and the second: crops first, then whole frames, because
the decoder's norms are over all of a window. A step depends on the seed, its number and the weights alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demo.average import Average
from demo.backgrounds import HEIGHT, WIDTH
from demo.command_line import training_folders
from demo.config import MODEL
from demo.encoder import LinearEncoder
from demo.files import load, published, save
from demo.loop import train
from demo.rates import rate_share
from demo.scenes import SCENE_FRAMES, render_part
from demo.story import random_script
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import VaeConfig

SEED = 1
_RATE = 2e-3
_FRAMES = 17
"""Frames of the first two windows: 9 and 8."""
_LATENT_NOISE = 0.08
"""Standard deviation of noise on the latents: the decoder must forgive what the transformer gets a little wrong."""


@dataclass(frozen=True)
class Stage:
    """Steps up to `until` on `size` crops of so many pixels."""

    until: int
    height: int
    width: int
    size: int


STAGES = (Stage(4000, 32, 32, 4), Stage(5000, HEIGHT, WIDTH, 1))


@dataclass(frozen=True)
class Log:
    step: int
    loss: float
    psnr: float
    """In decibels, over the colours' whole range."""

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4f}, {self.psnr:.1f} dB"


class Training:
    """The state of a run, as in `train_transformer`."""

    def __init__(self, seed: int, stages: Sequence[Stage] = STAGES, config: VaeConfig = MODEL.vae) -> None:
        self.seed, self.stages = seed, stages
        self.num_done = self.first = 0
        self.model = seeded(lambda: VaeDecoder(config), seed).requires_grad_(True)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = Average(self.model)
        self._encoder = LinearEncoder.load()

    @property
    def finished(self) -> bool:
        return self.num_done >= self.stages[-1].until

    def advance(self) -> Log:
        step = self.num_done
        stage = next(stage for stage in self.stages if step < stage.until)
        frames, latents = self._batch(step, stage)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = torch.cat(list(self.model.decode(latents)), dim=2).float()
        difference = decoded - frames
        squared = difference.square().mean()
        loss = squared + 0.2 * difference.abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = _RATE * rate_share(step, self.stages[-1].until, self.first)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.average.update(self.model, step)
        self.num_done += 1
        return Log(step, loss.item(), 10 * math.log10(4 / squared.item()))

    def _batch(self, step: int, stage: Stage) -> tuple[Tensor, Tensor]:
        """Frames [B, 3, 17, h, w] in −1 … 1 and latents [B, 16, 5, h/8, w/8] of random pieces of clips."""
        rng = np.random.default_rng([self.seed, step])
        pieces, codes = [], []
        for _ in range(stage.size):
            script = random_script(self.seed, int(rng.integers(1 << 40)), 3)
            frames = render_part(script, int(rng.integers(3 * SCENE_FRAMES + 2 - _FRAMES)), _FRAMES)
            top = 8 * int(rng.integers((HEIGHT - stage.height) // 8 + 1))
            left = 8 * int(rng.integers((WIDTH - stage.width) // 8 + 1))
            piece = frames[:, top : top + stage.height, left : left + stage.width]
            latents = self._encoder.encode(piece)
            codes.append(latents + _LATENT_NOISE * rng.standard_normal(latents.shape, dtype=np.float32))
            pieces.append(piece.astype(np.float32) / 127.5 - 1)
        return (
            torch.from_numpy(np.stack(pieces)).permute(0, 4, 1, 2, 3).contiguous(),
            torch.from_numpy(np.stack(codes)).permute(0, 2, 1, 3, 4).contiguous(),
        )

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
        """As in `train_transformer`."""
        self.num_done, weights = published(checkpoint / "vae")
        self.first = self.num_done
        self.model.load_state_dict({name.removeprefix("decoder."): value for name, value in weights.items()})
        self.average = Average(self.model)


def main() -> None:
    folders = training_folders(__doc__)
    torch.set_num_threads(1)
    train(Training(SEED), folders, "vae")


if __name__ == "__main__":
    main()
