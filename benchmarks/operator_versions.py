"""Times a step of the transformer with each version of the TTT operator, and its peak memory, in ONNX Runtime.

Every number is of a process of its own, on one thread. Seconds are those of the processor, which other work on this
machine changes little. "Planned" is the default of ONNX Runtime, to allocate the memory of a run as one block from the
second run on; the runner of this project switches it off.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time

from measure import peak_memory, print_row, table

VERSIONS = (1, 2)
RUNS = 3
"""The first is not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=["tiny", "debug"], default="debug")
    parser.add_argument("--length", default="63s")
    parser.add_argument("--ttt", choices=["linear", "mlp"], action="append", help="default: both")
    options = parser.parse_args()
    rows = []
    for ttt in options.ttt or ["linear", "mlp"]:
        with tempfile.TemporaryDirectory() as folder:
            paths = _exported(Path(folder), options.preset, ttt, options.length)
            for batch in (1, 2):
                for planned in (True, False):
                    for version, path in paths.items():
                        program = (__file__, str(path), str(batch), str(int(planned)))
                        done = subprocess.run([sys.executable, *program], check=True, capture_output=True, text=True)
                        seconds, peak = done.stdout.split()
                        name = f"{options.preset} {ttt} {options.length}"
                        cells = [name, str(batch), "yes" if planned else "no", str(version), seconds, peak]
                        rows.append(print_row(cells))
    print(table(["step", "batch", "planned", "operator", "CPU seconds", "peak MiB"], rows))


def _exported(folder: Path, name: str, ttt: str, length: str) -> dict[int, Path]:
    """Version → its graph. Both read one weight file."""
    from ttt_video_engine.export.graphs import graph as onnx_graph
    from ttt_video_engine.export.graphs.components import transformer_graph
    from ttt_video_engine.export.graphs.weights import write_module
    from ttt_video_engine.export.sources.source import SeededSource
    from ttt_video_engine.runtime.presets import preset

    model = preset(name, ttt)  # type: ignore[arg-type]
    graph = transformer_graph(SeededSource(model, seed=0).transformer().load(), model, length)
    weights = write_module(graph.module, folder / "model.onnx_data")
    paths = {version: folder / f"version-{version}.onnx" for version in VERSIONS}
    for version, path in paths.items():
        onnx_graph.save(onnx_graph.trace(replace(graph, op_version=version)), path, weights, graph.ttt)
    return paths


def step(path: Path, batch: int, *, planned: bool) -> tuple[float, int]:
    """Median CPU seconds of a run, and the peak memory of this process in bytes."""
    import numpy as np

    from ttt_video_engine.engines.ort import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = planned
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {}
    for spec in session.get_inputs():
        shape = [batch if isinstance(size, str) else size for size in spec.shape]
        inputs[spec.name] = np.ones(shape, np.int64 if spec.type == "tensor(int64)" else np.float32)
    taken = []
    for _ in range(RUNS):
        start = process_time()
        session.run(None, inputs)
        taken.append(process_time() - start)
    return median(taken[1:]), peak_memory()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    if len(sys.argv) == 4 and Path(sys.argv[1]).is_file():
        seconds, peak = step(Path(sys.argv[1]), int(sys.argv[2]), planned=sys.argv[3] == "1")
        print(f"{seconds:.2f} {peak / 2**20:.0f}")
    else:
        main()
