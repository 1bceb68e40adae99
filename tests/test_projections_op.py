"""Versions 2 and 3 of the TTT operator, their function bodies in ONNX Runtime, against the layer of the reference."""

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
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor, nn

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.graphs.graph import OPSET, read_signature
from ttt_video_engine.export.graphs.projections_op import scan_order
from ttt_video_engine.export.graphs.ttt_op import add_function_body, function_body
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt_layer import TTTLayer, TTTWrapper
from ttt_video_engine.runtime.config import TransformerConfig, TTTKind
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.ttt_op import (
    DOMAIN,
    OP_TYPES,
    PART_VERSION,
    PROJECTIONS_INPUTS,
    PROJECTIONS_VERSION,
    OpVersion,
)

Array = NDArray[np.float64]

KINDS: tuple[TTTKind, ...] = ("linear", "mlp")
DTYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
STATES: dict[TTTKind, tuple[str, ...]] = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
OLD_GRAPH = Path(__file__).parent / "operator_version_1.graph"
"""A transformer of one layer with its weights, as the exporter wrote it when there was only version 1."""

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.sampled_from([16, 32]))
"""Batch, scenes, heads, head dimension."""


class Clip:
    """A layer whose own projections are given, and a clip for it. All is random but like that of a trained layer."""

    def __init__(
        self,
        kind: TTTKind,
        sizes: tuple[int, int, int, int],
        seed: int,
        *,
        patches: int = 4,
        mini_batch_size: int = 16,
    ) -> None:
        batch, scenes, heads, head_dim = sizes
        generator = torch.Generator().manual_seed(seed)
        self.config = replace(
            tiny(kind).transformer,
            model_dim=heads * head_dim,
            num_heads=heads,
            mini_batch_size=mini_batch_size,
            ttt_base_lr=20.0,
        )
        frames = self.config.attn_length * scenes + self.config.prefix_temporal_length
        text = next(n for n in range(1, 1 + mini_batch_size) if (n * scenes + frames * patches) % mini_batch_size == 0)
        self.layout = TokenLayout(self.config, scenes, text, frames, 2, patches // 2)
        self.layer: TTTLayer = TTTWrapper(kind, self.config).ttt
        with torch.no_grad():
            for name, weight in self.layer.named_parameters():
                own = 0.1 * torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + own if name.endswith("norm_weight") else own)
        self.layer.wo, self.layer.post_norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.x = torch.randn(batch, self.layout.num_tokens, heads * head_dim, generator=generator)

    def inputs(self, dtype: torch.dtype, *, backward: bool) -> dict[str, Tensor]:
        layer, config = self.layer, self.config
        order = scan_order(self.layout, config.mini_batch_size, backward=backward)
        logits = self.x @ layer.learnable_ttt_lr_weight.squeeze(1).mT + layer.learnable_ttt_lr_bias.squeeze(1)
        wide = (layer.ttt_norm_weight, layer.ttt_norm_bias, *layer.inner_weights())
        values = (
            *(project(self.x).to(dtype) for project in (layer.wq, layer.wk, layer.wv)),
            logits.to(dtype),
            torch.tensor(config.ttt_base_lr / config.head_dim / config.mini_batch_size),
            *(order.cos, order.sin, order.tokens, order.rate_tokens),
            *(weight.to(dtype) for weight in wide),
        )
        return dict(zip(PROJECTIONS_INPUTS[config.ttt_kind or "linear"], values, strict=True))

    def expected(self, *, backward: bool) -> Tensor:
        order = self.layout.reversed_order if backward else torch.arange(self.layout.num_tokens)
        output: Tensor = self.layer(self.x[:, order], self.layout)
        return output[:, order]  # reversing twice is the first order


