"""The denoising loop: noise in, every step out.

In all formulas a = sqrt(alpha-bar) is the share of signal, s = sqrt(1 - a^2) the share of noise, and a prime marks
the level that a step ends at. Coefficients are float64 scalars, arrays float32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.schedule import Schedule
from ttt_video_engine.runtime.settings import Sampler

Array = NDArray[np.float32]
Velocities = Callable[[Array, int], tuple[Array, Array]]
"""(x, timestep) → (unconditional v, conditional v), all of the shape of x."""
Velocity = Callable[[Array, int, float], Array]
"""(x, timestep, guidance scale) → guided v of the shape of x."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step done, of `num_steps`. The arrays are the sampler's own: read them, or copy them to change them."""

    index: int
    num_steps: int
    timestep: int
    guidance: float
    latents: Array
    """x after the step; after the last step the result."""
    denoised: Array
    """The clean latent as this step predicts it."""
    velocity: Array | None = None
    """What the model predicts, with guidance; None in a step read from a file, as the next does not depend on it."""


@dataclass(frozen=True)
class Update:
    """A step as a sum: x' = x·latents + denoised·x0 + previous·x0 of the step before + noise·fresh noise."""

    latents: float
    denoised: float
    previous: float = 0.0
    noise: float = 0.0


def sample(
    predict: Velocity,
    start: Array | Step,
    schedule: Schedule,
    guidance: NDArray[np.float64],
    sampler: Sampler,
    draw_noise: Callable[[], Array],
) -> Iterator[Step]:
    """Yields every step from `start`, of any shape, to the clean latent of the same shape.

    `start` is the noise, or a step done before: then the steps after it are yielded, bit for bit as if there had been
    no pause, given that `draw_noise` continues where it stopped.

    `guidance` is one scale per step. `draw_noise` gives standard normal noise of the same shape; "ddim" never calls it,
    "dpmpp-2m-sde" calls it once in every step but the last. Raises ConfigError, at the first step, for an unknown
    sampler or a guidance of the wrong length.
    """
    if sampler not in get_args(Sampler):
        raise ConfigError(f"sampler is {sampler!r}: must be one of {', '.join(get_args(Sampler))}")
    num_steps = len(schedule.timesteps)
    if len(guidance) != num_steps:
        raise ConfigError(f"guidance has {len(guidance)} scales: must have one for each of the {num_steps} steps")
    done = start.index + 1 if isinstance(start, Step) else 0
    x = (start.latents if isinstance(start, Step) else start).astype(np.float32)
    previous = start.denoised if isinstance(start, Step) else None
    for index in range(done, num_steps):
        timestep, scale = int(schedule.timesteps[index]), float(guidance[index])
        velocity = predict(x, timestep, scale)
        denoised = _denoise(x, velocity, _denoising_alpha(schedule, index, sampler))
        update = _ddim(schedule, index) if sampler == "ddim" else _dpmpp_2m_sde(schedule, index)
        x = update.latents * x + update.denoised * denoised
        if update.previous and previous is not None:
            x += update.previous * previous
        if update.noise:
            x += update.noise * draw_noise()
        previous = denoised
        yield Step(index, num_steps, timestep, scale, x, denoised, velocity)


def guide(unconditional: Array, conditional: Array, scale: float) -> Array:
    """Classifier-free guidance (arXiv 2207.12598): from the unconditional v through the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def guided(velocities: Velocities) -> Velocity:
    """For `sample`, from what predicts both velocities in every step."""
    return lambda x, timestep, scale: guide(*velocities(x, timestep), scale)


def _denoise(x: Array, velocity: Array, alpha: float) -> Array:
    """x0 = a·x - s·v (arXiv 2202.00512, section 4). Linear with weights that do not depend on the prompt, so guiding v,
    as `guide` does, is guiding x0."""
    return (alpha * x - _sigma(alpha) * velocity).astype(np.float32, copy=False)


def _denoising_alpha(schedule: Schedule, index: int, sampler: Sampler) -> float:
    """The a that turns v into x0.

    The public code, whose sampler "dpmpp-2m-sde" is, takes the nearest entry of the training table here and the exact
    value in the update. DDIM stays with the one exact value: then x0 and the noise it implies make up x again.
    """
    alpha = float(schedule.alpha_sqrt[index])
    if sampler == "ddim":
        return alpha
    table = schedule.train_alpha_sqrt
    return float(table[np.argmin(np.abs(table - alpha))])


def _ddim(schedule: Schedule, index: int) -> Update:
    """DDIM without noise (arXiv 2010.02502, eq. 12 with sigma 0): x' = a'·x0 + s'·(x - a·x0)/s.

    s is never 0, as only the level after the last step is clean; there s' = 0 and a' = 1, and x' is x0 itself.
    """
    alpha, alpha_next = _levels(schedule, index)
    ratio = _sigma(alpha_next) / _sigma(alpha)
    return Update(latents=ratio, denoised=alpha_next - alpha * ratio)


def _dpmpp_2m_sde(schedule: Schedule, index: int) -> Update:
    """DPM-Solver++(2M), the SDE form (arXiv 2211.01095, section 6): with l = ln(a/s), h = l' - l and r = h_last / h,

    x' = (s'/s)·e^-h·x + a'·(1 - e^-2h)·((1 + 1/2r)·x0 - 1/2r·x0_previous) + s'·sqrt(1 - e^-2h)·noise.

    The first step begins at a = 0, l = -inf, and the last one ends at s' = 0, l' = +inf. Nothing here subtracts
    infinities: e^-h = (a·s')/(a'·s) is 0 at both ends, so the first step is a'·x0 + s'·noise and the last is x0.
    """
    alpha, alpha_next = _levels(schedule, index)
    sigma, sigma_next = _sigma(alpha), _sigma(alpha_next)
    decay = (alpha * sigma_next) / (alpha_next * sigma)
    gain = alpha_next * (1 - decay**2)
    history = _history(schedule, index)
    return Update(
        latents=sigma_next / sigma * decay,
        denoised=gain * (1 + history),
        previous=-gain * history,
        noise=sigma_next * math.sqrt(1 - decay**2),
    )


def _history(schedule: Schedule, index: int) -> float:
    """1/2r = h / (2·h_last), the weight of the last change of x0.

    0 on the first step, which has no step before it; on the second, whose h_last is infinite; and on the last, which
    returns x0 as it is.
    """
    if index < 2 or index == len(schedule.timesteps) - 1:
        return 0.0
    before, now, after = (_log_snr(float(alpha)) for alpha in schedule.alpha_sqrt[index - 1 : index + 2])
    return (after - now) / (2 * (now - before))


def _levels(schedule: Schedule, index: int) -> tuple[float, float]:
    return float(schedule.alpha_sqrt[index]), float(schedule.alpha_sqrt[index + 1])


def _sigma(alpha: float) -> float:
    return math.sqrt(1 - alpha**2)


def _log_snr(alpha: float) -> float:
    """Half the log of the signal-to-noise ratio: ln(a/s)."""
    return math.log(alpha / _sigma(alpha))
