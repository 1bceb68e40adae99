"""Engines that tests build for a GPU: of graphs of a bundle, and of a single TTT node."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
import pytest

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import FOLDER, KERNELS, BuildSettings, EngineFile
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.export.engines import profiles
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.graph import OPSET, read_signature, save, trace
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, lay_out
from ttt_video_engine.reference.checkpoints.lazy import lazy_state
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.ttt_op import DOMAIN, INPUTS, OP_TYPES, VERSION

ONNX_DTYPES: dict[DType, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}


def skip_without_package(gpu: str) -> None:
    """Skips the test where the TensorRT package for this GPU is not installed."""
    try:
        load_package(package_for(gpu))
    except BackendError as error:
        pytest.skip(str(error))


def build_graphs(bundle: Bundle, graphs: Iterable[str], gpu: str, *, plugins: bool) -> None:
    """Adds an engine of each graph to a bundle, with the shapes that the pipeline uses."""
    manifest = bundle.manifest
    config = manifest.model.transformer
    (bundle.root / FOLDER).mkdir(exist_ok=True)
    for name in graphs:
        graph = manifest.graphs[name]
        assert config.ttt_kind is not None
        scans = Scans(config.ttt_kind, config.mini_batch_size, config.head_dim, count=2 * config.num_layers)
        request = BuildRequest(
            graph=name,
            onnx=_with_version_1(bundle, name)
            if plugins and name.startswith("transformer")
            else bundle.path(graph.file),
            gpu=gpu,
            dtype=manifest.dtype,
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=profiles(manifest.model, manifest.lengths, graph.inputs, name),
            settings=BuildSettings(plugins=plugins),
            kernels=bundle.root / KERNELS,
            scans=scans if name.startswith("transformer") else None,
            weights=manifest.files[graph.weights].size,
            key={
                "graph": manifest.files[graph.file].sha256,
                "weights": manifest.files[graph.weights].sha256,
                "precision": manifest.dtype,
            },
        )
        build_engine(request, bundle.root / FOLDER, lambda phase, done, total: None)


def _with_version_1(bundle: Bundle, name: str) -> Path:
    """The transformer of a bundle with TTT nodes that are plugins', in a file of its own."""
    manifest = bundle.manifest
    entry = manifest.graphs[name]
    dtype = TORCH_DTYPES[manifest.dtype]
    module = with_placeholder_weights(lambda: DiffusionTransformer(manifest.model.transformer), dtype)
    graph = transformer_graph(module, manifest.model, name.removeprefix("transformer-"))
    graph = dataclasses.replace(graph, op_version=VERSION)
    path = bundle.path(entry.file).with_name(f"plugins-{graph.length}.onnx")
    save(
        trace(graph), path, lay_out(lazy_state(graph.module.state_dict()), bundle.path(entry.weights), dtype), graph.ttt
    )
    return path


def build_scan(folder: Path, op: TTTKind, dtype: DType, shapes: Sequence[Sequence[int]], gpu: str) -> EngineFile:
    """An engine of one TTT node, as a plugin. Its graph has the name of a transformer's, so that runs are captured."""
    names, kind = INPUTS[op], ONNX_DTYPES[dtype]
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT if name == "eta" else kind, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    output = onnx.helper.make_tensor_value_info("XQW", kind, shapes[0])
    plugin = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    node = onnx.helper.make_node(OP_TYPES[op], list(names), ["XQW"], name="scan", domain=DOMAIN, **plugin)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "scan", inputs, [output]), opset_imports=opsets, ir_version=10
    )
    path = folder / "scan.onnx"
    onnx.save(model, path)
    found, outputs = read_signature(path)
    _, _, _, mini_batch_size, head_dim = shapes[0]
    (folder / FOLDER).mkdir(exist_ok=True)
    request = BuildRequest(
        graph="transformer-scan",
        onnx=path,
        gpu=gpu,
        dtype=dtype,
        inputs=found,
        outputs=outputs,
        profiles=(),
        settings=BuildSettings(),
        kernels=folder / KERNELS,
        scans=Scans(op, mini_batch_size, head_dim, count=1),
    )
    return build_engine(request, folder / FOLDER, lambda phase, done, total: None)
