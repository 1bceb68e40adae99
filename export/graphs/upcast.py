"""A bfloat16 graph as a float32 one, so that ONNX Runtime, which has no bfloat16 on CPUs, can run it for parity."""

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, numpy_helper

_NARROW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT


def upcast_bfloat16(path: Path, target: Path) -> Path:
    """Writes the graph at `path` to `target`, weights and all, with float32 wherever it has bfloat16.

    Weights and constants keep the values that bfloat16 left them; only the arithmetic between them is wider.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        _bring_in(tensor, path.parent)
    _upcast_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            _upcast_node(node)
    onnx.save_model(model, target, save_as_external_data=True, location=f"{target.name}_data")
    return target


def _bring_in(tensor: TensorProto, folder: Path) -> None:
    """Reads a weight of our own file. onnx's loader refuses a file of two names, as one is that two bundles share."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        tensor.raw_data = file.read(int(place["length"]))
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _upcast_graph(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _upcast_type(value.type)
    for tensor in graph.initializer:
        _upcast_tensor(tensor)
    for node in graph.node:
        _upcast_node(node)


def _upcast_node(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == _NARROW:
            attribute.i = _WIDE
        elif attribute.type == AttributeProto.TENSOR:
            _upcast_tensor(attribute.t)
        elif attribute.type == AttributeProto.GRAPH:
            _upcast_graph(attribute.g)


def _upcast_type(kind: TypeProto) -> None:
    if kind.tensor_type.elem_type == _NARROW:
        kind.tensor_type.elem_type = _WIDE


def _upcast_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == _NARROW:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
