"""Graphs of recordings in the torch engine: their modules are built again, with weights from a weight file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ttt_video_engine.engines.torch.components import Component, Tensors, transformer, vae_decoder
from ttt_video_engine.engines.torch.runner import TorchRunner, open_device
from ttt_video_engine.engines.torch.scan import find_scan, use_scan
from ttt_video_engine.engines.torch.weights import WeightSource, with_stored_weights
from ttt_video_engine.export.graphs.components import TransformerGraph, VaeGraph
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.runner import TensorSpec

_DTYPES: dict[torch.dtype, TensorDType] = {torch.float32: "float32", torch.int64: "int64"}


class TorchGraphs:
    """Opens graphs of float32 modules on a GPU, where torch has one, else on the CPU. Weight files go to `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._device = open_device(None)

    def open(self, graphs: Sequence[Graph]) -> list[TorchRunner]:
        """One runner for each graph of a component."""
        return [self._open(graph) for graph in graphs]

    def open_scan(self, ttt: TTTKind, scan: nn.Module, inputs: Tensors) -> TorchRunner:
        """`scan` takes the inputs of the TTT operator in their order."""
        specs = tuple(TensorSpec(name, "float32", tuple(value.shape)) for name, value in inputs.items())
        output = TensorSpec("XQW", "float32", tuple(inputs["XQ"].shape))
        component = _without_weights(scan, tuple(inputs), "XQW")
        return TorchRunner(ttt, component.build(), component, (specs, (output,)), self._device)

    def _open(self, graph: Graph) -> TorchRunner:
        inputs = tuple(
            TensorSpec(given.name, _DTYPES[given.example.dtype], _shape(given.example, given.free_axes))
            for given in graph.inputs
        )
        component = _component(graph)
        module = self._load(graph, component) if component.prefix else component.build()
        outputs = tuple(TensorSpec(name, "float32", ()) for name in graph.outputs)
        return TorchRunner(graph.name, module, component, (inputs, outputs), self._device)

    def _load(self, graph: Graph, component: Component) -> nn.Module:
        file = write_module(graph.module, self._folder / "model.onnx_data")
        source = WeightSource(file.path, file.ranges, component.prefix, "float32")
        module = with_stored_weights(component.build, source, self._device)
        if isinstance(module, DiffusionTransformer) and self._device.type == "cuda":
            use_scan(module, find_scan(module.config, "float32", self._folder)[0])
        return module


def _component(graph: Graph) -> Component:
    """Of a transformer or a VAE decoder; else of any module without weights that has one output."""
    module = graph.module
    if isinstance(module, TransformerGraph):
        return transformer(lambda: DiffusionTransformer(module.transformer.config))
    if isinstance(module, VaeGraph):
        return vae_decoder(lambda: VaeDecoder(module.decoder.config))
    (output,) = graph.outputs
    return _without_weights(module, tuple(given.name for given in graph.inputs), output)


def _without_weights(module: nn.Module, names: Sequence[str], output: str) -> Component:
    return Component(lambda: module, "", lambda module, inputs: {output: module(*(inputs[name] for name in names))})


def _shape(example: Tensor, free_axes: dict[int, str]) -> tuple[int | str, ...]:
    return tuple(free_axes.get(axis, size) for axis, size in enumerate(example.shape))
