"""Builds TensorRT engines for some layers of the 5B transformer, at full width. Needs no GPU.

Prints the time and the peak memory of every step: writing the weights, tracing, and TensorRT's build. With --memory it
builds one and two layers for each of several lengths, with the options that `export` takes by default, and prints the
activations that TensorRT states for each batch beside those that `ttt-video plan` estimates.
"""

import argparse
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from measure import peak_memory, print_row, private_memory, reset_peak, table
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import BuildSettings, EngineEntry
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.engines import TRANSFORMER_BATCHES, profiles, workspace
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import sharded_graph, transformer_graph
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, write_module
from ttt_video_engine.planning.memory import gpu_activations, sharded_gpu_activations
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import ModelConfig, TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.ttt_op import PROJECTIONS_VERSION, exported_version, num_scans

LENGTHS = ("3s", "9s", "18s", "30s", "63s")


@dataclass(frozen=True)
class Slice:
    """Some layers of the transformer, for one length and GPU."""

    ttt: TTTKind
    length: str
    num_layers: int
    gpu: str
    dtype: DType
    plugins: bool
    devices: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="sm_120")
    parser.add_argument("--ttt", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--length", choices=LENGTHS, action="append", help="default: 3s; with --memory all")
    parser.add_argument("--num-layers", type=int, action="append", help="default: 2; with --memory 1 and 2")
    parser.add_argument("--devices", type=int, default=1, help="that one video runs on")
    parser.add_argument("--no-plugin", action="store_true")
    parser.add_argument("--memory", action="store_true", help="activations by length, instead of steps")
    options = parser.parse_args()
    common = {"ttt": options.ttt, "gpu": options.gpu, "dtype": options.dtype, "plugins": not options.no_plugin}
    common["devices"] = options.devices
    rows: list[list[str]] = []
    lengths = options.length or (LENGTHS if options.memory else ["3s"])
    numbers = options.num_layers or ([1, 2] if options.memory else [2])
    for part in (Slice(length=length, num_layers=number, **common) for number in numbers for length in lengths):
        with tempfile.TemporaryDirectory() as folder:
            steps, entry = build(Path(folder), part)
        rows += memory_rows(part, entry) if options.memory else steps
    memory = ["layers", "length", "batch", "TensorRT, bytes", "plan, bytes", "difference"]
    print(table(memory if options.memory else ["step", "seconds", "peak GiB", "without mapped files", "result"], rows))


def memory_rows(part: Slice, entry: EngineEntry) -> list[list[str]]:
    """One row per batch."""
    rows = []
    for batch, found in zip(TRANSFORMER_BATCHES, entry.activations, strict=True):
        model = sliced(part)
        planned = gpu_activations(model, part.length, part.dtype, batch)["transformer"]
        if part.devices > 1:
            planned = sharded_gpu_activations(model, part.length, part.dtype, batch, part.devices)
        sizes = [f"{found:,}", f"{planned:,}", f"{planned / found - 1:+.1%}"]
        rows.append(print_row([f"{part.ttt} {part.num_layers}", part.length, str(batch), *sizes]))
    return rows


def sliced(part: Slice) -> ModelConfig:
    """5B with the layers of the slice alone."""
    whole = preset("5B", part.ttt)
    return replace(whole, transformer=replace(whole.transformer, num_layers=part.num_layers))


def build(folder: Path, part: Slice) -> tuple[list[list[str]], EngineEntry]:
    """Rows of the steps, and what was built."""
    rows: list[list[str]] = []
    model = sliced(part)

    @contextmanager
    def measured(name: str, result: list[str]) -> Iterator[None]:
        gc.collect()
        reset_peak()
        start = perf_counter()
        with private_memory() as private:
            yield
        peaks = [f"{peak / 2**30:.2f}" for peak in (peak_memory(), private())]
        rows.append(print_row([name, f"{perf_counter() - start:.1f}", *peaks, *result]))

    result: list[str] = []
    with measured(f"{part.num_layers} layers, random {part.dtype} weights", result):
        torch.set_default_dtype(TORCH_DTYPES[part.dtype])
        transformer = DiffusionTransformer(model.transformer).eval()
        torch.set_default_dtype(torch.float32)
        graph = transformer_graph(transformer, model, part.length)
        if part.devices > 1:
            graph = sharded_graph(graph, part.devices)
        weights = write_module(graph.module, folder / WEIGHTS_FILE)
        result.append(f"{weights.path.stat().st_size:,} bytes")

    result = []
    with measured("trace", result):
        path = folder / "model.onnx"
        onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
        result.append(f"{path.stat().st_size:,} bytes")
        name, whole_name, weight_bytes = graph.name, graph.whole_name, weights.path.stat().st_size
        del transformer, graph
    inputs, outputs = onnx_graph.read_signature(path)

    config = model.transformer
    version = exported_version(part.dtype) if part.devices == 1 else PROJECTIONS_VERSION
    count = num_scans(config, model.clip_size(part.length), version)
    request = BuildRequest(
        graph=name,
        onnx=path,
        gpu=part.gpu,
        dtype=part.dtype,
        inputs=inputs,
        outputs=outputs,
        profiles=profiles(model, [part.length], inputs, name),
        settings=BuildSettings(plugins=part.plugins),
        kernels=folder / "kernels",
        scans=Scans(part.ttt, config.mini_batch_size, config.head_dim, count, version),
        weights=weight_bytes,
        workspace=workspace(model, [part.length], part.dtype, whole_name),
    )
    result = []
    with measured(f"TensorRT build for {part.gpu}", result):
        engine = build_engine(request, folder, lambda phase, done, total: None)
        layers = f"{len(engine.entry.plugins)} plugin layers" if engine.entry.plugins else engine.entry.fallback
        result.append(f"{engine.entry.size:,} bytes, {layers}")
    return rows, engine.entry


if __name__ == "__main__":
    main()
