"""Graphs of the 5B model: traced without weights, valid for onnx, and of the shapes that the model has on paper."""

from pathlib import Path

import onnx
import pytest
import torch

from ttt_video_engine.export.build import GRAPH_BYTES
from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import save, trace
from ttt_video_engine.export.graphs.weights import lay_out
from ttt_video_engine.reference.checkpoints.lazy import lazy_state
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.ttt_op import DOMAIN

TOKENS = {"3s": 18_048, "9s": 51_456, "18s": 101_376, "30s": 168_320, "63s": 351_168}
MINI_BATCH: dict[TTTKind, int] = {"linear": 16, "mlp": 64}


@pytest.mark.parametrize("length", TOKENS)
@pytest.mark.parametrize("ttt", MINI_BATCH)
def test_every_length_fills_whole_mini_batches(ttt: TTTKind, length: str) -> None:
    model, mini_batch = preset("5B", ttt), MINI_BATCH[ttt]
    tokens = model.clip_size(length).num_tokens(model.transformer.patch_size)
    assert (tokens, tokens % mini_batch, model.transformer.mini_batch_size) == (TOKENS[length], 0, mini_batch)


@pytest.mark.parametrize(("ttt", "length"), [("linear", "3s"), ("mlp", "63s")])
def test_a_full_size_transformer(tmp_path: Path, ttt: TTTKind, length: str) -> None:
    """One scene, which is scanned as a whole, and the longest clip with the larger kind, whose graph is the largest.

    `benchmarks/full_size.py` does the same with every length and both kinds.
    """
    model, mini_batch, tokens = preset("5B", ttt), MINI_BATCH[ttt], TOKENS[length]
    (graph,) = component_graphs(
        with_placeholder_weights(lambda: DiffusionTransformer(model.transformer), torch.bfloat16), model, [length]
    )
    path = tmp_path / "model.onnx"
    weights = lay_out(lazy_state(graph.module.state_dict()), tmp_path / "model.onnx_data", torch.bfloat16)
    save(trace(graph), path, weights, graph.ttt)  # which runs onnx's checker
    assert path.stat().st_size < GRAPH_BYTES * 0.7 < 14e9 < weights.size < 15e9

    proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert set(weights.ranges) <= names
    shapes = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*proto.graph.value_info, *proto.graph.input)
    } | {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    parts = 1 if length == "3s" else 3
    assert len(nodes) == 2 * 42 * parts
    for number, node in enumerate(nodes):
        before, end = (tokens // mini_batch * place // parts for place in (number % parts, number % parts + 1))
        clip, table = ("batch", (end - before) * mini_batch, 3072), (end - before, mini_batch)
        expected = [clip, clip, clip, (*clip[:2], 48), (), *[(*table, 32)] * 2, table, table, (48, 64), (48, 64)]
        assert shapes[node.output[0]] == clip, node.name
        found = [shapes.get(name, ()) for name in node.input[: len(expected)]]
        assert found == expected, node.name
