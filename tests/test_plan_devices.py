"""What `plan --devices` says of a video that several devices share."""

from collections.abc import Callable

import pytest
from messages import names, refusal
from test_plan import planned

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("devices", "sent", "speedup"), [(2, 544e9, 1.90), (4, 408e9, 3.71), (8, 238e9, 7.34)], ids=("2", "4", "8")
)
def test_a_video_over_devices(devices: int, sent: float, speedup: float, run: Run) -> None:
    """12 tensors [L, D] a layer, of which each device sends (N − 1)/N²; the rest is less than half a percent."""
    options = ("--preset", "5B", "--ttt", "mlp", "--length", "63s", "--dtype", "bfloat16")
    alone = planned(run, "plan", *options)
    found = planned(run, "plan", *options, "--devices", devices, "--interconnect", 450)
    needs = found["devices"]
    assert {**alone, "devices": needs, "ram_here": found["ram_here"]} == found
    assert sent < needs["bytes_sent"] < 1.005 * sent
    assert needs["flops"] == alone["flops_per_step"] // devices
    assert needs["serial_mini_batches"] == 2 * 2 * 42 * 351_168 // 64
    assert needs["exchange_seconds"] == pytest.approx(needs["bytes_sent"] / 450e9)
    assert needs["step_seconds"] == pytest.approx(needs["flops"] / 400e12 + needs["exchange_seconds"])
    assert needs["speedup"] == pytest.approx(speedup, abs=0.01)
    whole = alone["components"]["transformer"]["gpu"]
    assert needs["weights"] == whole["weights"] < needs["memory"] < whole["weights"] + whole["activations"]


def test_a_cpu_has_no_assumed_speed(run: Run) -> None:
    options = ("--preset", "debug", "--length", "9s")
    needs = planned(run, "plan", *options, "--devices", 2, "--interconnect", 10)["devices"]
    assert needs["exchange_seconds"] == needs["bytes_sent"] / 10e9
    assert needs["step_seconds"] is None and needs["speedup"] is None
    alone = planned(run, "plan", *options)["components"]["transformer"]["ram"]
    assert alone / 4 < needs["memory"] < alone


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (["--devices", "5"], ("--devices is 5", "8 heads")),
        (["--devices", "2", "--interconnect", "0"], ("--interconnect is 0",)),
        (["--devices", "2", "--interconnect", "nan"], ("--interconnect is nan",)),
        (["--interconnect", "450"], ("--interconnect", "--devices")),
    ],
)
def test_devices_that_cannot_be_planned_are_one_line(run: Run, options: list[str], values: tuple[str, ...]) -> None:
    names(refusal(run("plan", "--preset", "debug", *options)), *values)
