"""Graphs of the 5B model: traced without weights, valid for onnx, and of the shapes that the model has on paper."""

from pathlib import Path

import onnx
import pytest
import torch

from ttt_video_engine.export.components import graphs_of
from ttt_video_engine.export.graph import save, trace
from ttt_video_engine.export.ttt_op import DOMAIN
from ttt_video_engine.export.weights import lay_out
from ttt_video_engine.reference.initialise import hollow
from ttt_video_engine.reference.stored import held
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import preset


@pytest.mark.parametrize(
    ("ttt", "length", "xq"),
    [("linear", "63s", ("batch", 48, 351168 // 16, 16, 64)), ("mlp", "3s", ("batch", 48, 18048 // 64, 64, 64))],
)
def test_a_full_size_transformer(tmp_path: Path, ttt: TTTKind, length: str, xq: tuple[int | str, ...]) -> None:
    """`benchmarks/full_size.py` does the same for all lengths."""
    model = preset("5B", ttt)
    (graph,) = graphs_of(hollow(lambda: DiffusionTransformer(model.transformer), torch.bfloat16), model, [length])
    path = tmp_path / "model.onnx"
    weights = lay_out(held(graph.module.state_dict()), tmp_path / "model.onnx_data", torch.bfloat16)
    save(trace(graph), path, weights, graph.ttt)  # which runs onnx's checker
    assert path.stat().st_size < 4e6 < 14e9 < weights.size < 15e9

    proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert set(weights.places) <= names
    shapes = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*proto.graph.value_info, *proto.graph.input)
    }
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    assert len(nodes) == 2 * 42
    for node in nodes:
        found = [shapes[name] for name in (*node.input[:4], node.output[0])]
        assert found == [xq, xq, xq, xq[:4], xq], node.name
