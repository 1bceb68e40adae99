"""TensorRT-RTX builds the transformer for several devices without a GPU, with a layer for each collective."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from packages import tensorrt_rtx
from real_engines import skip_without_package

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import FOLDER, KERNELS, BuildSettings
from ttt_video_engine.export.engines import profiles
from ttt_video_engine.export.graphs.components import sharded_graph, transformer_graph
from ttt_video_engine.export.graphs.graph import read_signature, save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import tiny

GPU = "sm_89"
NUM_LAYERS = 2
COLLECTIVES = NUM_LAYERS * (4 + 2 * 5) + 1
"""q, k, v and the output of attention; in each direction of TTT also the rates; the velocity."""


@pytest.mark.parametrize(("devices", "ttt"), [(2, "linear"), (4, "mlp")])
def test_collectives_are_layers_of_tensorrt(devices: int, ttt: TTTKind, tmp_path: Path) -> None:
    skip_without_package(GPU)
    model = tiny(ttt)
    # TensorRT has no attention of one head of this size.
    config = replace(model.transformer, num_layers=NUM_LAYERS, model_dim=128, num_heads=8)
    model = replace(model, transformer=config)
    transformer = DiffusionTransformer(model.transformer).bfloat16().eval()
    graph = sharded_graph(transformer_graph(transformer, model, "3s"), devices)
    path = tmp_path / "model.onnx"
    save(trace(graph), path, write_module(graph.module, tmp_path / "model.onnx_data"), graph.ttt)
    assert _collectives(path) == [devices] * COLLECTIVES

    inputs, outputs = read_signature(path)
    (tmp_path / FOLDER).mkdir()
    request = BuildRequest(
        graph=graph.name,
        onnx=path,
        gpu=GPU,
        dtype="bfloat16",
        inputs=inputs,
        outputs=outputs,
        profiles=profiles(model, ["3s"], inputs, graph.name),
        settings=BuildSettings(optimization_level=0),
        kernels=tmp_path / KERNELS,
        scans=Scans(ttt, config.mini_batch_size, config.head_dim, count=2 * NUM_LAYERS),
    )
    engine = build_engine(request, tmp_path / FOLDER, lambda phase, done, total: None)
    assert engine.path.stat().st_size == engine.entry.size > 0
    assert len(engine.entry.plugins) == 2 * NUM_LAYERS


def _collectives(path: Path) -> list[int]:
    """The number of devices of each layer that TensorRT's parser makes of a collective."""
    package = tensorrt_rtx()
    builder = package.api.Builder(package.logger)
    network = builder.create_network(1 << int(package.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = package.api.OnnxParser(network, package.logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    return [layer.num_ranks for layer in layers if layer.type == package.api.LayerType.DIST_COLLECTIVE]
