"""Noise levels and guidance scales of all denoising steps, computed before the first step."""

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.settings import Guidance

GUIDANCE_EXPONENT = 5
MAX_GUIDANCE_SCALE = 100.0


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of n denoising steps, noisiest first.

    alpha_sqrt is the square root of alpha-bar, the share of signal: 0 is pure noise, 1 is the clean latent. Both
    tables are rescaled to zero terminal SNR, see `make_schedule`.
    """

    timesteps: NDArray[np.int64]
    """[n], input of the transformer."""
    alpha_sqrt: NDArray[np.float64]
    """[n + 1], strictly increasing from exactly 0 to exactly 1, the clean latent after the last step."""
    train_alpha_sqrt: NDArray[np.float64]
    """[num_train_timesteps], decreasing to exactly 0, indexed by timestep."""


def make_schedule(config: DiffusionConfig, num_steps: int) -> Schedule:
    """The schedule of n = `num_steps` evenly spaced steps, of T in training. Raises ConfigError where n > T.

    "ttt-video": timestep i is T-1 - i (T-1)/n without its fraction. Zero terminal SNR is enforced over the n levels, so
    they differ slightly from those of the training table. "cogvideox": timestep i is T - i T/n, rounded, less 1
    ("trailing" spacing, arXiv 2305.08891, table 2), and its level is that of the training table.
    """
    num_train = config.num_train_timesteps
    if not 1 <= num_steps <= num_train:
        raise ConfigError(f"num_steps is {num_steps!r}: must lie in 1 … {num_train}, the steps of training")
    alpha_sqrt = _train_alpha_sqrt(config)
    table = _zero_terminal_snr(alpha_sqrt)
    if config.sampling_steps == "cogvideox":
        timesteps = np.round(num_train * np.arange(num_steps, 0, -1) / num_steps).astype(np.int64) - 1
        sampled = table[timesteps]
    else:
        timesteps = np.linspace(num_train - 1, 0, num_steps, endpoint=False).astype(np.int64)
        sampled = _zero_terminal_snr(alpha_sqrt[timesteps[::-1]])[::-1]
    return Schedule(timesteps, np.append(sampled, 1.0), table)


def guidance_scales(
    kind: Guidance,
    scale: float,
    timesteps: NDArray[np.int64],
    interval: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """Guidance scale of each step, float64 [n]: 0 is the unconditional prediction, 1 is the conditional one.

    "dynamic" grows from 1 to `scale` along 1 + (scale - 1) (1 - cos(pi p^5)) / 2 with p the progress from 0 to 1, as
    the documentation of TTT-Video describes (dynamic guidance of CogVideoX, arXiv 2408.06072). "upstream" is what its
    code evaluates, and diffusers for CogVideoX with `use_dynamic_cfg`: 1 + scale (1 - cos(pi ((n - t) / n)^5)) / 2 with
    t the timestep and n the number of steps, which oscillates between 1 and 1 + scale. "constant" is `scale` in every
    step.

    Outside `interval`, two values of the progress, the scale is 1 (limited interval guidance, arXiv 2404.07724).

    Raises ConfigError unless 1 <= scale <= 100: below 1 the prompt is weakened, very large scales overflow the latents;
    and unless the interval lies in 0 … 1.
    """
    if not 1 <= scale <= MAX_GUIDANCE_SCALE:
        raise ConfigError(f"guidance scale is {scale!r}: must lie in 1 … {MAX_GUIDANCE_SCALE:g}")
    low, high = interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval is {low:g}:{high:g}: must be LO:HI with 0 <= LO <= HI <= 1")
    num_steps = len(timesteps)
    # A single step counts as the last, which determines the video.
    progress = np.linspace(0.0, 1.0, num_steps) if num_steps > 1 else np.ones(1)
    scales = _scales_everywhere(kind, scale, timesteps, progress)
    return np.where((low <= progress) & (progress <= high), scales, 1.0)


def _scales_everywhere(
    kind: Guidance, scale: float, timesteps: NDArray[np.int64], progress: NDArray[np.float64]
) -> NDArray[np.float64]:
    if kind == "constant":
        return np.full(len(timesteps), scale, dtype=np.float64)
    if kind == "dynamic":
        return 1 + (scale - 1) * _cosine_ramp(progress)
    if kind == "upstream":
        return 1 + scale * _cosine_ramp((len(timesteps) - timesteps) / len(timesteps))
    raise ConfigError(f"guidance is {kind!r}: must be one of {', '.join(get_args(Guidance))}")


def _cosine_ramp(progress: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 - np.cos(math.pi * progress**GUIDANCE_EXPONENT)) / 2


def _train_alpha_sqrt(config: DiffusionConfig) -> NDArray[np.float64]:
    """[num_train_timesteps], as in training: beta linear in its square root (arXiv 2112.10752), then SNR is shifted."""
    roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps)
    alpha_bar = np.cumprod(1 - roots**2)
    shift = config.shift_scale
    return np.sqrt(alpha_bar / (shift + (1 - shift) * alpha_bar))


def _zero_terminal_snr(alpha_sqrt: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shifts decreasing values so that the last is 0, and scales them so that the first stays (arXiv 2305.08891,
    algorithm 1)."""
    first, last = float(alpha_sqrt[0]), float(alpha_sqrt[-1])
    # For a single value the scale would be 0 / 0. The result is 0: sampling starts from pure noise.
    scale = first / (first - last) if first > last else 0.0
    return (alpha_sqrt - last) * scale
