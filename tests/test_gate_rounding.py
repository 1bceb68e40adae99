"""What the gate allows a transformer whose reference rounds more than the tolerance."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import WeightFile, write_module
from ttt_video_engine.export.parity import gate
from ttt_video_engine.export.parity.gate import ROUNDING_MARGIN, Gate
from ttt_video_engine.export.sources.source import SeededSource, components_of
from ttt_video_engine.runtime.errors import CheckFailed
from ttt_video_engine.runtime.presets import tiny

MODEL = tiny("linear")


@pytest.fixture
def exported(shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, Graph, WeightFile]:
    """A transformer, its graph's file, and a gate whose float32 tolerance is far below any rounding."""
    monkeypatch.setitem(gate.TOLERANCES, "float32", 1e-12)
    source = SeededSource(MODEL, seed=0)
    source.tokenizer().save(str(tmp_path / "tokenizer.json"))
    components = components_of(source)
    module: nn.Module = components["transformer"].load()
    (graph,) = component_graphs(module, MODEL, ["3s"])
    weights = write_module(graph.module, tmp_path / "model.onnx_data")
    shutil.copy(shared_bundle / graph.file, tmp_path / "model.onnx")  # of the same model and seed
    return Gate(MODEL, components, "float32", tmp_path / "tokenizer.json"), graph, weights


def test_rounding_is_allowed_as_far_as_the_reference_rounds(
    exported: tuple[Gate, Graph, WeightFile], tmp_path: Path
) -> None:
    checks = exported[0].check(exported[1], tmp_path / "model.onnx", exported[2])
    assert all(1e-12 < check.max_error <= check.tolerance < 1e-5 for check in checks)


def test_more_than_rounding_is_refused(exported: tuple[Gate, Graph, WeightFile], tmp_path: Path) -> None:
    """One weight of one matrix, wrong by a twentieth."""
    the_gate, graph, weights = exported
    (name,) = (name for name in weights.ranges if name.endswith("final_layer.linear.weight"))
    offset, _ = weights.ranges[name]
    with weights.path.open("r+b") as file:
        file.seek(offset)
        (value,) = torch.frombuffer(bytearray(file.read(4)), dtype=torch.float32)
        file.seek(offset)
        file.write((value * 1.05).numpy().tobytes())
    with pytest.raises(CheckFailed):
        the_gate.check(graph, tmp_path / "model.onnx", weights)


def test_float64_is_kept_where_the_reference_widens() -> None:
    """Otherwise float64 would tell nothing about the inner models."""
    (graph,) = component_graphs(components_of(SeededSource(MODEL, seed=0))["transformer"].load(), MODEL, ["3s"])
    kinds: set[torch.dtype] = set()

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kinds.add(output.dtype)

    for name, module in graph.module.double().named_modules():
        if name.endswith("post_norm"):
            module.register_forward_hook(note)
    graph.module(*(spec.example for spec in graph.inputs))
    assert kinds == {torch.float64} and ROUNDING_MARGIN >= 1
