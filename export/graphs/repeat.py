"""Makes the graph of a deep transformer from a shallow one. Layers are identical, and tracing each takes seconds.

The first two layers are traced, with a marker node after each. The second is the pattern: it is copied once for each
remaining layer, with that layer's weights. The first layer cannot be the pattern, because it also computes what all
layers share.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ttt_video_engine.runtime.ttt_op import DOMAIN

TRACED = 2
_MARK = "EndOfLayer"


@contextmanager
def first_layers_only(module: nn.Module, layers: str) -> Iterator[int]:
    """Within the block, `module` has only the first `TRACED` of its `layers`, each followed by a marker node.

    Yields the full number of layers. Does nothing if there are no more than `TRACED`, or if `layers` is empty.
    """
    owner, _, name = layers.rpartition(".")
    whole = getattr(module.get_submodule(owner), name) if layers else nn.ModuleList()
    if len(whole) <= TRACED:
        yield len(whole)
        return
    hooks = [layer.register_forward_hook(_mark) for layer in whole[:TRACED]]
    try:
        setattr(module.get_submodule(owner), name, whole[:TRACED])
        yield len(whole)
    finally:
        setattr(module.get_submodule(owner), name, whole)
        for hook in hooks:
            hook.remove()


def _mark(layer: nn.Module, inputs: tuple[object, ...], output: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_MARK}", (output,), {}, dtype=output.dtype, shape=output.shape, version=1
    )


def repeat_last_layer(model: ir.Model, prefix: str, num_layers: int) -> None:
    """Extends `model` in place from `TRACED` layers to `num_layers`. Weights are named `{prefix}{layer}.…`.

    Weights of the new layers are initializers of the right shape and dtype; their values are those of the pattern.
    """
    graph = model.graph
    marks = [node for node in graph if node.op_type == _MARK]
    pattern = _nodes_of_last_layer(graph, marks, prefix)
    start, end = marks[-2].outputs[0], _only(marks[-1].inputs)
    layer_output = end
    for layer in range(TRACED, num_layers):
        new = {start: layer_output}
        for node in pattern:
            copied = _copy(node, new, partial(_weight, graph, prefix, layer))
            graph.insert_before(marks[-1], copied)
        layer_output = new[end]
    ir.convenience.replace_all_uses_with(marks[-1].outputs[0], layer_output)
    for mark in marks[:-1]:
        ir.convenience.replace_all_uses_with(mark.outputs[0], _only(mark.inputs))
    graph.remove(marks, safe=True)


def _nodes_of_last_layer(graph: ir.Graph, marks: list[ir.Node], prefix: str) -> list[ir.Node]:
    """Nodes of the last traced layer: those that read its weights or its input, directly or through other nodes."""
    inside, after = {marks[-2].outputs[0]}, {marks[-1].outputs[0]}
    weights = f"{prefix}{TRACED - 1}."
    nodes = []
    for node in graph:
        values = [value for value in node.inputs if value is not None]
        if node is marks[-1]:
            continue
        if any(value in after for value in values):
            after.update(node.outputs)
        elif any(value in inside or (value.name or "").startswith(weights) for value in values):
            inside.update(node.outputs)
            nodes.append(node)
    return nodes


def _copy(node: ir.Node, new: dict[ir.Value, ir.Value], weight: Callable[[ir.Value], ir.Value]) -> ir.Node:
    """A copy of the node whose inputs are mapped through `new`, to which its outputs are added."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else new.get(value) or weight(value) for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
    )
    for old, made in zip(node.outputs, copy.outputs, strict=True):
        made.shape, made.type = old.shape, old.type
        new[old] = made
    return copy


def _weight(graph: ir.Graph, prefix: str, layer: int, value: ir.Value) -> ir.Value:
    """The given layer's weight in place of the pattern's. Any other value is shared by all layers."""
    name = value.name or ""
    pattern = f"{prefix}{TRACED - 1}."
    if not name.startswith(pattern):
        return value
    name = f"{prefix}{layer}.{name.removeprefix(pattern)}"
    if name not in graph.initializers:
        made = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        graph.register_initializer(made)
    return graph.initializers[name]


def _only(values: Sequence[ir.Value | None]) -> ir.Value:
    (value,) = values
    if value is None:
        raise ValueError("a marker node has no input")
    return value
