"""Times one step of the transformer: ONNX Runtime against the PyTorch reference, and over the length of the clip."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, print_row, table

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import random_cases
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, TTTKind
from ttt_video_engine.runtime.presets import preset

AIM = 2.0
"""Wanted speedup of ONNX Runtime over the reference."""

MAX_GROWTH = 1.15
"""Upper bound of the time per token of the longest clip over that of 9 s: the cost is linear in length."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class Case:
    """One step with the same inputs in both implementations, and its tokens."""

    tokens: int
    reference: Callable[[], Array]
    onnx_runtime: Callable[[], Array]


@contextmanager
def exported(name: str, ttt: TTTKind, length: str) -> Iterator[Case]:
    """A preset's transformer with random weights, both guidance branches (batch 2), float32, on all cores."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    model = preset(name, ttt)
    graph = transformer_graph(SeededSource(model, seed=0).transformer().load(), model, length)
    cases = random_cases(graph)["random, batch 2"]
    examples = {spec.name: case for spec, case in zip(graph.inputs, cases, strict=True)}
    arrays = {key: example.numpy() for key, example in examples.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        weights = write_module(graph.module, path.with_name(WEIGHTS_FILE))
        onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
        inputs, outputs = onnx_graph.read_signature(path)
        with OnnxRuntimeRunner(path, inputs, outputs, num_threads=threads) as runner:

            def reference() -> Array:
                with torch.no_grad():
                    velocity: Array = graph.module(**examples).numpy()
                return velocity

            yield Case(
                tokens=model.clip_size(length).num_tokens(model.transformer.patch_size),
                reference=reference,
                onnx_runtime=lambda: runner.run(arrays)["velocity"],
            )


def against_reference() -> str:
    rows = []
    for name in ("tiny", "debug"):
        for ttt in ("linear", "mlp"):
            for length in ("9s", "63s"):
                with exported(name, ttt, length) as case:
                    error = float(np.abs(case.reference() - case.onnx_runtime()).max())
                    repetitions = 3 if (name, length) == ("debug", "63s") else 5
                    reference, onnx_runtime = interleaved([case.reference, case.onnx_runtime], repetitions)
                ratio = reference / onnx_runtime
                row = [
                    f"{name} {ttt} {length}",
                    f"{case.tokens}",
                    f"{reference * 1e3:.0f}",
                    f"{onnx_runtime * 1e3:.0f}",
                    f"{ratio:.2f}x",
                    "met" if ratio >= AIM else "missed",
                    f"{error:.1e}",
                ]
                rows.append(print_row(row))
    header = ["step", "tokens", "PyTorch ms", "ONNX Runtime ms", "faster", f"aim {AIM:g}x", "max error"]
    return table(header, rows)


def over_length() -> str:
    """Measures the lengths one after the other: taking turns would need all sessions in memory at once."""
    rows, per_token = [], {}
    for length in SCENES_PER_LENGTH:
        with exported("tiny", "linear", length) as case:
            (seconds,) = interleaved([case.onnx_runtime], repetitions=7)
        per_token[length] = seconds / case.tokens
        row = [length, f"{case.tokens}", f"{seconds * 1e3:.1f}", f"{per_token[length] * 1e6:.2f}"]
        rows.append(print_row(row))
    ratio = per_token["63s"] / per_token["9s"]
    verdict = "met" if ratio < MAX_GROWTH else "missed"
    printed = table(["tiny linear", "tokens", "ms a step", "µs a token"], rows)
    return f"{printed}\n\nTime per token, 63s / 9s: {ratio:.2f} (limit {MAX_GROWTH:g}: {verdict})"
