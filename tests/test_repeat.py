"""Graphs of deep transformers, made by repeating a layer: the same as those of which every layer was traced."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.graphs import graph as graphs
from ttt_video_engine.export.graphs import repeat
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.graph import Graph, read_signature, save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import random_cases
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.runtime.presets import tiny

LAYERS = 3


@pytest.fixture(scope="module")
def deep() -> Graph:
    model = tiny("mlp")
    model = replace(model, transformer=replace(model.transformer, num_layers=LAYERS))
    return transformer_graph(SeededSource(model, seed=0).transformer().load(), model, "9s")


def content(model: ir.Model) -> tuple[Counter[tuple[str, str]], set[str], set[str]]:
    """Operators, weights and TTT nodes."""
    weights = {name for name in model.graph.initializers if name.startswith("transformer.")}
    scans = {node.name or "" for node in model.graph if node.op_type == "TTTMLP"}
    return Counter((node.domain, node.op_type) for node in model.graph), weights, scans


def velocity(graph: Graph, model: ir.Model, folder: Path) -> NDArray[np.generic]:
    path = folder / "model.onnx"
    save(model, path, write_module(graph.module, folder / "model.onnx_data"), graph.ttt)
    with OnnxRuntimeRunner(path, *read_signature(path)) as engine:
        case = random_cases(graph)["random, batch 1"]
        return engine.run({spec.name: value.numpy() for spec, value in zip(engine.inputs, case, strict=True)})[
            "velocity"
        ]


def test_a_repeated_layer_is_a_traced_one(deep: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(deep.module.state_dict())
    repeated = trace(deep)
    assert list(deep.module.state_dict()) == names, "the module is as it was"
    for module in (graphs, repeat):
        monkeypatch.setattr(module, "TRACED", LAYERS)
    traced = trace(deep)
    assert content(repeated) == content(traced)
    assert len(content(repeated)[2]) == 2 * LAYERS
    np.testing.assert_array_equal(velocity(deep, repeated, tmp_path), velocity(deep, traced, tmp_path))
