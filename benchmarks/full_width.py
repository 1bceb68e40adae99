"""Builds a TensorRT engine for some layers of the 5B transformer, at full width and with the tokens of a 3 s video.

Needs no GPU. Prints the time and the peak memory of every step: writing the weights, tracing, and TensorRT's build.
"""

import argparse
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from measure import peak_memory, print_row, private_memory, reset_peak, table
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import BuildSettings, Profile, ShapeRange
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import preset

LENGTH = "3s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="sm_120")
    parser.add_argument("--ttt", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--no-plugin", action="store_true")
    options = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), options.ttt, options.num_layers, options.gpu, not options.no_plugin, rows)
    print(table(["step", "seconds", "peak GiB", "without mapped files", "result"], rows))


def build(folder: Path, ttt: TTTKind, num_layers: int, gpu: str, plugins: bool, rows: list[list[str]]) -> None:
    model = preset("5B", ttt)
    model = replace(model, transformer=replace(model.transformer, num_layers=num_layers))

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
    with measured(f"{num_layers} layers, random bfloat16 weights", result):
        torch.set_default_dtype(torch.bfloat16)
        transformer = DiffusionTransformer(model.transformer).eval()
        torch.set_default_dtype(torch.float32)
        graph = transformer_graph(transformer, model, LENGTH)
        weights = write_module(graph.module, folder / WEIGHTS_FILE)
        result.append(f"{weights.path.stat().st_size:,} bytes")

    result = []
    with measured("trace", result):
        path = folder / "model.onnx"
        onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
        result.append(f"{path.stat().st_size:,} bytes")
        name, weight_bytes = graph.name, weights.path.stat().st_size
        del transformer, graph
    inputs, outputs = onnx_graph.read_signature(path)
    shapes: Profile = {}
    for spec in inputs:
        low, high = (tuple(n if isinstance(axis, str) else axis for axis in spec.shape) for n in (1, 2))
        shapes[spec.name] = ShapeRange(min=low, opt=high, max=high)

    config = model.transformer
    request = BuildRequest(
        graph=name,
        onnx=path,
        gpu=gpu,
        dtype="bfloat16",
        inputs=inputs,
        outputs=outputs,
        profiles=(shapes,),
        settings=BuildSettings(plugins=plugins),
        kernels=folder / "kernels",
        scans=Scans(ttt, config.mini_batch_size, config.head_dim, count=2 * num_layers),
        weights=weight_bytes,
    )
    result = []
    with measured(f"TensorRT build for {gpu}", result):
        engine = build_engine(request, folder, lambda phase, done, total: None)
        layers = f"{len(engine.entry.plugins)} plugin layers" if engine.entry.plugins else engine.entry.fallback
        result.append(f"{engine.entry.size:,} bytes, {layers}")


if __name__ == "__main__":
    main()
