"""Lists the kernels that TensorRT-RTX makes of a graph, and what each reads and writes. Needs no GPU.

The builder's verbose log has a line for each kernel, with the shapes and dtypes of its tensors.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ttt_video_engine.engines.tensorrt.engine import Shape
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.runtime.errors import BackendError

FUSED_ATTENTION = "_gemm_mha"
"""The names of TensorRT-RTX 1.7's kernels for whole attention begin with it."""

_ITEM_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Bool": 1, "Int8": 1}


@dataclass(frozen=True)
class KernelTensor:
    """A tensor that a kernel reads or writes; of a slice, the slice's shape."""

    name: str
    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine. `kind` is TensorRT's: "gemm", "kgen" for fused elementwise work, "PluginV3", and others.

    `inputs` are without constants, such as weights. `nodes` are names of ONNX nodes that it computes, as far as the
    log gives them.
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        return self.name.startswith(FUSED_ATTENTION)


def list_kernels(
    onnx: Path, gpu: str, shapes: Mapping[str, Shape], plugins: AbstractContextManager[None] | None = None
) -> list[Kernel]:
    """The kernels of a graph in the order in which they run, for inputs of these shapes.

    TTT nodes are plugins where `plugins` is a block in which those are registered. Raises BackendError where TensorRT
    cannot build the graph.
    """
    package = load_package(package_for(gpu))
    api, logger = package.api, _logger(package.api)
    with plugins or nullcontext():
        builder = api.Builder(logger)
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = api.OnnxParser(network, logger)
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(api.ComputeCapability, gpu.replace("_", "").upper()), 0)
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
        if not parser.parse_from_file(str(onnx)) or builder.build_serialized_network(network, config) is None:
            cause = " ".join(logger.errors[0].split()) if logger.errors else "no reason was given"
            raise BackendError(f"{onnx}: {package.name} cannot build it for {gpu} ({cause})")
        del parser, network, builder
    return read_kernels(logger.lines)


def read_kernels(lines: list[str]) -> list[Kernel]:
    """The kernels that lines of a log state."""
    found = (re.match(r"Name: (.+?), LayerType: (\w+), Inputs: (.*)", line) for line in lines)
    return [_kernel(match[1], match[2], match[3]) for match in found if match is not None]


def _kernel(name: str, kind: str, rest: str) -> Kernel:
    inputs, _, rest = rest.partition("Outputs: [")
    outputs, _, rest = rest.partition("TacticName: ")
    nodes = tuple(re.findall(r"\[ONNX Layer: (.+?)\]", rest))
    return Kernel(name, kind, _tensors(inputs.partition("Constants: [")[0]), _tensors(outputs), nodes)


def _tensors(text: str) -> tuple[KernelTensor, ...]:
    found = re.findall(r"Name: (\S+), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)", text)
    return tuple(
        KernelTensor(name, tuple(int(size) for size in sizes.split(",") if size), dtype) for name, sizes, dtype in found
    )


def _logger(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]  # the base has no types
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.INTERNAL_ERROR, api.ILogger.Severity.ERROR):
                self.errors.append(message)
            if "LayerType: " in message:
                self.lines += message.splitlines()

    return Logger()
