"""Noise for training: x = a·x0 + s·e with s = sqrt(1 − a²), and the velocity to predict, v = a·e − s·x0."""

import torch
from torch import Generator, Tensor

from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.schedule import make_schedule

_STEPS = DiffusionConfig().num_train_timesteps


def alpha_table() -> Tensor:
    """a of every timestep [1000], float32: 0 at the last, so sampling may start from noise alone."""
    return torch.from_numpy(make_schedule(DiffusionConfig(), _STEPS).train_alpha_sqrt).float()


def draw_timesteps(size: int, high: int, high_share: float, generator: Generator) -> Tensor:
    """Timesteps [size] int64, one from each of `size` equal shares of the distribution.

    `high_share` of it lies evenly at `high` or above, where the text decides what is seen; the rest is even over all.
    """
    share = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    anywhere = share / max(1 - high_share, 1e-9) * _STEPS
    above = high + (share - (1 - high_share)) / high_share * (_STEPS - high)
    return torch.where(share < 1 - high_share, anywhere, above).long().clamp(max=_STEPS - 1)


def add_noise(clean: Tensor, timesteps: Tensor, table: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Noised latents and their velocity, both of the shape of `clean` [B, …]."""
    noise = torch.randn(clean.shape, generator=generator)
    alpha = table[timesteps].view(-1, *[1] * (clean.dim() - 1))
    sigma = (1 - alpha**2).sqrt()
    return alpha * clean + sigma * noise, alpha * noise - sigma * clean
