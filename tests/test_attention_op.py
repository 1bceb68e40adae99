"""Attention and rotary embedding as ONNX operators: what they compute, and what TensorRT makes of them."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from real_engines import skip_without_package
from torch import Tensor
from torch.nn import functional

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.engines.tensorrt.layers import list_kernels
from ttt_video_engine.export.graphs import attention_op
from ttt_video_engine.export.graphs.components import text_encoder_graph, transformer_graph
from ttt_video_engine.export.graphs.graph import Graph, read_signature, save, trace
from ttt_video_engine.export.graphs.upcast import upcast_bfloat16
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, write_module
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.rope import Rotation
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import tiny

LAYERS = {"float32": 1, "float16": 1, "bfloat16": 2}
"""Of a component in a precision."""
GROUPS = {"transformer": 3, "text_encoder": 1}
"""Of scenes, in half precision: a layer has an attention for each (parts.py)."""
COMPONENTS = ("transformer", "text_encoder")
GPUS = ("sm_80", "sm_89", "sm_120")


def component(name: str, dtype: DType, num_layers: int | None = None) -> Graph:
    """The graph of a component with seeded weights, rounded to `dtype`."""
    model = tiny("none")
    layers = num_layers or LAYERS[dtype]
    model = replace(
        model,
        transformer=replace(model.transformer, num_layers=layers),
        text_encoder=replace(model.text_encoder, num_layers=layers),
    )
    source = SeededSource(model, seed=0)
    if name == "transformer":
        return transformer_graph(source.transformer().load().to(TORCH_DTYPES[dtype]), model, "9s")
    encoder = source.text_encoder().load().to(TORCH_DTYPES[dtype])
    return text_encoder_graph(encoder, vocab_size=model.text_encoder.vocab_size)


def exported(graph: Graph, folder: Path) -> Path:
    path = folder / "model.onnx"
    save(trace(graph), path, write_module(graph.module, folder / "model.onnx_data"))
    return path


def examples(graph: Graph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        spec.name: torch.randn(spec.example.shape, generator=generator)
        if spec.example.is_floating_point()
        else spec.example
        for spec in graph.inputs
    }


Exports = Callable[[str, DType], tuple[Graph, Path]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The graph of a component in a precision, and its file; each is exported once."""

    @cache
    def export(name: str, dtype: DType) -> tuple[Graph, Path]:
        graph = component(name, dtype)
        return graph, exported(graph, tmp_path_factory.mktemp(f"{name}-{dtype}"))

    return export


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float32_alone_has_no_attention_operator(exports: Exports, dtype: DType) -> None:
    half = dtype != "float32"
    for name in COMPONENTS:
        _, path = exports(name, dtype)
        nodes = onnx.load(path, load_external_data=False).graph.node
        found = Counter(node.op_type for node in nodes)
        attentions = LAYERS[dtype] * (GROUPS[name] if half else 1)
        assert found["Attention"] == (attentions if half else 0)
        assert found["Softmax"] == (0 if half else attentions)
        assert found["RotaryEmbedding"] == (2 * attentions if name == "transformer" else 0)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("operator", [True, False])
def test_both_forms_compute_what_the_reference_does(
    tmp_path: Path, exports: Exports, name: str, operator: bool
) -> None:
    """A bfloat16 graph is run with float32 in place of bfloat16, with the operators that it has.

    The constants of the text encoder's GELU are rounded to bfloat16 in it.
    """
    graph, path = exports(name, "bfloat16" if operator else "float32")
    if operator:
        path = upcast_bfloat16(path, tmp_path / "wide.onnx")
    inputs = examples(graph)
    with torch.no_grad():
        expected = deepcopy(graph.module).float()(**inputs).numpy()
    with OnnxRuntimeRunner(path, *read_signature(path), num_threads=1) as runner:
        (found,) = runner.run({key: value.numpy() for key, value in inputs.items()}).values()
    tolerance = 1e-3 if operator and name == "text_encoder" else 1e-5
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def test_tracing_leaves_the_module_as_it_was(exports: Exports) -> None:
    for name in COMPONENTS:
        graph, _ = exports(name, "float32")
        for part in graph.module.modules():
            assert "_rotated_attention" not in vars(part)
            assert getattr(getattr(part, "config", None), "_attn_implementation", "sdpa") == "sdpa"


def attention_kernels(graph: Graph, path: Path, gpu: str) -> int:
    """How many kernels compute a whole attention, for one guidance branch."""
    shapes = {spec.name: (1, *spec.example.shape[1:]) for spec in graph.inputs}
    return sum(kernel.is_attention for kernel in list_kernels(path, gpu, shapes))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_layer_of_a_half_precision_engine_has_a_fused_attention(
    exports: Exports, name: str, dtype: DType
) -> None:
    skip_without_package(GPUS[0])
    graph, path = exports(name, dtype)
    expected = LAYERS[dtype] * GROUPS[name]
    assert {gpu: attention_kernels(graph, path, gpu) for gpu in GPUS} == dict.fromkeys(GPUS, expected)


def in_float32(block: SeqModelingBlock, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
    """Attention of half precision tensors that is computed in float32, written out."""
    q32, k32, v32 = (x.float() for x in (attention_op._rotate(q, rotation), attention_op._rotate(k, rotation), v))
    weights = torch.softmax(q32 @ k32.transpose(-1, -2) * block.config.head_dim**-0.5, dim=-1)
    return (weights @ v32).to(v.dtype)


def test_attention_that_cannot_be_fused_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_package(GPUS[0])
    monkeypatch.setattr(attention_op, "_rotated_attention", in_float32)
    graph = component("transformer", "bfloat16", num_layers=1)
    assert attention_kernels(graph, exported(graph, tmp_path), "sm_89") == 0


def test_the_operator_in_float32_does_not_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why a float32 graph does not have it."""
    skip_without_package(GPUS[0])
    monkeypatch.setattr(attention_op, "_rotated_attention", _always_the_operator)
    graph = component("transformer", "float32")
    with pytest.raises(BackendError, match="not supported by a dedicated kernel"):
        attention_kernels(graph, exported(graph, tmp_path), "sm_89")


def _always_the_operator(block: SeqModelingBlock, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
    q, k = attention_op._rotate(q, rotation), attention_op._rotate(k, rotation)
    return functional.scaled_dot_product_attention(q, k, v)
