"""The simulation of a fleet."""

from dataclasses import replace

import pytest

from benchmarks.fleet import NUM_STEPS, Fleet, simulate

FLEET = Fleet(gpus=20, step=40.0, rest=20.0, failures=1e-9, slow_share=0.0)
VIDEO = NUM_STEPS * FLEET.step + FLEET.rest
"""Seconds of one."""


def test_a_fleet_that_loses_nothing_renders_what_its_time_is_enough_for() -> None:
    hours = 10 * VIDEO / 3600 + 0.01
    result = simulate(FLEET, hours)
    assert (result.videos, result.losses, result.wasted) == (20 * 10, 0, 0)
    assert result.stored == result.videos * (FLEET.video + NUM_STEPS * FLEET.state)


def test_slow_gpus_render_less() -> None:
    hours = 12 * VIDEO / 3600 + 0.01
    assert simulate(replace(FLEET, slow_share=0.5, slow_factor=1.5), hours).videos == 10 * 12 + 10 * 8


def test_losses_are_as_many_as_the_rate_says() -> None:
    result = simulate(replace(FLEET, preemptions=0.1, replacement=0.0), 500)
    assert result.losses == pytest.approx(20 * 500 * 0.1, rel=0.1)


def test_a_loss_costs_half_of_what_lies_between_two_states() -> None:
    often = replace(FLEET, preemptions=0.25)
    each, tenth, none = (simulate(replace(often, checkpoint_every=every), 1000) for every in (1, 10, None))
    assert each.wasted / each.losses == pytest.approx(FLEET.step / 2, rel=0.05)
    assert tenth.wasted / tenth.losses == pytest.approx(10 * FLEET.step / 2, rel=0.05)
    assert none.wasted / none.losses > 0.4 * VIDEO
    assert each.videos > tenth.videos > none.videos
    for result, states in ((each, NUM_STEPS), (tenth, NUM_STEPS // 10), (none, 0)):
        assert result.stored / result.videos == pytest.approx(FLEET.video + states * FLEET.state, rel=0.01)


def test_the_same_seed_gives_the_same() -> None:
    often = replace(FLEET, preemptions=0.25)
    assert simulate(often, 100) == simulate(often, 100) != simulate(often, 100, seed=1)
