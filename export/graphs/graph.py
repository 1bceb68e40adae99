"""Exports a PyTorch module to an ONNX graph in which weights keep their names."""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from ttt_video_engine.export.graphs.attention_op import attention_as_operators
from ttt_video_engine.export.graphs.parts import layers_in_parts
from ttt_video_engine.export.graphs.projections_op import layers_as_nodes
from ttt_video_engine.export.graphs.quantize import quantize_products
from ttt_video_engine.export.graphs.repeat import TRACED, first_layers_only, repeat_last_layer
from ttt_video_engine.export.graphs.scan_parts import scans_in_parts
from ttt_video_engine.export.graphs.shard import sharded_layers
from ttt_video_engine.export.graphs.timestep import accurate_timestep
from ttt_video_engine.export.graphs.ttt_op import add_function_body, inline_function_body, scans_as_nodes
from ttt_video_engine.export.graphs.weights import WeightFile
from ttt_video_engine.runtime.bundle import sharded_name
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.ttt_op import (
    COLLECTIVE,
    DOMAIN,
    PART_VERSION,
    PROJECTIONS_VERSION,
    VERSION,
    OpVersion,
)

OPSET = 23
"""Opset 23 is the first with Attention and RotaryEmbedding."""

_NORM = ".ttt_norm_weight"
FOLD_LIMIT = 1024
"""Bytes. Larger constants, such as tables that grow with the clip, are left for the runtime to fold."""


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""Inputs and outputs of a graph."""

_DTYPES: dict[int, TensorDType] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT64: "int64",
}


@dataclass(frozen=True)
class Input:
    """An input of a graph: an example tensor, and the names of its dynamic axes by index.

    The values of a floating-point example do not matter.
    """

    name: str
    example: Tensor
    free_axes: dict[int, str]


@dataclass(frozen=True)
class Graph:
    """A graph to export: a module with named inputs and outputs.

    Only shapes and dtypes of weights and inputs matter, so the module may have placeholder weights. `ttt` is the kind
    of its TTT nodes, None if it has none, `op_version` their version. `length` is the clip length of the graph, "any"
    if all lengths share it. `layers` is the attribute that holds the module's list of identical layers, empty if it has
    none. With `inline`, TTT nodes are written as standard operators. With `quantize`, the matrices of the layers are
    int8 (`quantize.py`). More than one of `devices` run a `ShardedTransformerGraph` together.
    """

    name: str
    file: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    ttt: TTTKind | None = None
    length: str = "any"
    layers: str = ""
    inline: bool = False
    quantize: Quantization = "none"
    op_version: OpVersion = PROJECTIONS_VERSION
    devices: int = 1

    @property
    def component(self) -> str:
        """The component's folder in a bundle. All graphs of one module share it."""
        return self.file.partition("/")[0]

    @property
    def whole_name(self) -> str:
        """Name of the graph that computes the same on one device."""
        return self.name.removesuffix(sharded_name("", self.devices))


def trace(graph: Graph) -> ir.Model:
    """Traces a graph to standard operators and TTT nodes. Weights have the names that they have in the module.

    Identical layers are traced once and repeated (`repeat.py`); the weights of the repeated layers have no values. A
    quantised weight is two tensors, named after it (`quantize.py`).
    Raises RuntimeError if the exporter returns no program.
    """
    with first_layers_only(graph.module, graph.layers) as num_layers:
        model = _export_module(graph)
    if num_layers > TRACED:
        repeat_last_layer(model, f"{graph.layers}.", num_layers)
        passes.NameFixPass()(model)
    if graph.quantize == "int8":
        quantize_products(model)
        passes.NameFixPass()(model)
    _name_scans(model)
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's metadata: source lines and paths of this machine
    return model


