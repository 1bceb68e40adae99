"""Converts a bfloat16 graph to float32 for the parity gate: ONNX Runtime does not support bfloat16 on CPUs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, numpy_helper

_NARROW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT


def upcast_bfloat16(path: Path, target: Path) -> Path:
    """Writes the graph at `path`, with its weights, to `target`, with float32 in place of bfloat16. Returns `target`.

    Weights and constants keep their values as rounded to bfloat16. Only the arithmetic is in float32.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        _load_external_data(tensor, path.parent)
    _upcast_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            _upcast_node(node)
    onnx.save_model(model, target, save_as_external_data=True, location=f"{target.name}_data")
    return target


def _load_external_data(tensor: TensorProto, folder: Path) -> None:
    """Reads the external data of a weight into `tensor`. onnx's own loader rejects hard links, which bundles share."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    location = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / location["location"]).open("rb") as file:
        file.seek(int(location["offset"]))
        tensor.raw_data = file.read(int(location["length"]))
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
