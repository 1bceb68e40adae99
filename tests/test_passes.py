"""Fewer passes of the transformer: which steps do without, what comes of it, and that a render resumes from it."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import Run
from messages import names, refusal
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from stand_in import Arrays, StandInLoader, products, render, storyboard_file

from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import DiffusionConfig
from ttt_video_engine.runtime.events import Event, StepDone, StopRendering
from ttt_video_engine.runtime.passes import GuidedVelocity, Reusable
from ttt_video_engine.runtime.sampler import Array, guide, guided, sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import FAST, Sampler, Settings

SCHEDULE = make_schedule(DiffusionConfig(), 20)
LAST = int(SCHEDULE.timesteps[-1])
NOISE = np.random.default_rng(0).standard_normal((1, 5), dtype=np.float32)


class Branches:
    """Velocities that follow x smoothly, and how many prompts each call had."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, x: Array, timestep: int, guided: bool) -> Array:
        self.calls.append((timestep, 2 if guided else 1))
        positive = np.tanh(x) * np.float32(0.5) + np.float32(timestep / 2000)
        return np.concatenate([positive * np.float32(0.9), positive]) if guided else positive


def sampled(branches: Branches, scales: NDArray[np.float64] | None = None, threshold: float | None = None) -> Array:
    velocity = GuidedVelocity(branches, LAST, threshold)
    guidance = np.full(20, 3.0) if scales is None else scales
    *_, last = sample(velocity, NOISE, SCHEDULE, guidance, "ddim", lambda: NOISE)
    return last.latents


def test_the_negative_prompt_has_no_pass_where_the_scale_is_1() -> None:
    branches = Branches()
    scales = guidance_scales("constant", 3.0, SCHEDULE.timesteps, (0.0, 0.5))
    found = sampled(branches, scales)
    assert [count for _, count in branches.calls] == [2] * 10 + [1] * 10

    def both(x: Array, timestep: int) -> tuple[Array, Array]:
        velocities = Branches()(x, timestep, True)
        return velocities[:1], velocities[1:]

    *_, expected = sample(guided(both), NOISE, SCHEDULE, scales, "ddim", lambda: NOISE)
    assert_allclose(found, expected.latents, rtol=0, atol=1e-6)


def test_the_documented_guidance_begins_with_one_pass() -> None:
    branches = Branches()
    sampled(branches, guidance_scales("dynamic", 6.0, SCHEDULE.timesteps))
    assert [count for _, count in branches.calls] == [1] + [2] * 19


@pytest.mark.parametrize(
    ("interval", "num_guided"), [((0.0, 1.0), 20), ((0.5, 1.0), 10), ((0.0, 0.0), 1), ((0.4, 0.45), 1)]
)
def test_guidance_is_1_outside_its_interval(interval: tuple[float, float], num_guided: int) -> None:
    scales = guidance_scales("constant", 3.0, SCHEDULE.timesteps, interval)
    assert set(scales) <= {1.0, 3.0} and (scales == 3).sum() == num_guided


def test_steps_that_change_little_reuse_the_last_pass_as_the_paper_says() -> None:
    """Against the formulas of arXiv 2507.02860, written out for a whole run."""
    branches, threshold = Branches(), 0.2
    found = sampled(branches, threshold=threshold)
    ran = [timestep for timestep, _ in branches.calls]
    assert ran[:2] == list(SCHEDULE.timesteps[:2]) and ran[-1] == LAST
    assert 5 < len(ran) < 15

    fresh = Branches()
    inputs: list[Array] = []
    velocities: list[Array] = []
    expected_ran: list[int] = []
    state = {"k": 0.0, "deviation": 0.0, "pass": 0}

    def velocity(x: Array, timestep: int, scale: float) -> Array:
        index = len(inputs)
        if index >= 2:
            moved = np.abs(x - inputs[-1]).mean()
            state["deviation"] += state["k"] * moved / np.abs(velocities[-1][1:]).mean()
        reuse = index >= 2 and timestep != LAST and state["deviation"] < threshold
        if reuse:
            computed = int(state["pass"])
            both = x + velocities[computed] - inputs[computed]
        else:
            both = fresh(x, timestep, True)
            if index:
                state["k"] = np.abs(both[1:] - velocities[-1][1:]).mean() / np.abs(x - inputs[-1]).mean()
            state["deviation"], state["pass"] = 0.0, index
            expected_ran.append(timestep)
        inputs.append(x)
        velocities.append(both)
        return guide(both[:1], both[1:], scale)

    *_, expected = sample(velocity, NOISE, SCHEDULE, np.full(20, 3.0), "ddim", lambda: NOISE)
    assert ran == expected_ran
    assert_allclose(found, expected.latents, rtol=0, atol=1e-5)


