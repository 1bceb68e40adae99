"""Times a step with threads that sleep while they wait, and with threads that spin first, alone and beside others."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from cheaper import LENGTH, QUANTIZATIONS, source_of
from measure import interleaved, print_row, table

from ttt_video_engine.engines.onnxruntime import SPIN_US, OnnxRuntimeRunner
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import random_cases

REPETITIONS = 7
SPINS = (0, SPIN_US, 10_000)
"""Microseconds. The last is about what ONNX Runtime does by itself."""


@contextmanager
def others(count: int) -> Iterator[None]:
    """Within the block, `count` other processes keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure() -> str:
    rows, cores = [], os.cpu_count() or 1
    for name in ("tiny", "demo"):
        source = source_of(name)
        graph = transformer_graph(source.transformer().load(), source.model, LENGTH)
        case = random_cases(graph)["random, batch 2"]
        feeds = {spec.name: value.numpy() for spec, value in zip(graph.inputs, case, strict=True)}
        for precision, quantize in QUANTIZATIONS.items():
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                path = Path(folder) / "model.onnx"
                weights = write_module(graph.module, path.with_name(WEIGHTS_FILE), quantize=quantize)
                onnx_graph.save(onnx_graph.trace(replace(graph, quantize=quantize)), path, weights, graph.ttt)
                signature = onnx_graph.read_signature(path)
                calls = []
                for spin_us in SPINS:
                    runner = OnnxRuntimeRunner(path, *signature, num_threads=cores, spin_us=spin_us)
                    stack.enter_context(runner)
                    calls.append(lambda runner=runner, feeds=feeds: runner.run(feeds))  # type: ignore[misc]
                for count in (0, 1, cores):
                    with others(count):
                        seconds = interleaved(calls, REPETITIONS)
                    cells = (f"{taken * 1e3:.0f}" for taken in seconds)
                    ratio = f"{seconds[0] / seconds[SPINS.index(SPIN_US)]:.2f}x"
                    rows.append(print_row([f"{name} {precision}", str(count), *cells, ratio]))
    header = ["step, 9s, batch 2", "busy processes", *(f"{spin} µs" for spin in SPINS), f"faster at {SPIN_US} µs"]
    return table(header, rows)
