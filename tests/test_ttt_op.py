"""The body of the TTT operator in ONNX Runtime against the sequential scan of the reference."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_video_engine.export.graphs.graph import OPSET
from ttt_video_engine.export.graphs.ttt_op import add_function_body, function_body
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES

KINDS: tuple[TTTKind, ...] = ("linear", "mlp")
SCANS: dict[TTTKind, Callable[..., Tensor]] = {"linear": ttt_linear, "mlp": ttt_mlp}
DTYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
# B, H, NC, CS, F as in `reference/ttt.py`.
SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from([16, 64]), st.sampled_from([16, 32, 48])
)


def random_inputs(
    kind: TTTKind, sizes: tuple[int, int, int, int, int], *, batched: bool, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs like those of a trained layer: unit keys and queries, learning rates that move the weights."""
    B, H, N, C, F = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lead = (B, H) if batched else (H,)
    hidden = 4 * F if kind == "mlp" else F
    inputs = {
        "XQ": torch.nn.functional.normalize(normal(B, H, N, C, F), dim=-1),
        "XK": torch.nn.functional.normalize(normal(B, H, N, C, F), dim=-1),
        "XV": normal(B, H, N, C, F),
        "eta": torch.rand(B, H, N, C, generator=generator) / C,
        "norm_weight": 1 + 0.2 * normal(H, F),
        "norm_bias": 0.2 * normal(H, F),
        "W1": 0.1 * normal(*lead, F, hidden),
        "b1": 0.1 * normal(*lead, 1, hidden),
    }
    if kind == "mlp":
        inputs |= {"W2": 0.1 * normal(*lead, hidden, F), "b2": 0.1 * normal(*lead, 1, F)}
    return {name: value.to(dtype) for name, value in inputs.items()}


@functools.cache
def session(kind: TTTKind, dtype: torch.dtype, batched: bool) -> ort.InferenceSession:
    """One node with its body; all sizes are free, so one session takes every draw."""
    ranks = {"XQ": 5, "XK": 5, "XV": 5, "eta": 4, "norm_weight": 2, "norm_bias": 2}
    weights = ("W1", "b1", "W2", "b2") if kind == "mlp" else ("W1", "b1")
    ranks |= dict.fromkeys(weights, 4 if batched else 3)

    def value(name: str, rank: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, DTYPES[dtype], [f"{name}_{axis}" for axis in range(rank)])

    node = onnx.helper.make_node(OP_TYPES[kind], list(ranks), ["XQW"], domain=DOMAIN)
    graph = onnx.helper.make_graph([node], "scan", [value(*item) for item in ranks.items()], [value("XQW", 5)])
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model_gen_version(graph, opset_imports=opsets)
    add_function_body(model, kind)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def both(kind: TTTKind, inputs: dict[str, Tensor], *, batched: bool) -> tuple[np.ndarray, np.ndarray]:
    """XQW of the operator and of the oracle."""
    dtype = inputs["XQ"].dtype
    feeds = {name: value.numpy() for name, value in inputs.items()}
    (found,) = session(kind, dtype, batched).run(["XQW"], feeds)
    expected = SCANS[kind](*inputs.values())
    assert found.dtype == expected.numpy().dtype and found.shape == tuple(expected.shape)
    return found.astype(np.float64), expected.double().numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
@example(sizes=(1, 1, 1, 16, 16), seed=0)
@example(sizes=(3, 4, 5, 64, 48), seed=1)
def test_the_body_computes_the_scan(
    kind: TTTKind, batched: bool, sizes: tuple[int, int, int, int, int], seed: int
) -> None:
    inputs = random_inputs(kind, sizes, batched=batched, seed=seed, dtype=torch.float32)
    assert relative_error(*both(kind, inputs, batched=batched)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
def test_float16_is_only_the_format_of_inputs_and_output(
    kind: TTTKind, sizes: tuple[int, int, int, int, int], seed: int
) -> None:
    """Both compute in float32, so they differ by no more than the rounding of the result: one part in 1024."""
    inputs = random_inputs(kind, sizes, batched=False, seed=seed, dtype=torch.float16)
    found, expected = both(kind, inputs, batched=False)
    assert np.all(np.abs(found - expected) <= 2**-10 * np.abs(expected) + 2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_clip_of_a_batch_has_weights_of_its_own(kind: TTTKind) -> None:
    inputs = random_inputs(kind, (3, 2, 4, 16, 16), batched=True, seed=3, dtype=torch.float32)
    together, _ = both(kind, inputs, batched=True)
    shared = ("norm_weight", "norm_bias")
    for clip in range(3):
        one = {name: value if name in shared else value[clip : clip + 1] for name, value in inputs.items()}
        alone, _ = both(kind, one, batched=True)
        np.testing.assert_allclose(together[clip : clip + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_later_mini_batches_do_not_reach_back(kind: TTTKind) -> None:
    """What a query reads depends on the mini-batches up to its own, and on its own."""
    inputs = random_inputs(kind, (1, 2, 4, 16, 16), batched=False, seed=4, dtype=torch.float32)
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["XV"][:, :, 2] += 1
    before, _ = both(kind, inputs, batched=False)
    after, _ = both(kind, changed, batched=False)
    moved = np.abs(after - before).max(axis=(0, 1, 3, 4))
    assert moved[:2].max() == 0 and moved[2:].min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_is_of_standard_operators(kind: TTTKind) -> None:
    function = function_body(kind, OPSET)
    assert [entry.domain for entry in function.opset_import] == [""]
    assert {node.domain for node in function.node} == {""}


@pytest.mark.parametrize("length", ["3s", "9s"])
def test_a_transformer_has_one_node_for_each_layer_and_direction(shared_bundle: Path, length: str) -> None:
    model = onnx.load(shared_bundle / f"transformer/model-{length}.onnx", load_external_data=False)
    nodes = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert nodes["ai.ttt", "TTTLinear"] == 2 * tiny("linear").transformer.num_layers
    assert {domain for domain, _ in nodes} == {"", "ai.ttt"}
    assert [(function.domain, function.name) for function in model.functions] == [("ai.ttt", "TTTLinear")]