def _export_module(graph: Graph) -> ir.Model:
    module, inputs = graph.module, graph.inputs
    axes = {name: torch.export.Dim(name, min=1) for spec in inputs for name in spec.free_axes.values()}
    as_nodes = {VERSION: scans_as_nodes, PROJECTIONS_VERSION: layers_as_nodes, PART_VERSION: scans_in_parts}
    nodes = nullcontext() if graph.ttt is None else as_nodes[graph.op_version](module, graph.ttt)
    layers = nullcontext() if graph.op_version == VERSION else layers_in_parts(module)
    if graph.devices > 1:
        nodes, layers = nullcontext(), sharded_layers(module, graph.ttt)
    shapes = tuple({axis: axes[name] for axis, name in spec.free_axes.items()} for spec in inputs)
    with (
        _silence_exporter(),
        _nothing_collected(),
        torch.no_grad(),
        # TensorRT-RTX cannot build RotaryEmbedding beside the body of version 1.
        nullcontext() if graph.op_version == VERSION else attention_as_operators(module),
        # OpenVINO 2026.4 gives wrong velocities with these operators (5e-2, on random inputs).
        nullcontext() if graph.inline else accurate_timestep(module),
        layers,
        nodes,
    ):
        program = torch.onnx.export(
            module,
            tuple(spec.example for spec in inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=list(graph.outputs),
            dynamic_shapes=shapes if axes else None,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the exporter returned no program")
        model = program.model
        _simplify(model, weights=set(module.state_dict()))
    return model


def save(model: ir.Model, path: Path, weights: WeightFile, ttt: TTTKind | None = None, *, inline: bool = False) -> None:
    """Writes a graph beside its weight file and runs onnx's checker on it.

    TTT nodes get their function body; with `inline` the body replaces each node.
    """
    weights.attach(model)
    proto = ir.to_proto(model)
    if ttt is not None:
        version = next(entry.version for entry in proto.opset_import if entry.domain == DOMAIN)
        add_function_body(proto, ttt, next(known for known in get_args(OpVersion) if known == version))
    if inline and ttt is not None:
        proto = inline_function_body(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    _check(proto)


def read_signature(path: Path) -> Signature:
    """Inputs and outputs of an ONNX file. Raises BackendError for an unsupported dtype."""
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = (tuple(_spec(path, value) for value in values) for values in (graph.input, graph.output))
    return inputs, outputs


def _spec(path: Path, value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise BackendError(f"{path}: {value.name} is {name}; must be one of {', '.join(_DTYPES.values())}")
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, _DTYPES[tensor.elem_type], shape)


def _check(proto: onnx.ModelProto) -> None:
    """Runs onnx's checker on the graph with its external weights declared as inputs.

    The weight file may be a hard link to a file of the previous bundle, which the checker rejects as an attack. The
    check also does not need to read the weights.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    for weight in proto.graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
        else:
            bare.graph.initializer.append(weight)
    onnx.checker.check_model(bare)


def _simplify(model: ir.Model, weights: set[str]) -> None:
    """The passes of `torch.onnx.export` with optimize=True, but weights are not folded: they keep their names."""
    passes.InlinePass()(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=FOLD_LIMIT,
        output_size_limit=FOLD_LIMIT,
        should_fold=lambda node: False if any(v is not None and v.name in weights for v in node.inputs) else None,
    )
    for clean_up in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        _DeduplicateConstants(weights),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        clean_up(model)


class _DeduplicateConstants(passes.DeduplicateInitializersPass):
    """Merges equal constants, but not weights: weights that are equal in one checkpoint may differ in another."""

    def __init__(self, weights: set[str]) -> None:
        super().__init__()
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        values = {name: value for name, value in model.graph.initializers.items() if name in self._weights}
        tensors = {name: value.const_value for name, value in values.items()}
        for value in values.values():
            value.const_value = None  # the pass skips initializers without values
        result = super().call(model)
        for name, value in values.items():
            value.const_value = tensors[name]
        return result


def _name_scans(model: ir.Model) -> None:
    """Names each TTT node after its layer and direction, for error messages: `<layer>.forward`, `<layer>.backward`.

    The further parts of a scan have their number behind it.
    """
    layers: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type != COLLECTIVE:
            names = [_origin(value).name or "" for value in node.inputs if value is not None]
            norm = next((name for name in names if name.endswith(_NORM)), f"ttt{_NORM}")
            layers.setdefault(norm.removesuffix(_NORM), []).append(node)
    for layer, nodes in layers.items():
        parts = max(1, len(nodes) // 2)
        for number, node in enumerate(nodes):
            direction = ("forward", "backward")[number // parts]
            node.name = f"{layer}.{direction}" + (f"{number % parts + 1}" if number % parts else "")


def _origin(value: ir.Value) -> ir.Value:
    """The tensor that a device's part of it was taken from; `value` itself where it is no such part."""
    node = value.producer()
    whole = node.inputs[0] if node is not None and node.op_type == "Gather" else None
    return value if whole is None else whole


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Pauses garbage collection. The exporter's objects live until it ends; to look through them again and again takes
    an eighth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppresses warnings and log lines of the exporter, which concern optional packages. Errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
