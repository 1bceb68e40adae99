"""Prints what the kernels of a TensorRT-RTX engine read and write for each token, from the build's log. Needs no GPU.

Builds one layer of the 5B transformer in bfloat16 for one guidance branch, with the TTT plugin. Each row is the work
between two matrix products, attention or TTT scans. What its kernels pass on to each other would stay on chip if they
were one kernel. A second table has the surroundings of the TTT operator in its two versions.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import onnx
import torch
from measure import table
from msgspec.structs import replace

from ttt_video_engine.engines.kernels.compile import compile_kernel
from ttt_video_engine.engines.tensorrt.layers import Kernel, list_kernels
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.engines.tensorrt.plugin import registered_plugins
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.graph import save, trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, TransformerConfig, TTTKind
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.ttt_op import VERSION

BF16, FP32, INT32 = 2, 4, 4
"""Bytes of an element."""
SCAN = "custom_layer"
"""TensorRT's kind of a plugin's kernel."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """The kernels of an engine between two that compute a matrix product, an attention or a scan."""

    after: str
    before: str
    kernels: tuple[Kernel, ...]

    @property
    def read(self) -> int:
        return sum(tensor.bytes for kernel in self.kernels for tensor in kernel.inputs)

    @property
    def written(self) -> int:
        return sum(tensor.bytes for kernel in self.kernels for tensor in kernel.outputs)

    @property
    def passed_on(self) -> int:
        """Bytes that one kernel of the stage writes and another reads, both counted."""
        written = {tensor.name: tensor.bytes for kernel in self.kernels for tensor in kernel.outputs}
        found = [tensor for kernel in self.kernels for tensor in kernel.inputs if tensor.name in written]
        return sum(tensor.bytes for tensor in found) + sum(written[name] for name in {tensor.name for tensor in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="sm_120")
    parser.add_argument("--ttt", choices=["linear", "mlp"], default="mlp")
    parser.add_argument("--length", choices=list(SCENES_PER_LENGTH), default="3s")
    options = parser.parse_args()
    model = preset("5B", options.ttt)
    tokens = model.clip_size(options.length).num_tokens(model.transformer.patch_size)
    with tempfile.TemporaryDirectory() as folder:
        graph, kernels = build(Path(folder), options.ttt, options.length, options.gpu)
    found = stages(kernels, matrices(graph))
    rows = [
        [f"{stage.after} → {stage.before}", str(len(stage.kernels)), *per_token(stage, tokens)]
        for stage in found
        if stage.read + stage.written > tokens * BF16  # not what is done once for a clip
    ]
    print(table(["between", "kernels", "read", "written", "passed on"], rows), end="\n\n")
    print(table(["TTT operator, one direction", "read", "written"], operator_rows(found, model.transformer, tokens)))


def build(folder: Path, ttt: TTTKind, length: str, gpu: str) -> tuple[onnx.GraphProto, list[Kernel]]:
    model = preset("5B", ttt)
    config = replace(model.transformer, num_layers=1)
    model = replace(model, transformer=config)
    module = on_meta_device(lambda: DiffusionTransformer(config)).to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        values = torch.randn(65_537).to(torch.bfloat16)  # repeated, which is faster; a prime, so that no rows are equal
        for weight in module.parameters():
            weight.copy_(values.repeat(weight.numel() // len(values) + 1)[: weight.numel()].view(weight.shape))
    graph = dataclasses.replace(transformer_graph(module, model, length), op_version=VERSION)
    path = folder / "model.onnx"
    save(trace(graph), path, write_module(graph.module, folder / "model.onnx_data"), ttt)
    kernels = folder / "kernels"
    kernels.mkdir()
    sizes = {"mini_batch_size": config.mini_batch_size, "head_dim": config.head_dim}
    compile_kernel(ttt, gpu=gpu, dtype="bfloat16", folder=kernels, **sizes)
    shapes = {spec.name: (1, *spec.example.shape[1:]) for spec in graph.inputs}
    plugins = registered_plugins(load_package("tensorrt_rtx"), kernels, gpu)
    return onnx.load(path, load_external_data=False).graph, list_kernels(path, gpu, shapes, plugins)


def matrices(graph: onnx.GraphProto) -> dict[str, str]:
    """ONNX node that takes a weight matrix → the module of the weight, without those of the learning rates."""
    weights = {tensor.name for tensor in graph.initializer if tensor.name.endswith(".weight")}
    return {
        node.name: value.removesuffix(".weight").rpartition(".")[2]
        for node in graph.node
        for value in node.input
        if value in weights and node.op_type in ("Transpose", "MatMul", "Gemm", "Conv")
    }


def label(kernel: Kernel, modules: dict[str, str]) -> str:
    """What an attention, a scan or a product with weights is called; empty for other kernels."""
    if kernel.is_attention:
        return "attention"
    if kernel.kind == SCAN:
        return f"TTT {kernel.name.partition('_myl')[0].rpartition('.')[2]}"
    if kernel.kind == "kgen":
        return ""
    return ", ".join(dict.fromkeys(modules[node] for node in reversed(kernel.nodes) if node in modules))


def per_token(stage: Stage, tokens: int) -> list[str]:
    return [f"{size / tokens:,.0f}" for size in (stage.read, stage.written, stage.passed_on)]


def operator_rows(found: Sequence[Stage], config: TransformerConfig, tokens: int) -> list[list[str]]:
    """Bytes per token before, in and after the scan. Version 1 as built; version 2 as the shapes of its inputs say.

    Version 2: one kernel brings a chunk into the order of the scan, which reads it; learning rates of a token are
    logits, [H]. Each head reads the rotary tables again, which a cache holds: they are counted once.
    """
    clip, rates, angles = BF16 * config.model_dim, FP32 * config.num_heads, 2 * FP32 * config.head_dim // 2
    logits, order = BF16 * config.num_heads, 2 * INT32
    before = next(stage for stage in found if stage.before == "TTT forward")
    after = next(stage for stage in found if stage.after == "TTT forward")
    scan = (3 * clip + rates, clip)
    rows = [
        ("version 1: norm, rotary, targets, rates, order", before.read / tokens, before.written / tokens),
        ("version 1: scan", *scan),
        ("version 1: norm of the output", after.read / tokens, after.written / tokens),
        ("version 2: logits of the rates", clip, logits),
        ("version 2: a chunk into the order of the scan", 3 * clip + logits + angles + order, 3 * clip + rates),
        ("version 2: scan", *scan),
        ("version 2: norm of the output", clip, clip),
    ]
    return [[name, f"{read:,.0f}", f"{written:,.0f}"] for name, read, written in rows]


def stages(kernels: Sequence[Kernel], modules: dict[str, str]) -> list[Stage]:
    """Signals and waits between streams are left out: kernels without inputs."""
    working = [kernel for kernel in kernels if kernel.inputs]
    labels = [label(kernel, modules) for kernel in working]
    anchors = [-1, *(index for index, name in enumerate(labels) if name), len(working)]
    names = ["input", *(name for name in labels if name), "output"]
    return [
        Stage(names[i], names[i + 1], tuple(working[start + 1 : end]))
        for i, (start, end) in enumerate(pairwise(anchors))
        if end > start + 1
    ]


if __name__ == "__main__":
    main()
