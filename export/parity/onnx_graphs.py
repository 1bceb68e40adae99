"""Graphs of recordings in ONNX Runtime: each is exported as for a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from torch import Tensor, nn

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner, num_cores
from ttt_video_engine.engines.sharded import ShardedGraphFile, ShardedRunner
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs import ttt_op
from ttt_video_engine.export.graphs.components import sharded_graph
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.runner import Runner
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES


class OnnxGraphs:
    """Exports graphs to `folder`, and opens them in ONNX Runtime: transformers over so many devices."""

    def __init__(self, folder: Path, devices: int = 1) -> None:
        self._folder, self._devices = folder, devices

    def open(self, graphs: Sequence[Graph]) -> Sequence[Runner]:
        """One runner for each graph of a component."""
        if self._devices > 1:
            graphs = [
                sharded_graph(graph, self._devices) if graph.component == "transformer" else graph for graph in graphs
            ]
        paths = _export(graphs, self._folder)
        return [open_graph(path, graph.devices) for path, graph in zip(paths, graphs, strict=True)]

    def open_scan(self, ttt: TTTKind, scan: nn.Module, inputs: Mapping[str, Tensor]) -> OnnxRuntimeRunner:
        """One TTT node and its body; `scan` is not exported."""
        path = self._folder / "scan.onnx"
        path.write_bytes(_scan_model(ttt, inputs).SerializeToString())
        return OnnxRuntimeRunner(path, *onnx_graph.read_signature(path))


def open_graph(path: Path, devices: int) -> OnnxRuntimeRunner | ShardedRunner:
    """A graph in this process, or one for several devices in as many processes, which share the cores."""
    signature = onnx_graph.read_signature(path)
    if devices == 1:
        return OnnxRuntimeRunner(path, *signature)
    return ShardedRunner(ShardedGraphFile(path, *signature, devices, max(1, num_cores() // devices)))


def _export(graphs: Sequence[Graph], folder: Path) -> list[Path]:
    """Exports the graphs of one component, which share a weight file. Returns their paths."""
    weights = write_module(graphs[0].module, folder / "model.onnx_data")
    paths = [folder / Path(graph.file).name for graph in graphs]
    for graph, path in zip(graphs, paths, strict=True):
        onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
    return paths


def _scan_model(ttt: TTTKind, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """One TTT node and its body."""

    def value(name: str, like: Tensor) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(like.shape))

    node = onnx.helper.make_node(OP_TYPES[ttt], list(inputs), ["XQW"], domain=DOMAIN)
    values = [value(name, tensor) for name, tensor in inputs.items()]
    graph = onnx.helper.make_graph([node], "scan", values, [value("XQW", inputs["XQ"])])
    opsets = [onnx.helper.make_opsetid("", onnx_graph.OPSET)]
    model = onnx.helper.make_model_gen_version(graph, opset_imports=opsets)
    ttt_op.add_function_body(model, ttt)
    onnx.checker.check_model(model)
    return model
