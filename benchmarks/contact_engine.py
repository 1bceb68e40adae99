"""A step of `first_contact.py`: a layer of the 5B transformer as a TensorRT engine with TTT plugins, full width, 3 s.

Builds it for the GPU of the machine, loads it, and runs it kernel by kernel and as a CUDA graph: time, memory, and
whether both give the same. What the layer computes is compared nowhere here: the weights are random.
"""

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from contact_rows import add_row
from full_width import Slice, build

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.tensorrt.engine import FOLDER, EngineFile, list_engines
from ttt_video_engine.engines.tensorrt.memory import MemoryLimit
from ttt_video_engine.engines.tensorrt.package import TensorRT, load_package, package_for
from ttt_video_engine.engines.tensorrt.runner import TensorRTRunner
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import BackendError

LENGTH = "3s"
REPETITIONS = 5


def main() -> None:
    gpu = cuda.device()
    try:
        package = load_package(package_for(gpu.gpu))
    except BackendError as error:
        add_row(note=f"left out: {error}")
        return
    for op in ("linear", "mlp"):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FOLDER).mkdir()
            start = perf_counter()
            build(Path(folder) / FOLDER, Slice(op, LENGTH, num_layers=1, gpu=gpu.gpu, dtype="bfloat16", plugins=True))
            seconds = perf_counter() - start
            (engine,) = list_engines(Path(folder))
            case = {"layer": f"TTT-{op} {LENGTH}", "engine": package.name, "build s": f"{seconds:.0f}"}
            case["plugins"] = str(len(engine.entry.plugins)) if engine.entry.plugins else engine.entry.fallback
            for batch in (1, 2):
                add_row(**case, **run(Path(folder), engine, package, gpu, batch))


def run(folder: Path, engine: EngineFile, package: TensorRT, gpu: cuda.Device, batch: int) -> dict[str, object]:
    """The cells of a row: queued kernel by kernel, then as a CUDA graph."""
    random = np.random.default_rng(0)
    shapes = {spec.name: tuple(batch if isinstance(axis, str) else axis for axis in spec.shape) for spec in
              engine.entry.inputs}  # fmt: skip
    inputs = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    inputs["timestep"] = np.full(batch, 499)
    cells: dict[str, object] = {"batch": batch}
    velocities = []
    for mode, low_memory in (("ms", True), ("ms as a graph", False)):
        bundle = Bundle(folder, manifest=None)  # type: ignore[arg-type]  # only its folder is used
        before, start = cuda.free_memory(), perf_counter()
        with TensorRTRunner(bundle, engine, package, MemoryLimit(low_memory=low_memory), gpu) as runner:
            velocities.append(np.asarray(runner.run(inputs)["velocity"]))
            cells[mode.replace("ms", "load and first run s")] = f"{perf_counter() - start:.1f}"
            taken = []
            for _ in range(REPETITIONS):
                start = perf_counter()
                velocities.append(np.asarray(runner.run(inputs)["velocity"]))
                taken.append(perf_counter() - start)
            cells[mode] = f"{median(taken) * 1e3:.2f}"
            cells["GiB"] = f"{(before - cuda.free_memory()) / 2**30:.2f}"
            if not low_memory:
                cells["captured"] = runner._graph is not None
    same = all(np.array_equal(velocity, velocities[0]) for velocity in velocities)
    return {**cells, "passed": same and bool(np.isfinite(velocities[0]).all())}


if __name__ == "__main__":
    main()