def test_a_threshold_that_nothing_stays_below_is_no_cache() -> None:
    one, other = Branches(), Branches()
    assert_array_equal(sampled(one, threshold=1e-12), sampled(other))
    assert one.calls == other.calls


def test_a_step_that_needs_both_prompts_does_not_reuse_a_pass_of_one() -> None:
    branches = Branches()
    scales = np.concatenate([np.ones(10), np.full(10, 3.0)])
    sampled(branches, scales, threshold=0.5)
    assert (int(SCHEDULE.timesteps[10]), 2) in branches.calls


def test_what_is_reused_goes_on_from_what_was_kept() -> None:
    kept = Reusable(NOISE, np.concatenate([NOISE, NOISE * 2]), True, rate=1e-9)
    velocity = GuidedVelocity(Branches(), LAST, 0.1, kept)
    x = NOISE + np.float32(0.1)
    assert_allclose(velocity(x, 500, 3.0), x + NOISE + 3 * NOISE, rtol=0, atol=1e-6)
    assert velocity.num_passes == 0


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_render_with_fewer_passes_resumes_to_the_same_bits(
    shared_bundle: Path, tmp_path: Path, sampler: Sampler
) -> None:
    settings = Settings(num_steps=8, sampler=sampler, step_cache=1.5, guidance_interval=(0.2, 0.8))
    passes: list[int] = []

    def count(graph: str, number: int, outputs: Arrays) -> Arrays:
        if graph.startswith("transformer"):
            passes.append(len(outputs["velocity"]))
        return outputs

    loader = StandInLoader(open_bundle(shared_bundle), count)
    render(shared_bundle, tmp_path / "whole", settings=settings, loader=loader)

    def end(event: Event) -> None:
        if isinstance(event, StepDone):
            raise StopRendering

    for _ in range(9):
        render(shared_bundle, tmp_path / "cut", settings=settings, on_event=end)
    assert products(tmp_path / "cut/bear") == products(tmp_path / "whole/bear")
    told = [sidecar(tmp_path / name / "bear/video.json") for name in ("cut", "whole")]
    assert told[0]["passes"] == told[1]["passes"] == sum(passes) < 12


def test_the_options_are_those_of_the_settings(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    story = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    options = ("--num-steps", 4, "--guidance-interval", "0:0.5", "--step-cache", 0.2, "--stop-after", 1)
    code, _, _ = run("sample", story, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", *options)
    settings = sidecar(tmp_path / "out/bear/run.json")["settings"]
    assert (code, settings["guidance_interval"], settings["step_cache"]) == (0, [0.0, 0.5], 0.2)


def test_fast_gives_way_to_what_is_stated(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    story = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    num_steps = []
    for name, options in (("fast", ()), ("stated", ("--num-steps", 7))):
        fixed = ("--bundle", shared_bundle, "--output-dir", tmp_path / name, "--stop-after", 1, "--fast")
        assert run("sample", story, *fixed, *options)[0] == 0
        num_steps.append(sidecar(tmp_path / name / "bear/run.json")["settings"]["num_steps"])
    assert num_steps == [FAST["num_steps"], 7] and FAST["num_steps"] <= Settings().num_steps / 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("--guidance-interval", text) for text in ("0.5", "a:b", "0.6:0.5", "-1:1", "0:2", "nan:1")]
    + [("--step-cache", text) for text in ("0", "-1", "nan", "inf")],
)
def test_options_out_of_range_are_refused(
    run: Run, shared_bundle: Path, tmp_path: Path, option: str, value: str
) -> None:
    story = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])
    found = run("sample", story, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", f"{option}={value}")
    names(refusal(found), option.removeprefix("--").replace("-", " "))
    assert not (tmp_path / "out").exists()


def sidecar(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
