"""Everything that engines ask of CUDA, once: run by test_cuda_calls.py in a process that finds its fake driver."""

import ctypes
import json
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.runtime.errors import BackendError

REPORT = ("blocks", "threads", "shared", "stream", "first", "launches", "used", "allocations", "capturing")
found: dict[str, object] = {}


def driver_state() -> dict[str, int]:
    """What the fake driver has been told."""
    values = (ctypes.c_uint64 * len(REPORT))()
    ctypes.CDLL("libcuda.so.1").fake_report(values)
    return dict(zip(REPORT, values, strict=True))


def message(action: object, *arguments: object) -> str:
    try:
        action(*arguments)  # type: ignore[operator]
    except BackendError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def refuse() -> None:
    raise BackendError("refused by the engine")


def copies(host: np.ndarray[tuple[int, ...], np.dtype[np.float16]]) -> None:
    """An array outlives the stream it was made in; all memory is given back at the end."""
    stream = cuda.Stream()
    array = cuda.to_device(host.T, stream)
    stream.close()
    stream.close()
    found["copied"] = bool((np.asarray(array) == host.T).all())
    found["as float32"] = str(np.asarray(array, np.float32).dtype)
    found["while it lives"] = driver_state()["allocations"]
    del array
    found["after it"] = [driver_state()["allocations"], cuda.device().total_memory - cuda.free_memory()]


def graphs() -> None:
    with ExitStack() as stack:
        stream = cuda.Stream()
        stack.callback(stream.close)
        modes: list[int] = []
        graph = cuda.Graph(stream, lambda: modes.append(driver_state()["capturing"]))
        graph.launch(stream)
        graph.close()
        graph.close()
        found["mode while recording"] = modes
        found["refused"] = message(cuda.Graph, stream, refuse)
        stream.synchronize("after a recording that failed")
        found["capturing"] = driver_state()["capturing"]


def an_error_comes_before_what_close_would_say() -> None:
    """Run with a driver that fails to unload: the error within the block is the one that is raised."""
    from ttt_video_engine.engines.kernels.launch import LoadedKernel
    from ttt_video_engine.engines.tensorrt import plugin

    kernels = plugin._Kernels(Path(), "sm_89")
    cuda.device()
    for name in ("a", "b"):
        kernels._loaded[name] = LoadedKernel(small_cubin(), b"\x7fELF and the rest")
    with closing(kernels):
        raise KeyError("first")


def small_cubin() -> Cubin:
    return Cubin(
        op="linear",
        gpu="sm_89",
        dtype="float16",
        mini_batch_size=16,
        head_dim=64,
        entry="ttt_linear",
        num_warps=4,
        shared_memory=60_000,  # more than a kernel has without asking
        registers=1,
        spills=0,
        parameters=("XQ", "num_heads", "num_mini_batches", "global_scratch", "profile_scratch"),
        file="ttt_linear.cubin",
        sha256="",
        source_sha256="",
        triton="",
    )


def kernel() -> None:
    from ttt_video_engine.engines.kernels.launch import LoadedKernel

    cubin = small_cubin()
    stream = cuda.Stream()
    buffer = cuda.DeviceBuffer(64, stream)
    loaded = LoadedKernel(cubin, b"\x7fELF and the rest")
    loaded.launch(stream.handle, 96, [buffer.pointer], (48, 3))
    expected = {"blocks": 96, "threads": 128, "shared": 60_000, "stream": stream.handle, "first": buffer.pointer}
    state = driver_state()
    found["launched"] = {name: state[name] for name in expected} == expected
    found["misaligned"] = message(loaded.launch, stream.handle, 96, [buffer.pointer + 2], (48, 3))
    loaded.close()
    loaded.close()
    found["closed"] = message(loaded.launch, stream.handle, 96, [buffer.pointer], (48, 3))
    found["damaged"] = message(LoadedKernel, cubin, b"no cubin")


def main() -> None:
    found["device"] = message(cuda.device, 1)
    gpu = cuda.device()
    found["gpu"] = [gpu.name, gpu.gpu, gpu.driver, gpu.free_memory, gpu.resident_threads]
    copies(np.arange(12, dtype=np.float16).reshape(3, 4))
    found["too much"] = message(cuda.DeviceBuffer, gpu.total_memory + 1, cuda.Stream())
    graphs()
    kernel()
    Path("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