@functools.cache
def session(kind: TTTKind, dtype: torch.dtype, version: OpVersion = PROJECTIONS_VERSION) -> ort.InferenceSession:
    """One node with its body; all sizes are free, so one session takes every draw."""
    ranks = dict.fromkeys(PROJECTIONS_INPUTS[kind], 3) | dict.fromkeys(("tokens", "rate_tokens"), 2)
    ranks |= {"rate_scale": 0, "norm_weight": 2, "norm_bias": 2}
    ranks |= dict.fromkeys(STATES[kind], 4) if version == PART_VERSION else {}
    types = dict.fromkeys(ranks, DTYPES[dtype]) | dict.fromkeys(("tokens", "rate_tokens"), onnx.TensorProto.INT32)
    types |= dict.fromkeys(("rate_scale", "cos", "sin"), onnx.TensorProto.FLOAT)
    types |= dict.fromkeys(STATES[kind], onnx.TensorProto.FLOAT) if version == PART_VERSION else {}
    values = [
        onnx.helper.make_tensor_value_info(name, types[name], [f"{name}_{axis}" for axis in range(rank)])
        for name, rank in ranks.items()
    ]
    outputs = [onnx.helper.make_tensor_value_info("XQW", DTYPES[dtype], ["a", "b", "c"])]
    outputs += [
        onnx.helper.make_tensor_value_info(
            f"{name}_left", onnx.TensorProto.FLOAT, [f"{name}_{axis}" for axis in "abcd"]
        )
        for name in STATES[kind]
        if version == PART_VERSION
    ]
    node = onnx.helper.make_node(OP_TYPES[kind], list(ranks), [value.name for value in outputs], domain=DOMAIN)
    model = onnx.helper.make_model_gen_version(
        onnx.helper.make_graph([node], "layer", values, outputs), opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    add_function_body(model, kind, version)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(kind: TTTKind, inputs: dict[str, Tensor]) -> Array:
    feeds = {name: value.detach().numpy() for name, value in inputs.items()}
    (found,) = session(kind, inputs["XQ"].dtype).run(["XQW"], feeds)
    assert found.dtype == feeds["XQ"].dtype and found.shape == feeds["XQ"].shape
    result: Array = found.astype(np.float64)
    return result


def relative_error(found: Array, expected: Tensor) -> float:
    wanted = expected.detach().double().numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
@example(sizes=(2, 1, 2, 16), seed=0)
@example(sizes=(2, 3, 2, 16), seed=1)
def test_the_body_computes_the_layer(
    kind: TTTKind, backward: bool, sizes: tuple[int, int, int, int], seed: int
) -> None:
    clip = Clip(kind, sizes, seed)
    found = run(kind, clip.inputs(torch.float32, backward=backward))
    assert relative_error(found, clip.expected(backward=backward)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_several_chunks_of_which_the_last_is_padded(kind: TTTKind) -> None:
    clip = Clip(kind, (2, 3, 2, 16), 2, patches=24)
    mini_batches = clip.layout.num_tokens // 16
    assert mini_batches > 32 and mini_batches % 2  # 32 fit in a chunk
    for backward in (False, True):
        found = run(kind, clip.inputs(torch.float32, backward=backward))
        assert relative_error(found, clip.expected(backward=backward)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_only_the_format_of_inputs_and_output(kind: TTTKind) -> None:
    """All is computed in float32: no further from exact inputs of the same values than the rounding of the result."""
    inputs = Clip(kind, (2, 2, 2, 16), 3).inputs(torch.float16, backward=True)
    exact = run(kind, {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()})
    assert np.all(np.abs(run(kind, inputs) - exact) <= 2**-10 * np.abs(exact) + 2e-5 * np.abs(exact).max())


def zero_keys(inputs: dict[str, Tensor]) -> None:
    inputs["XK"] = torch.zeros_like(inputs["XK"])


def flat_values(inputs: dict[str, Tensor]) -> None:
    zero_keys(inputs)
    inputs["XV"] = torch.full_like(inputs["XV"], 1000.0)


@pytest.mark.parametrize("change", [zero_keys, flat_values])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_divides_by_zero(kind: TTTKind, change: Callable[[dict[str, Tensor]], None]) -> None:
    inputs = Clip(kind, (1, 1, 2, 16), 4).inputs(torch.float32, backward=False)
    change(inputs)
    assert np.isfinite(run(kind, inputs)).all()


@pytest.mark.parametrize("version", [PROJECTIONS_VERSION, PART_VERSION])
@pytest.mark.parametrize("kind", KINDS)
def test_the_body_is_of_standard_operators(kind: TTTKind, version: OpVersion) -> None:
    function = function_body(kind, OPSET, version)
    assert len(function.output) == 1 + (len(STATES[kind]) if version == PART_VERSION else 0)
    assert [entry.domain for entry in function.opset_import] == [""]
    assert {node.domain for node in function.node} == {""}
    assert tuple(function.input) == PROJECTIONS_INPUTS[kind]


def test_an_exported_transformer_has_nodes_of_version_2(shared_bundle: Path) -> None:
    model = onnx.load(shared_bundle / "transformer/model-9s.onnx", load_external_data=False)
    nodes = Counter(len(node.input) for node in model.graph.node if node.domain == DOMAIN)
    assert nodes == {len(PROJECTIONS_INPUTS["linear"]): 2 * tiny("linear").transformer.num_layers}
    versions = [entry.version for entry in model.opset_import if entry.domain == DOMAIN]
    assert versions == [PROJECTIONS_VERSION]


def test_a_graph_of_the_exporter_of_version_1_still_runs() -> None:
    model = onnx.load(OLD_GRAPH)
    assert [entry.version for entry in model.opset_import if entry.domain == DOMAIN] == [1]
    config: TransformerConfig = replace(
        tiny("linear").transformer, model_dim=16, num_heads=1, num_layers=1, time_embed_dim=16
    )
    transformer = DiffusionTransformer(config).eval()
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = transformer.state_dict()
    transformer.load_state_dict({name: torch.from_numpy(stored[f"transformer.{name}"].copy()) for name in names})
    generator = torch.Generator().manual_seed(0)
    with OnnxRuntimeRunner(OLD_GRAPH, *read_signature(OLD_GRAPH)) as runner:
        latents, text, _ = (
            torch.randn([2 if isinstance(n, str) else n for n in spec.shape], generator=generator)
            for spec in runner.inputs
        )
        timestep = torch.tensor([979, 499])
        feeds = {"latents": latents.numpy(), "text": text.numpy(), "timestep": timestep.numpy()}
        found = np.asarray(runner.run(feeds)["velocity"], np.float64)
    with torch.no_grad():
        assert relative_error(found, transformer(latents, text, timestep)) < 1e-5
