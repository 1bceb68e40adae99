"""The plugins through their C++ interface, as TensorRT calls them. Only the driver, which launches, is not NVIDIA's."""

import json
from pathlib import Path
from typing import Any

import pytest
from driver import build_driver, needs_driver, run_with
from packages import tensorrt_rtx

from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import INPUTS, OP_TYPES, PROJECTIONS_INPUTS

HERE = Path(__file__).parent
pytestmark = needs_driver
CASES: tuple[tuple[TTTKind, int, DType, int], ...] = (
    ("linear", 1, "float16", 16),
    ("mlp", 1, "bfloat16", 64),
    ("linear", 2, "float16", 16),
    ("mlp", 2, "bfloat16", 64),
    ("linear", 3, "float16", 16),
    ("mlp", 3, "bfloat16", 64),
)
"""Operator, version, dtype, tokens of a mini-batch."""
ACCEPTED, REFUSED = 0, -1
HEADS, MINI_BATCHES, CHUNK, HEAD_DIM = 3, 5, 2, 16
NAMES = {1: INPUTS, 2: PROJECTIONS_INPUTS, 3: PROJECTIONS_INPUTS}
STATE: dict[TTTKind, tuple[int, ...]] = {
    "linear": (HEAD_DIM**2, HEAD_DIM),
    "mlp": (4 * HEAD_DIM**2, 4 * HEAD_DIM, 4 * HEAD_DIM**2, HEAD_DIM),
}
"""Values of each inner weight of a head."""

Case = tuple[TTTKind, int, int, dict[str, Any]]


@pytest.fixture(scope="module", params=CASES, ids=[f"{op} {version}" for op, version, *_ in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Operator, version, tokens of a mini-batch, and what `plugin_calls.py` found."""
    tensorrt_rtx()
    from ttt_video_engine.engines.kernels.compile_chunk import KERNELS_OF_VERSION

    op, version, dtype, size = request.param
    folder = tmp_path_factory.mktemp(op)
    sizes = {"mini_batch_size": size, "head_dim": HEAD_DIM}
    KERNELS_OF_VERSION[version](op, gpu="sm_89", dtype=dtype, folder=folder / "kernels", **sizes)
    arguments = [str(HERE / "plugin_calls.py"), op, str(version), dtype, str(folder / "kernels")]
    done = run_with(build_driver(folder), folder, arguments)
    assert done.returncode == 0, done.stderr
    return op, version, size, json.loads((folder / "found.json").read_text())


def test_the_creator_and_the_core_say_the_same_name(case: Case) -> None:
    op, version, _, found = case
    name = [OP_TYPES[op], str(version), "ai.ttt"]
    assert found["creator"] == found["BUILD"]["core"] == found["RUNTIME"]["core"] == name
    assert found["creator's fields"] == 0


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_a_plugin_and_its_clone_answer_the_builder(case: Case, phase: str) -> None:
    op, version, size, found = case
    names, build = NAMES[version][op], found[phase]["build"]
    count = len(names)
    assert found[phase]["clone"] == [True, build]
    states = STATE[op] if version == 3 else ()
    assert (build["outputs"], build["tactics"], build["valid tactics"]) == (1 + len(states), 0, ACCEPTED)
    assert build["workspace"] == sum(regions(op, version, size, batch=2))
    assert build["texts"] == [None, None] and build["combinations"] >= 3, "float32, float16, bfloat16"
    assert build["output types"] == [ACCEPTED, [found["type"], *[found["float32"]] * len(states)]]
    ranks = [{1: 5, 2: 3, 3: 3}[version], *[4] * len(states)]
    assert build["output shape"] == [ACCEPTED, [[rank, list(range(rank))] for rank in ranks]]
    assert build["other shape"] == REFUSED
    assert (build["configured"], build["not configured"]) == (ACCEPTED, REFUSED)
    own = ("XQ", "eta", "rate_scale", "cos", "sin", *(("W1", "b1", "W2", "b2") if version == 3 else ()))
    float32 = [name in own for name in names]  # XQ decides of itself
    assert build["formats"] == {
        "same": [True] * (count + 1 + len(states)),
        "float32": [*float32, False, *[True] * len(states)],
        "int32": [*(name in ("tokens", "rate_tokens") for name in names), False, *[False] * len(states)],
        "another layout": [False] * (count + 1 + len(states)),
    }


def regions(op: TTTKind, version: int, size: int, batch: int) -> list[int]:
    """Bytes of q, k, targets, output and learning rates of a chunk; of version 2 also of the state, which is an output
    of version 3. Each begins at 256 bytes."""
    if version == 1:
        return []
    rates = batch * HEADS * CHUNK * size
    counts = [2 * HEAD_DIM * rates] * 4 + [4 * rates]
    counts += [4 * batch * HEADS * values for values in STATE[op]] if version == 2 else []
    return [-(-count // 256) * 256 for count in counts]


def expected_launches(case: Case, batch: int) -> list[list[Any]]:
    op, version, size, found = case
    run, names = found["run"], NAMES[version][op]
    inputs, (output, *left) = run["addresses"][: len(names)], run["addresses"][len(names) :]
    none = [0, 0]  # Triton's own scratch
    if version == 1:
        return [[f"ttt_{op}", batch * HEADS, [*inputs, output, HEADS, MINI_BATCHES, *none]]]
    places, at = [], run["room"]
    for count in regions(op, version, size, batch):
        places.append(at)
        at += count
    (q, k, v, out, eta), states = places[:5], places[5:] or left
    first_weight, tokens = names.index("W1"), inputs[names.index("tokens")]
    norm, weights = inputs[first_weight - 2 : first_weight], inputs[first_weight:]
    programs, launches = batch * HEADS, []
    for weight, state, values in zip(weights, states, STATE[op], strict=True):
        heads = programs if version == 3 else HEADS  # a state has one of each head and batch element
        launches.append(["ttt_start", programs, [weight, state, heads, values, *none]])
    for before, count in ((0, 2), (2, 2), (4, 1)):
        around = [HEADS, MINI_BATCHES * size, before, count, *none]
        launches += [
            ["ttt_prepare", programs * count, [*inputs[:first_weight], q, k, v, eta, *around]],
            [f"ttt_{op}", programs, [q, k, v, eta, *norm, *states, out, HEADS, count, *none]],
            ["ttt_finish", programs * count, [out, tokens, output, *around]],
        ]
    return launches


def test_a_run_is_these_launches(case: Case) -> None:
    op, version, _, found = case
    run = found["run"]
    assert (run["tactic"], run["shape"], run["other shape"]) == (ACCEPTED, ACCEPTED, REFUSED)
    assert found["attached"] and run["fields"] == 0
    assert len(set(run["addresses"])) == len(NAMES[version][op]) + (1 + len(STATE[op]) if version == 3 else 1)
    for batch, made in zip((2, 1), run["runs"], strict=True):
        assert made["status"] == ACCEPTED
        assert made["launches"] == expected_launches(case, batch)
        name, blocks, _ = made["launches"][-1]
        assert made["last"] == {"blocks": blocks, "stream": run["stream"], **run["cubins"][name]}


def test_what_cannot_be_launched_is_refused(case: Case) -> None:
    op, version, _, found = case
    before = [] if version == 1 else ["ttt_start"] * len(STATE[op])  # they do not read the misaligned tensor
    assert found["run"]["misaligned"] == [REFUSED, before]
    assert found["no cubin"] == [ACCEPTED, REFUSED, []]
