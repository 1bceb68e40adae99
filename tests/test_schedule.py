"""The noise schedule and the guidance scales, against the recording of the public code and against what they claim."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from messages import GUIDANCE_SCALE, refused_with
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.sampler import sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Guidance

CONFIG = DiffusionConfig()
GOLDEN = load_file(Path(__file__).parent / "golden" / "sampler_dpmpp2m_sde_10.safetensors")


def test_schedule_matches_the_recording() -> None:
    schedule = make_schedule(CONFIG, 10)
    assert_array_equal(schedule.timesteps, GOLDEN["schedule.timestep"])
    assert_allclose(schedule.alpha_sqrt[:-1], GOLDEN["schedule.alpha_cumprod_sqrt"], rtol=0, atol=1e-6)
    assert_allclose(schedule.train_alpha_sqrt, GOLDEN["schedule.train_alpha_cumprod_sqrt"], rtol=0, atol=1e-6)


def test_fifty_steps_are_the_documented_timesteps() -> None:
    timesteps = make_schedule(CONFIG, 50).timesteps
    assert timesteps.dtype == np.int64
    assert [timesteps[0], timesteps[1], timesteps[-1]] == [999, 979, 19]


@pytest.mark.parametrize("steps", ["ttt-video", "cogvideox"])
@given(num_steps=st.integers(1, 1000), shift=st.floats(0.2, 5.0))
def test_levels_rise_from_exactly_0_to_exactly_1(
    steps: Literal["ttt-video", "cogvideox"], num_steps: int, shift: float
) -> None:
    schedule = make_schedule(DiffusionConfig(shift_scale=shift, sampling_steps=steps), num_steps)
    assert schedule.timesteps.shape == (num_steps,)
    assert schedule.alpha_sqrt.shape == (num_steps + 1,)
    assert schedule.alpha_sqrt[0] == 0.0
    assert schedule.alpha_sqrt[-1] == 1.0
    assert (np.diff(schedule.alpha_sqrt) > 0).all()
    assert (np.diff(schedule.timesteps) < 0).all()
    assert schedule.train_alpha_sqrt.shape == (1000,)
    assert schedule.train_alpha_sqrt[-1] == 0.0
    assert (np.diff(schedule.train_alpha_sqrt) < 0).all()


def test_zero_snr_keeps_the_cleanest_step() -> None:
    beta = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
    trained = np.sqrt(np.cumprod(1 - beta))
    schedule = make_schedule(CONFIG, 50)
    assert_allclose(schedule.alpha_sqrt[-2], trained[19], rtol=1e-12)
    assert_allclose(schedule.train_alpha_sqrt[0], trained[0], rtol=1e-12)


def peer(shift: float) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        beta_start=CONFIG.beta_start,
        beta_end=CONFIG.beta_end,
        beta_schedule="scaled_linear",
        snr_shift_scale=shift,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_levels_of_training_are_those_of_diffusers(shift: float) -> None:
    scheduler = peer(shift)
    scheduler.set_timesteps(50)
    schedule = make_schedule(DiffusionConfig(shift_scale=shift), 50)
    assert_allclose(schedule.train_alpha_sqrt**2, scheduler.alphas_cumprod.numpy(), atol=1e-12)
    assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())


def test_ddim_is_that_of_diffusers() -> None:
    """With as many steps as training had, both enforce ZeroSNR over the same steps."""
    scheduler = peer(1.0)
    scheduler.set_timesteps(1000)
    noise = np.random.default_rng(0).standard_normal((4, 16), dtype=np.float32)
    steps = sample(
        lambda x, timestep, scale: np.tanh(x),
        noise,
        make_schedule(CONFIG, 1000),
        np.ones(1000),
        "ddim",
        lambda: noise,
    )
    x = torch.from_numpy(noise)
    for timestep, step in zip(scheduler.timesteps, steps, strict=True):
        x = scheduler.step(torch.tanh(x), timestep, x).prev_sample
        if timestep > 0:  # where diffusers goes to the first of training's levels, and this on to none
            assert_allclose(step.latents, x.numpy(), atol=1e-4)


COGVIDEOX = DiffusionConfig(sampling_steps="cogvideox")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 16, 20, 30, 50, 64, 333, 500, 999, 1000])
def test_the_steps_of_cogvideox_are_those_of_diffusers(num_steps: int) -> None:
    scheduler = peer(1.0)
    scheduler.set_timesteps(num_steps)
    schedule = make_schedule(COGVIDEOX, num_steps)
    assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    assert_allclose(schedule.alpha_sqrt[:-1] ** 2, scheduler.alphas_cumprod[scheduler.timesteps].numpy(), atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_ddim_with_the_steps_of_cogvideox_is_that_of_diffusers(num_steps: int) -> None:
    """To the last step, where num_steps divides 1000. Else diffusers goes to levels that are not those of its steps."""
    scheduler = peer(1.0)
    scheduler.set_timesteps(num_steps)
    noise = np.random.default_rng(0).standard_normal((4, 16), dtype=np.float32)
    steps = sample(
        lambda x, timestep, scale: np.tanh(x),
        noise,
        make_schedule(COGVIDEOX, num_steps),
        np.ones(num_steps),
        "ddim",
        lambda: noise,
    )
    x = torch.from_numpy(noise)
    for timestep, step in zip(scheduler.timesteps, steps, strict=True):
        x = scheduler.step(torch.tanh(x), timestep, x).prev_sample
        assert_allclose(step.latents, x.numpy(), atol=1e-6)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    """At the steps that ZeroSNR keeps, the ratio alpha-bar / (1 - alpha-bar) falls by the factor of the shift."""

    def ratio(shift: float) -> float:
        alpha_bar = make_schedule(DiffusionConfig(shift_scale=shift), 50).alpha_sqrt[-2] ** 2
        return float(alpha_bar / (1 - alpha_bar))

    assert_allclose(ratio(1.0) / ratio(3.0), 3.0, rtol=1e-9)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_steps_that_training_had_not_are_refused(num_steps: int) -> None:
    with refused_with(ConfigError, "num_steps", num_steps, 1, 1000):
        make_schedule(CONFIG, num_steps)


def test_upstream_guidance_matches_the_recording() -> None:
    scales = guidance_scales("upstream", 6.0, GOLDEN["schedule.timestep"])
    assert_allclose(scales, GOLDEN["schedule.guidance_upstream"], rtol=1e-6)


@given(num_steps=st.integers(2, 1000), scale=st.floats(1.0, 100.0))
def test_dynamic_guidance_grows_from_1_to_the_scale(num_steps: int, scale: float) -> None:
    scales = guidance_scales("dynamic", scale, make_schedule(CONFIG, num_steps).timesteps)
    assert scales.shape == (num_steps,)
    assert scales[0] == 1.0
    assert_allclose(scales[-1], scale)
    assert (np.diff(scales) >= 0).all()


def test_dynamic_guidance_follows_the_documented_cosine() -> None:
    scales = guidance_scales("dynamic", 6.0, make_schedule(CONFIG, 50).timesteps)
    expected = [1 + 5 * (1 - np.cos(np.pi * (i / 49) ** 5)) / 2 for i in range(50)]
    assert_allclose(scales, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "constant"])
def test_a_single_step_is_guided_by_the_scale(kind: Guidance) -> None:
    assert guidance_scales(kind, 6.0, make_schedule(CONFIG, 1).timesteps) == [6.0]


def test_constant_guidance_is_the_scale_throughout() -> None:
    assert_array_equal(guidance_scales("constant", 4.5, make_schedule(CONFIG, 7).timesteps), [4.5] * 7)


@pytest.mark.parametrize("kind", ["dynamic", "upstream", "constant"])
@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0, 101.0, float("nan"), float("inf")])
def test_scales_out_of_range_are_refused(kind: Guidance, scale: float) -> None:
    with refused_with(ConfigError, GUIDANCE_SCALE, scale, 1, 100):
        guidance_scales(kind, scale, make_schedule(CONFIG, 4).timesteps)


def test_an_unknown_guidance_is_refused() -> None:
    with refused_with(ConfigError, "guidance", "rising", "dynamic", "upstream", "constant"):
        guidance_scales("rising", 6.0, make_schedule(CONFIG, 4).timesteps)  # type: ignore[arg-type]
