"""Multiplies activations with the matrices of the layers in int8: `export --quantize int8`.

The scheme is that of ONNX Runtime's `quantize_dynamic`, whose nodes ONNX Runtime fuses: activations are quantised when
they are there, to uint8 by their own range (DynamicQuantizeLinear), weights when they are exported, each output channel
by a scale of its own. `quantize_dynamic` itself loads all weights at once, writes them once for each graph, and finds
them only in a graph that was optimised, in which ONNX Runtime has replaced the TTT nodes by their function bodies.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor
from ttt_video_engine.runtime.quantization import INTEGERS, SCALES, Quantization, is_quantized

LARGEST = 64
"""Of the integers of a weight: 7 bits and the sign of 8. Processors without VNNI instructions add two products of a
uint8 and an int8 in 16 bits, which hold 2·255·64 but not 2·255·127."""


def stored_names(weights: Iterable[str], quantize: Quantization) -> list[str]:
    """The names of the tensors that are stored for weights of these names, in their order."""
    if quantize == "none":
        return list(weights)
    return [
        stored for name in weights for stored in ((name + INTEGERS, name + SCALES) if is_quantized(name) else (name,))
    ]


def quantize_weights(weights: LazyStateDict) -> LazyStateDict:
    """The weights, with int8 [in, out] and a float32 scale [out] in place of each quantised one [out, in].

    The weight is about the integers times the scale of their output channel. Each is read twice, one at a time.
    """
    stored: dict[str, LazyTensor] = {}
    for name, weight in weights.items():
        if not is_quantized(name):
            stored[name] = weight
            continue
        rows, columns = weight.shape
        integers, scales = partial(_integers, weight), partial(_scales, weight)
        stored[name + INTEGERS] = replace(weight, shape=(columns, rows), dtype=torch.int8, read=integers)
        stored[name + SCALES] = replace(weight, shape=(rows,), dtype=torch.float32, read=scales)
    return stored


def _scales(weight: LazyTensor) -> Tensor:
    return _channel_scales(weight.read().detach().float())


def _integers(weight: LazyTensor) -> Tensor:
    """[in, out] of -LARGEST … LARGEST, rounded to nearest."""
    return _rounded(weight.read().detach().float()).t().contiguous().to(torch.int8)


def _rounded(value: Tensor) -> Tensor:
    """[out, in]: a weight in steps of its channels' scales, whole numbers in its own dtype."""
    return (value / _channel_scales(value)[:, None]).round_().clamp_(-LARGEST, LARGEST)


def _channel_scales(value: Tensor) -> Tensor:
    """[out] of a weight [out, in]; 1 for zeros. Not finite where a value is not, so that writing it fails."""
    largest = value.abs().amax(dim=1)
    return torch.where(largest == 0, 1.0, largest / LARGEST)


def round_like_int8(module: nn.Module) -> nn.Module:
    """The module, in float32, changed to round what its graph in int8 rounds: weights and what they multiply."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and is_quantized(f"{name}.weight"):
            weight = layer.weight.detach()
            layer.weight.data = _rounded(weight) * _channel_scales(weight)[:, None]
            layer.register_forward_pre_hook(_round_input)
    return module


def _round_input(_layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """What DynamicQuantizeLinear keeps: 256 levels from the least to the largest value and 0."""
    (x,) = inputs
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = torch.where(high == low, 1.0, (high - low) / 255)
    zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def quantize_products(model: ir.Model) -> None:
    """Replaces every product x·Wᵀ with a quantised weight W in place, and the weight by its integers and scales.

    Their values are placeholders, as `WeightFile.attach` replaces them. Raises ValueError for a quantised weight that
    anything else reads: the graph would need it in float32 as well.
    """
    graph = model.graph
    inputs: dict[ir.Value, tuple[ir.Value, ...]] = {}
    for name, weight in list(graph.initializers.items()):
        if not is_quantized(name):
            continue
        integers, scales = _placeholders(graph, weight)
        for transpose in [use.node for use in weight.uses()]:
            for product in [use.node for use in transpose.outputs[0].uses()]:
                x, second = product.inputs
                if (transpose.op_type, product.op_type) != ("Transpose", "MatMul") or second is not transpose.outputs[
                    0
                ]:
                    raise ValueError(f"{name}: is read by {transpose.op_type} and {product.op_type}, not by a product")
                if x is None:
                    raise ValueError(f"{name}: its product has no first input")
                if x not in inputs:
                    quantize = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
                    graph.insert_before(_first_use(graph, x), quantize)
                    inputs[x] = tuple(quantize.outputs)
                _replace(graph, product, inputs[x], integers, scales)
            graph.remove(transpose, safe=True)
        del graph.initializers[name]


def _replace(
    graph: ir.Graph, product: ir.Node, quantized: tuple[ir.Value, ...], integers: ir.Value, scales: ir.Value
) -> None:
    """Puts nodes that ONNX Runtime fuses to one in the place of a product: MatMulInteger, Cast, and two of Mul."""
    x, scale, zero = quantized
    multiply = ir.Node("", "MatMulInteger", [x, integers, zero])
    cast = ir.Node("", "Cast", multiply.outputs, [ir.AttrInt64("to", ir.DataType.FLOAT)])
    both = ir.Node("", "Mul", [scale, scales])
    rescale = ir.Node("", "Mul", [cast.outputs[0], both.outputs[0]])
    graph.insert_before(product, [multiply, cast, both, rescale])
    output = product.outputs[0]
    rescale.outputs[0].shape, rescale.outputs[0].type = output.shape, output.type
    ir.convenience.replace_all_uses_with(output, rescale.outputs[0])
    graph.remove(product, safe=True)


def _placeholders(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The initializers of a weight's integers and scales, registered, without memory for their values."""
    if weight.shape is None:
        raise ValueError(f"{weight.name}: has no shape")
    rows, columns = weight.shape.numpy()
    made = []
    for suffix, kind, shape in ((INTEGERS, np.int8, (columns, rows)), (SCALES, np.float32, (rows,))):
        tensor = ir.tensor(np.broadcast_to(np.zeros((), kind), shape), name=f"{weight.name}{suffix}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        made.append(value)
    integers, scales = made
    return integers, scales


def _first_use(graph: ir.Graph, value: ir.Value) -> ir.Node:
    users = {use.node for use in value.uses()}
    return next(node for node in graph if node in users)
