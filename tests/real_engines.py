"""Engines that tests build for a GPU: of graphs of a bundle, and of a single TTT node."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx
import pytest
from torch import Tensor

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import FOLDER, KERNELS, BuildSettings, EngineFile
from ttt_video_engine.engines.tensorrt.operators import Operator, PartOperator, ProjectionsOperator, ScanOperator
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.export.engines import profiles
from ttt_video_engine.export.graphs.graph import OPSET, read_signature
from ttt_video_engine.runtime.bundle import Bundle, transformer_graph_name
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, exported_version, num_scans

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
        version, scans = exported_version(manifest.dtype), None
        for length in manifest.lengths:
            if name == transformer_graph_name(length):
                count = num_scans(config, manifest.model.clip_size(length), version)
                scans = Scans(config.ttt_kind, config.mini_batch_size, config.head_dim, count, version)
        request = BuildRequest(
            graph=name,
            onnx=bundle.path(graph.file),
            gpu=gpu,
            dtype=manifest.dtype,
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=profiles(manifest.model, manifest.lengths, graph.inputs, name),
            settings=BuildSettings(plugins=plugins),
            kernels=bundle.root / KERNELS,
            scans=scans,
            weights=manifest.files[graph.weights].size,
            key={
                "graph": manifest.files[graph.file].sha256,
                "weights": manifest.files[graph.weights].sha256,
                "precision": manifest.dtype,
            },
        )
        build_engine(request, bundle.root / FOLDER, lambda phase, done, total: None)


OPERATORS: dict[int, Callable[[TTTKind], Operator]] = {1: ScanOperator, 2: ProjectionsOperator, 3: PartOperator}


def build_scan(
    folder: Path, op: TTTKind, dtype: DType, tensors: Mapping[str, Tensor], gpu: str, version: int
) -> EngineFile:
    """An engine of one TTT node, as a plugin, of a version, with these inputs. Integers are constants.

    Its graph has the name of a transformer's, so that runs are captured.
    """
    operator = OPERATORS[version](op)
    names, shapes = list(tensors), [tuple(tensor.shape) for tensor in tensors.values()]
    kinds = dict(zip(names, operator.dtypes(), strict=True))
    own = {None: ONNX_DTYPES[dtype], "float32": onnx.TensorProto.FLOAT}
    inputs = [
        onnx.helper.make_tensor_value_info(name, own[kinds[name]], shape)
        for name, shape in zip(names, shapes, strict=True)
        if kinds[name] in own
    ]
    constants = [
        onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items() if kinds[name] == "int32"
    ]
    made = [onnx.helper.make_tensor_value_info("XQW", ONNX_DTYPES[dtype], shapes[0])]
    made += [
        onnx.helper.make_tensor_value_info(f"{names[place]}_left", onnx.TensorProto.FLOAT, shapes[place])
        for place in operator.carried()
    ]
    plugin = {"plugin_namespace": DOMAIN, "plugin_version": str(version)}
    outputs_made = [value.name for value in made]
    node = onnx.helper.make_node(OP_TYPES[op], names, outputs_made, name="scan", domain=DOMAIN, **plugin)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, version)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "scan", inputs, made, constants), opset_imports=opsets, ir_version=10
    )
    path = folder / "scan.onnx"
    onnx.save(model, path)
    found, outputs = read_signature(path)
    mini_batch_size, head_dim = operator.scan_size(shapes)
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
        scans=Scans(op, mini_batch_size, head_dim, count=1, version=operator.version),
    )
    return build_engine(request, folder / FOLDER, lambda phase, done, total: None)
