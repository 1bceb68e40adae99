"""Guided velocities with as few passes of the transformer as the settings allow.

A pass is one prompt, positive or negative, at one timestep. Without guidance, at a scale of 1, the negative prompt has
no influence and no pass. With a threshold, steps that would change little reuse the last pass: EasyCache
(arXiv 2507.02860). With x_n the latents that step n begins with, v_n its velocity and i the last step with a pass,

    v_n ≈ x_n + (v_i − x_i)   while   E_n = sum over m = i+1 … n of k·|x_m − x_(m−1)| / |v_(m−1)|   stays below it,

where k = |v_i − v_(i−1)| / |x_i − x_(i−1)| says how fast velocities follow latents. |…| is the mean of absolute values,
over the positive prompt alone. The first two steps, which k needs, and the last one always have a pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.sampler import Array, guide
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Settings

RunBranches = Callable[[Array, int, bool], Array]
"""(x [1, …], timestep, whether guided) → velocities [2, …], negative first, or [1, …], the positive one."""


@dataclass(frozen=True, eq=False)
class Reusable:
    """What a step leaves for the next one; a render resumes from it."""

    latents: Array
    """x that the step began with, [1, …]."""
    change: Array
    """v − x of the last pass, [2, …], negative prompt first; zeros for the negative one of a pass without guidance."""
    guided: bool
    """Whether the last pass had both prompts."""
    rate: float | None = None
    """k, once two steps are done."""
    deviation: float = 0.0
    """E, since the last pass."""

    @property
    def velocity(self) -> Array:
        """That of the positive prompt, [1, …]."""
        return self.latents + self.change[1:]


def check_steps(settings: Settings, diffusion: DiffusionConfig) -> None:
    """Raises ConfigError where the settings are out of the range of what steps can be made with."""
    schedule = make_schedule(diffusion, settings.num_steps)
    guidance_scales(settings.guidance, settings.guidance_scale, schedule.timesteps, settings.guidance_interval)
    threshold = settings.step_cache
    if threshold is not None and not 0 < threshold < math.inf:  # NaN is not, either
        raise ConfigError(f"step cache is {threshold:g}: must be a deviation above 0, such as 0.05")


class GuidedVelocity:
    """(x [1, …], timestep, guidance scale) → guided velocity [1, …], as `sample` takes it, step after step.

    `threshold` None is a pass in every step. `reusable` is what the step before left, None at the first one.
    `num_passes` counts those of the last call.
    """

    def __init__(
        self, run: RunBranches, last_timestep: int, threshold: float | None, reusable: Reusable | None = None
    ) -> None:
        self._run, self._last_timestep, self._threshold = run, last_timestep, threshold
        self.reusable, self.num_passes = reusable, 0

    def __call__(self, x: Array, timestep: int, scale: float) -> Array:
        guided = scale != 1
        if self._threshold is None:
            return _guided(self._pass(x, timestep, guided), scale)
        if self._reuse(x, timestep, guided, self._threshold):
            assert self.reusable is not None
            return _guided(x + self.reusable.change[0 if guided else 1 :], scale)
        velocities = self._pass(x, timestep, guided)
        self._remember(x, velocities)
        return _guided(velocities, scale)

    def _pass(self, x: Array, timestep: int, guided: bool) -> Array:
        self.num_passes = 2 if guided else 1
        return self._run(x, timestep, guided)

    def _reuse(self, x: Array, timestep: int, guided: bool, threshold: float) -> bool:
        """Whether step can do without a pass; then `reusable` is brought up to it."""
        last = self.reusable
        if last is None or last.rate is None or timestep == self._last_timestep or (guided and not last.guided):
            return False
        deviation = last.deviation + last.rate * _mean(x - last.latents) / _mean(last.velocity)
        if deviation >= threshold:
            return False
        self.reusable = Reusable(x, last.change, last.guided, last.rate, deviation)
        self.num_passes = 0
        return True

    def _remember(self, x: Array, velocities: Array) -> None:
        last, change = self.reusable, velocities - x
        guided = len(change) == 2
        rate = None if last is None else _mean(velocities[-1:] - last.velocity) / _mean(x - last.latents)
        self.reusable = Reusable(x, change if guided else np.concatenate([np.zeros_like(x), change]), guided, rate)


def _guided(velocities: Array, scale: float) -> Array:
    return velocities if len(velocities) == 1 else guide(velocities[:1], velocities[1:], scale)


def _mean(x: Array) -> float:
    return float(np.abs(x).mean())
