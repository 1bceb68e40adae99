"""`export --inline`: transformers of standard operators alone, which OpenVINO runs. It refuses functions of ours."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.build import ExportOptions, export_bundle
from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import Graph, read_signature, save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import TOLERANCES, random_cases
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.config import ModelConfig, TTTKind
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.runner import Array
from ttt_video_engine.runtime.ttt_op import DOMAIN

Run = Callable[..., tuple[int, str, str]]

TOLERANCE = TOLERANCES["float32"]
LENGTHS = ("3s", "9s")
MLP = replace(tiny("mlp"), transformer=replace(tiny("mlp").transformer, num_layers=1))
"""One of two layers, which are alike: tracing is what takes long."""


def transformer_graphs(model: ModelConfig) -> list[Graph]:
    """The transformer of each of LENGTHS, with the weights of seed 0."""
    return component_graphs(SeededSource(model, 0).transformer().load(), model, LENGTHS, inline=True)


@pytest.fixture(scope="module")
def inlined(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """The shared bundle, exported again with its TTT nodes inlined, and the lines that the export said."""
    folder = Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("inlined") / "bundle"))
    report: list[str] = []
    source = SeededSource(tiny("linear"), 0)
    return export_bundle(source, folder, LENGTHS, "float32", report.append, ExportOptions(inline=True)), report


@pytest.fixture(scope="module")
def mlp_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inlined transformers of MLP by their length, in one folder with their weights."""
    folder = tmp_path_factory.mktemp("mlp")
    graphs = transformer_graphs(MLP)
    weights = write_module(graphs[0].module, folder / "model.onnx_data")
    files = {graph.length: folder / Path(graph.file).name for graph in graphs}
    for graph in graphs:
        save(trace(graph), files[graph.length], weights, graph.ttt, inline=graph.inline)
    return files


@pytest.fixture(params=["linear", "mlp"])
def transformers(request: pytest.FixtureRequest) -> list[tuple[Graph, Path]]:
    """The transformers of one kind of TTT, and their files."""
    kind: TTTKind = request.param
    if kind == "mlp":
        files: dict[str, Path] = request.getfixturevalue("mlp_files")
        return [(graph, files[graph.length]) for graph in transformer_graphs(MLP)]
    bundle, _ = request.getfixturevalue("inlined")
    return [(graph, bundle.path(graph.file)) for graph in transformer_graphs(tiny("linear"))]


@pytest.fixture
def openvino() -> ModuleType:
    module: ModuleType = pytest.importorskip("openvino", reason="OpenVINO is not installed on this platform")
    return module


def test_openvino_and_onnxruntime_run_it_as_the_reference_does(
    transformers: list[tuple[Graph, Path]], openvino: ModuleType
) -> None:
    def run_openvino(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
        # By itself it computes in bfloat16 on processors that have it.
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled(feeds)
        return {output.any_name: found[output] for output in compiled.outputs}

    def run_onnxruntime(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
        with OnnxRuntimeRunner(path, *read_signature(path)) as runner:
            return runner.run(feeds)

    for graph, path in transformers:
        for name, case in random_cases(graph).items():  # a batch of two, and of one
            with torch.no_grad():
                expected = graph.module(*case).numpy()
            feeds = {spec.name: value.numpy() for spec, value in zip(graph.inputs, case, strict=True)}
            for run in (run_openvino, run_onnxruntime):
                velocity = run(path, feeds)["velocity"]
                assert velocity.shape == expected.shape
                error = np.abs(velocity - expected).max() / np.abs(expected).max()
                assert error <= TOLERANCE, (graph.name, name, run.__name__)


def test_nothing_is_left_of_the_domain(transformers: list[tuple[Graph, Path]]) -> None:
    for graph, path in transformers:
        model = onnx.load(path, load_external_data=False)
        assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
        assert stored == set(graph.module.state_dict())  # by name, and none was copied into the graph


def test_openvino_refuses_what_is_not_inlined(shared_bundle: Path, openvino: ModuleType) -> None:
    """When it no longer does, `--inline` has lost its purpose."""
    with pytest.raises(Exception, match=rf"{DOMAIN}\.TTTLinear"):
        openvino.Core().read_model(shared_bundle / "transformer/model-3s.onnx")


def test_only_transformers_are_built_again(shared_bundle: Path, inlined: tuple[Bundle, list[str]]) -> None:
    before, (bundle, report) = open_bundle(shared_bundle).manifest, inlined
    bundle.verify()
    for name, graph in bundle.manifest.graphs.items():
        if name.startswith("transformer"):
            assert f"{name}: functions changed (kept → inlined)" in report
            assert [check.inputs for check in graph.parity] == [check.inputs for check in before.graphs[name].parity]
            assert before.files[graph.weights] == bundle.manifest.files[graph.weights]
        else:
            assert f"{name}: unchanged" in report and graph == before.graphs[name]


def test_inlined_nodes_are_not_for_plugins(run: Run, tmp_path: Path) -> None:
    code, _, err = run("export", "--engine", "tensorrt", "--gpu", "sm_89", "--inline", "--output", tmp_path / "bundle")
    assert code == 2 and "--inline" in err and "--no-plugin" in err
    assert not list(tmp_path.iterdir())
