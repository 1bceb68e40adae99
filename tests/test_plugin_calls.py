"""The plugins through their C++ interface, as TensorRT calls them. Only the driver, which launches, is not NVIDIA's."""

import json
from pathlib import Path
from typing import Any

import pytest
from driver import build_driver, needs_driver, run_with
from packages import tensorrt_rtx

from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import INPUTS, OP_TYPES

HERE = Path(__file__).parent
pytestmark = needs_driver
CASES: tuple[tuple[TTTKind, DType, int], ...] = (("linear", "float16", 16), ("mlp", "bfloat16", 64))
ACCEPTED, REFUSED = 0, -1
HEADS, MINI_BATCHES, ETA = 3, 5, 3


@pytest.fixture(scope="module", params=CASES, ids=[op for op, *_ in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TTTKind, dict[str, Any]]:
    """The operator, and what `plugin_calls.py` found."""
    tensorrt_rtx()
    from ttt_video_engine.engines.kernels.compile import compile_kernel

    op, dtype, size = request.param
    folder = tmp_path_factory.mktemp(op)
    compile_kernel(op, gpu="sm_89", dtype=dtype, mini_batch_size=size, head_dim=16, folder=folder / "kernels")
    arguments = [str(HERE / "plugin_calls.py"), op, dtype, str(folder / "kernels")]
    done = run_with(build_driver(folder), folder, arguments)
    assert done.returncode == 0, done.stderr
    return op, json.loads((folder / f"found-{op}.json").read_text())


def test_the_creator_and_the_core_say_the_same_name(case: tuple[TTTKind, dict[str, Any]]) -> None:
    op, found = case
    name = [OP_TYPES[op], "1", "ai.ttt"]
    assert found["creator"] == found["BUILD"]["core"] == found["RUNTIME"]["core"] == name
    assert found["creator's fields"] == 0


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_a_plugin_and_its_clone_answer_the_builder(case: tuple[TTTKind, dict[str, Any]], phase: str) -> None:
    op, found = case
    count, build = len(INPUTS[op]), found[phase]["build"]
    assert found[phase]["clone"] == [True, build]
    assert (build["outputs"], build["tactics"], build["valid tactics"], build["workspace"]) == (1, 0, ACCEPTED, 0)
    assert build["texts"] == [None, None] and build["combinations"] >= 3, "float32, float16, bfloat16"
    assert build["output type"] == [ACCEPTED, found["type"]]
    assert build["output shape"] == [ACCEPTED, 5, [0, 1, 2, 3, 4]] and build["other shape"] == REFUSED
    assert (build["configured"], build["not configured"]) == (ACCEPTED, REFUSED)
    tensors = range(count + 1)
    assert build["formats"] == {
        "same": [True] * (count + 1),
        "float32": [position in (0, ETA) for position in tensors],  # a graph in float32 begins with XQ in float32
        "int32": [False] * (count + 1),
        "another layout": [False] * (count + 1),
    }


def test_a_run_is_one_launch_with_these_arguments(case: tuple[TTTKind, dict[str, Any]]) -> None:
    op, found = case
    run = found["run"]
    assert (run["tactic"], run["shape"], run["other shape"]) == (ACCEPTED, ACCEPTED, REFUSED)
    assert found["attached"] and run["fields"] == 0
    assert len(set(run["addresses"])) == len(INPUTS[op]) + 1
    for number, (batch, launch) in enumerate(zip((2, 1), run["launches"], strict=True), start=1):
        assert launch["status"] == ACCEPTED and launch["number"] == number
        assert launch["arguments"] == [*run["addresses"], HEADS, MINI_BATCHES, 0, 0]
        assert (launch["blocks"], launch["stream"]) == (batch * HEADS, run["stream"])
        assert {name: launch[name] for name in ("threads", "shared")} == run["cubin"]


def test_what_cannot_be_launched_is_refused(case: tuple[TTTKind, dict[str, Any]]) -> None:
    _, found = case
    assert found["run"]["misaligned"] == [REFUSED, 2]
    assert found["no cubin"] == [ACCEPTED, REFUSED, 2]
