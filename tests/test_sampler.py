"""The denoising loop, against the recording of the public code and against oracles whose answer is known."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import refused_with
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.sampler import Array, Step, Velocities, guided, sample
from ttt_video_engine.runtime.schedule import Schedule, guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Sampler

SHAPE = (1, 5, 4, 3, 2)
GOLDEN = load_file(Path(__file__).parent / "golden" / "sampler_dpmpp2m_sde_10.safetensors")
ALL_SAMPLERS = pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m-sde"])


def stand_in(x: Array, timestep: int, text: Array) -> Array:
    """The network of the recording; its std is the unbiased one, over all of the text."""
    bias = np.float32(0.2 * np.cos(timestep / 100) + 0.1 * text.mean())
    return np.float32(0.6) * np.tanh(x) + bias + np.float32(0.05 * text.std(ddof=1)) * x


def stand_in_velocities(x: Array, timestep: int) -> tuple[Array, Array]:
    return stand_in(x, timestep, GOLDEN["input.neg_text"]), stand_in(x, timestep, GOLDEN["input.text"])


def oracle(clean: Array, schedule: Schedule) -> Velocities:
    """The exact velocity of a known clean latent, v = a·eps - s·x0 with eps = (x - a·x0)/s."""
    level = dict(zip(schedule.timesteps.tolist(), schedule.alpha_sqrt.tolist(), strict=False))

    def velocities(x: Array, timestep: int) -> tuple[Array, Array]:
        alpha = level[timestep]
        sigma = np.sqrt(1 - alpha**2)
        velocity = (alpha * (x - alpha * clean) / sigma - sigma * clean).astype(np.float32)
        return velocity, velocity

    return velocities


def normal(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


def no_noise() -> Array:
    raise AssertionError("this sampler draws no noise")


def run(sampler: Sampler, num_steps: int, velocities: Velocities = stand_in_velocities, seed: int = 0) -> list[Step]:
    schedule = make_schedule(DiffusionConfig(), num_steps)
    guidance = guidance_scales("dynamic", 6.0, schedule.timesteps)
    rng = np.random.default_rng(seed + 1)
    return list(
        sample(
            guided(velocities),
            normal(seed),
            schedule,
            guidance,
            sampler,
            lambda: rng.standard_normal(SHAPE, np.float32),
        )
    )


def test_every_step_matches_the_recording() -> None:
    schedule = make_schedule(DiffusionConfig(), 10)
    guidance = guidance_scales("upstream", 6.0, schedule.timesteps)
    noises = iter(GOLDEN["input.step_noise"])
    steps = list(
        sample(
            guided(stand_in_velocities), GOLDEN["input.noise"], schedule, guidance, "dpmpp-2m-sde", lambda: next(noises)
        )
    )
    assert_allclose([step.denoised for step in steps], GOLDEN["output.denoised"], rtol=0, atol=1e-5)
    assert_allclose([step.latents for step in steps], GOLDEN["output.x"], rtol=0, atol=1e-5)


@given(num_steps=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_ddim_recovers_what_an_exact_network_knows(num_steps: int, seed: int) -> None:
    clean = normal(seed + 7)
    steps = run("ddim", num_steps, oracle(clean, make_schedule(DiffusionConfig(), num_steps)), seed)
    for step in steps:
        assert_allclose(step.denoised, clean, rtol=0, atol=1e-3)
    assert_allclose(steps[-1].latents, clean, rtol=0, atol=1e-3)


def test_ddim_keeps_the_noise_that_an_exact_network_sees() -> None:
    """With x0 known, DDIM walks the line x = a·x0 + s·eps with the eps it began with."""
    clean, noise = normal(3), normal(0)
    schedule = make_schedule(DiffusionConfig(), 20)
    for step in run("ddim", 20, oracle(clean, schedule)):
        alpha = schedule.alpha_sqrt[step.index + 1]
        expected = alpha * clean + np.sqrt(1 - alpha**2) * noise
        assert_allclose(step.latents, expected, rtol=0, atol=1e-3)


def test_the_sde_keeps_the_noise_level_of_the_schedule() -> None:
    """With x0 = 0 known, what is left after each step is noise of standard deviation s', however it was mixed."""
    schedule = make_schedule(DiffusionConfig(), 12)
    shape = (1, 50, 40, 30, 2)
    rng = np.random.default_rng(0)

    def draw() -> Array:
        return rng.standard_normal(shape, np.float32)

    velocities = oracle(np.zeros(shape, np.float32), schedule)
    for step in sample(guided(velocities), draw(), schedule, np.ones(12), "dpmpp-2m-sde", draw):
        sigma = np.sqrt(1 - schedule.alpha_sqrt[step.index + 1] ** 2)
        assert_allclose(step.latents.std(), sigma, rtol=0, atol=0.01)


