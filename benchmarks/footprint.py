"""Peak memory of each component in ONNX Runtime, measured in a subprocess, beside the estimate of `ttt-video plan`."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from measure import peak_memory, print_row, table

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.planning.memory import cpu_memory
from ttt_video_engine.planning.shapes import file_bytes, weight_shapes
from ttt_video_engine.runtime.bundle import (
    MANIFEST,
    TEXT_ENCODER,
    VAE_FIRST,
    Bundle,
    Manifest,
    open_bundle,
    transformer_graph_name,
)
from ttt_video_engine.runtime.config import ModelConfig, TTTChoice
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.stages import decode

CASES = (("text_encoder", 1), ("transformer", 1), ("transformer", 2), ("vae_decoder", 1))
"""(component, batch): the batch is the number of guidance branches, one with --low-memory."""
RUNS = 3
"""From the second run on, ONNX Runtime allocates memory as one block, which takes more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, action="append", help="bundle to measure; default: tiny and debug")
    parser.add_argument("--length", action="append", help="default: 9s")
    options = parser.parse_args()
    lengths = options.length or ["9s"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bundle in options.bundle or [
            _exported(Path(folder), name, ttt, lengths)
            for name in ("tiny", "debug")
            for ttt in ("linear", "mlp", "none")
        ]:
            for length in lengths:
                rows += [print_row(row) for row in rows_of(bundle, length)]
    print(table(["component", "batch", "measured MiB", "estimated MiB", "difference"], rows))


def rows_of(folder: Path, length: str) -> list[list[str]]:
    manifest = open_bundle(folder).manifest
    model, quantize, rows = manifest.model, manifest.quantize, []
    for component, batch in CASES:
        measured, estimated = compare(model, folder, component, length, batch, quantize)
        numbers = "" if quantize == "none" else f" {quantize}"
        name = f"{model.name} {model.transformer.ttt}{numbers} {length} {component}"
        mebibytes = [f"{size / 2**20:.0f}" for size in (measured, estimated)]
        rows.append([name, str(batch), *mebibytes, f"{estimated / measured - 1:+.1%}"])
    return rows


def compare(
    model: ModelConfig, folder: Path, component: str, length: str, batch: int, quantize: Quantization = "none"
) -> tuple[int, int]:
    """Measured and estimated peak memory in bytes."""
    program = (__file__, str(folder), component, length, str(batch))
    done = subprocess.run([sys.executable, *program], check=True, capture_output=True, text=True)
    weights = {name: file_bytes(shapes, "float32", quantize) for name, shapes in weight_shapes(model).items()}
    return int(done.stdout), cpu_memory(model, length, weights, low_memory=batch == 1)[component].total


def peak_of(folder: Path, component: str, length: str, batch: int) -> int:
    """Loads a component, runs it as the pipeline does, and returns the peak memory of this process in bytes."""
    # Skips the checks of open_bundle, because a test measures a folder with one graph.
    bundle = Bundle(folder, msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest))
    if component == "vae_decoder":
        return _peak_of_decoding(bundle, length)
    graph = TEXT_ENCODER if component == "text_encoder" else transformer_graph_name(length)
    sizes = {"batch": batch, "tokens": bundle.manifest.model.text_lengths[length]}
    inputs = {}
    for spec in bundle.graph(graph).inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        inputs[spec.name] = np.ones(shape, spec.array_dtype)
    with OnnxRuntimeLoader(bundle, provider="cpu")(graph) as runner:
        for _ in range(RUNS):
            runner.run(inputs)
    return peak_memory()


def _peak_of_decoding(bundle: Bundle, length: str) -> int:
    shape = bundle.graph(VAE_FIRST).inputs[0].shape
    frames = bundle.manifest.model.clip_size(length).num_frames
    latents = np.ones((1, frames, *(int(axis) for axis in shape[2:])), np.float32)
    for _ in decode(bundle, OnnxRuntimeLoader(bundle, provider="cpu"), latents):
        pass
    return peak_memory()


def _exported(parent: Path, name: str, ttt: TTTChoice, lengths: list[str]) -> Path:
    from ttt_video_engine.export.build import export_bundle
    from ttt_video_engine.export.sources.source import SeededSource
    from ttt_video_engine.runtime.presets import preset

    folder = parent / f"{name}-{ttt}"
    export_bundle(SeededSource(preset(name, ttt), seed=0), folder, lengths, "float32", lambda line: None)
    return folder


if __name__ == "__main__":
    if len(sys.argv) == 5 and not sys.argv[1].startswith("-"):
        _, folder, component, length, batch = sys.argv
        print(peak_of(Path(folder), component, length, int(batch)))
    else:
        main()
