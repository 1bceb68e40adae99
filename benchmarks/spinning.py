"""Times a step with threads that spin while they wait, and with threads that sleep: alone, and beside other work."""

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

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.build import WEIGHTS_FILE
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import random_cases

REPETITIONS = 7


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
                for spinning in (True, False):
                    runner = OnnxRuntimeRunner(path, *signature, num_threads=cores, spinning=spinning)
                    stack.enter_context(runner)
                    calls.append(lambda runner=runner, feeds=feeds: runner.run(feeds))  # type: ignore[misc]
                for count in (0, cores):
                    with others(count):
                        on, off = interleaved(calls, REPETITIONS)
                    row = [f"{name} {precision}", str(count), f"{on * 1e3:.0f}", f"{off * 1e3:.0f}", f"{on / off:.2f}x"]
                    rows.append(print_row(row))
    return table(["step, 9s, batch 2", "busy processes", "spinning ms", "sleeping ms", "sleeping"], rows)