@ALL_SAMPLERS
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50, 1000])
def test_every_number_of_steps_stays_finite_and_ends_clean(sampler: Sampler, num_steps: int) -> None:
    with np.errstate(all="raise"):
        steps = run(sampler, num_steps)
    assert [step.index for step in steps] == list(range(num_steps))
    assert {step.num_steps for step in steps} == {num_steps}
    assert all(np.isfinite(step.latents).all() and step.latents.dtype == np.float32 for step in steps)
    assert all(step.denoised.dtype == np.float32 for step in steps)
    assert_array_equal(steps[-1].latents, steps[-1].denoised)


@ALL_SAMPLERS
def test_the_same_noise_gives_the_same_steps_and_is_left_as_it_was(sampler: Sampler) -> None:
    first, second = run(sampler, 6), run(sampler, 6)
    for a, b in zip(first, second, strict=True):
        assert_array_equal(a.latents, b.latents)
    noise = GOLDEN["input.noise"].copy()
    schedule = make_schedule(DiffusionConfig(), 3)
    list(sample(guided(stand_in_velocities), noise, schedule, np.ones(3), sampler, lambda: normal(1)))
    assert_array_equal(noise, GOLDEN["input.noise"])


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_noise_is_drawn_once_in_every_step_but_the_last_and_never_by_ddim(num_steps: int) -> None:
    schedule = make_schedule(DiffusionConfig(), num_steps)
    draws = iter(range(num_steps))
    after: list[int] = []

    def draw() -> Array:
        after.append(next(draws))
        return normal(1)

    counts = [
        len(after)
        for _ in sample(guided(stand_in_velocities), normal(0), schedule, np.ones(num_steps), "dpmpp-2m-sde", draw)
    ]
    assert counts == [*range(1, num_steps), num_steps - 1]
    list(sample(guided(stand_in_velocities), normal(0), schedule, np.ones(num_steps), "ddim", no_noise))


def test_guidance_leads_from_the_unconditional_to_the_conditional_prediction() -> None:
    schedule = make_schedule(DiffusionConfig(), 1)
    unconditional, conditional = normal(1), normal(2)

    def denoised(scale: float) -> Array:
        steps = sample(
            guided(lambda x, t: (unconditional, conditional)),
            normal(0),
            schedule,
            np.array([scale]),
            "ddim",
            no_noise,
        )
        return next(steps).denoised

    # The first step begins at a = 0, where x0 = -v.
    assert_allclose(denoised(0.0), -unconditional)
    assert_allclose(denoised(1.0), -conditional, rtol=0, atol=1e-6)
    assert_allclose(denoised(6.0), 5 * unconditional - 6 * conditional, rtol=0, atol=1e-5)


def test_steps_are_made_one_at_a_time() -> None:
    schedule = make_schedule(DiffusionConfig(), 4)
    seen: list[int] = []

    def velocities(x: Array, timestep: int) -> tuple[Array, Array]:
        seen.append(timestep)
        return x, x

    steps: Iterator[Step] = sample(guided(velocities), normal(0), schedule, np.ones(4), "ddim", no_noise)
    assert seen == []
    assert next(steps).timestep == 999
    assert seen == [999]


def test_settings_that_do_not_fit_are_refused() -> None:
    schedule = make_schedule(DiffusionConfig(), 4)
    with refused_with(ConfigError, "guidance", 3, 4):
        next(sample(guided(stand_in_velocities), normal(0), schedule, np.ones(3), "ddim", no_noise))
    with refused_with(ConfigError, "sampler", "euler", "ddim", "dpmpp-2m-sde"):
        next(sample(guided(stand_in_velocities), normal(0), schedule, np.ones(4), "euler", no_noise))  # type: ignore[arg-type]
