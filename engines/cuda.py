"""The little of CUDA that an engine needs: the device, memory on it, a stream, and recorded work.

All of it is NVIDIA's runtime API through the package `cuda-bindings`, imported when first used, so that this module
loads where neither the package nor a driver is. It works on the primary context, as TensorRT does. Nothing in a
`close` raises: what is closed may be closed because CUDA has failed.
"""

import importlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import AnyArray, Array

_CURE = "run on a machine with an NVIDIA GPU, or use --engine onnxruntime"


@dataclass(frozen=True)
class Device:
    """A GPU. Memory is in bytes; `driver` is the newest CUDA that its driver knows, such as "13.0"."""

    index: int
    name: str
    gpu: str
    total_memory: int
    free_memory: int
    driver: str


def device(index: int = 0) -> Device:
    """The GPU with this number, made the one that this thread uses.

    Raises BackendError, in one line with its cure, where the package, the driver or the GPU is missing.
    """
    count = _device_count()
    if index >= count:
        raise BackendError(f"GPU {index} is not there, {count} were found; {_CURE}")
    api = _api()
    check(api.cudaSetDevice(index), f"GPU {index}")
    properties = check(api.cudaGetDeviceProperties(index), f"GPU {index}")
    free, total = check(api.cudaMemGetInfo(), f"GPU {index}")
    return Device(
        index=index,
        name=bytes(properties.name).partition(b"\0")[0].decode(errors="replace"),
        gpu=f"sm_{properties.major}{properties.minor}",
        total_memory=int(total),
        free_memory=int(free),
        driver=_driver_version(),
    )


def devices() -> list[Device]:
    """All GPUs. Raises BackendError as `device` does; takes a moment and some memory on each of them."""
    return [device(index) for index in range(_device_count())]


def free_memory() -> int:
    """Bytes that are free on the GPU in use."""
    return int(check(_api().cudaMemGetInfo(), "GPU memory")[0])


def check(result: tuple[Any, ...], doing: str) -> Any:
    """What a CUDA function gave besides its status: nothing, a value, or a list of them.

    Raises BackendError that names what was being done, and CUDA's error.
    """
    status, *values = result
    if int(status) != 0:
        _, text = _api().cudaGetErrorString(status)
        raise BackendError(f"{doing}: CUDA failed ({status.name}: {bytes(text).decode(errors='replace')})")
    return values[0] if len(values) == 1 else values or None


class Stream:
    """A queue of work on the GPU, apart from the default one."""

    def __init__(self) -> None:
        api = _api()
        self._stream = check(api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking), "a stream")
        self._close = weakref.finalize(self, api.cudaStreamDestroy, self._stream)

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self._stream)

    def synchronize(self, doing: str) -> None:
        """Waits for all that was queued. Raises BackendError if any of it failed, with `doing` as what it was."""
        check(_api().cudaStreamSynchronize(self._stream), doing)

    def close(self) -> None:
        """Gives the stream back; again does nothing."""
        self._close()


class DeviceBuffer:
    """Memory on the GPU, owned: freed by `close`, or with the last reference. Raises BackendError where none is left."""

    def __init__(self, num_bytes: int) -> None:
        api = _api()
        status, pointer = api.cudaMalloc(max(1, num_bytes))
        if status == api.cudaError_t.cudaErrorMemoryAllocation:
            api.cudaGetLastError()  # or the next call reports it again
            raise BackendError(
                f"{num_bytes:,} bytes of GPU memory are needed, {free_memory():,} are free; use --low-memory, or "
                "export with --weight-streaming and use --gpu-memory"
            )
        self.num_bytes = num_bytes
        self.pointer = int(check((status, pointer), f"{num_bytes:,} bytes of GPU memory"))
        self._close = weakref.finalize(self, api.cudaFree, self.pointer)

    def copy_from(self, array: Array, stream: Stream) -> None:
        """Queues a copy of a contiguous array into the buffer. The array must live until the stream is done.

        From pageable memory: what an engine takes and gives is small beside the time that it runs.
        """
        api = _api()
        kind = api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check_copy(array)
        check(
            api.cudaMemcpyAsync(self.pointer, array.ctypes.data, array.nbytes, kind, stream.handle), "a copy to the GPU"
        )

    def copy_to(self, array: Array, stream: Stream) -> None:
        """Queues a copy of the buffer's beginning into a contiguous array, to be read when the stream is done."""
        api = _api()
        kind = api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check_copy(array)
        check(
            api.cudaMemcpyAsync(array.ctypes.data, self.pointer, array.nbytes, kind, stream.handle),
            "a copy from the GPU",
        )

    def close(self) -> None:
        """Frees the memory; again does nothing."""
        self._close()

    def _check_copy(self, array: Array) -> None:
        if not array.flags.c_contiguous or array.nbytes > self.num_bytes:
            raise ValueError(f"{array.dtype}{list(array.shape)} is not contiguous or over {self.num_bytes} bytes")


class DeviceArray:
    """An array on the GPU. It owns its memory, so it outlives the engine that made it.

    What is in it is complete: an engine gives it away when its stream is done.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype: np.dtype[np.generic] = np.dtype(dtype)
        self.buffer = DeviceBuffer(num_bytes(shape, self.dtype))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """A copy on the host, in `dtype` where that is given."""
        if copy is False:
            raise ValueError("an array on the GPU cannot be had on the host without a copy")
        host = np.empty(self.shape, self.dtype)
        api = _api()
        kind = api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(api.cudaMemcpy(host.ctypes.data, self.buffer.pointer, host.nbytes, kind), "a copy from the GPU")
        return host if dtype is None else host.astype(dtype, copy=False)


def to_device(array: AnyArray, stream: Stream) -> DeviceArray:
    """A copy on the GPU, complete on return."""
    host = on_host(array)
    copy = DeviceArray(host.shape, host.dtype)
    copy.buffer.copy_from(host, stream)
    stream.synchronize("a copy to the GPU")
    return copy


class Graph:
    """Work that is recorded once and launched as a whole: `enqueue` is run while the stream records, not executes.

    Addresses and shapes are part of the recording. Raises BackendError where the work cannot be recorded.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        api = _api()
        doing = "a CUDA graph"
        this_thread = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(api.cudaStreamBeginCapture(stream.handle, this_thread), doing)
        try:
            enqueue()
        except BaseException:
            api.cudaStreamEndCapture(stream.handle)
            api.cudaGetLastError()  # or the next call reports it again
            raise
        try:
            graph = check(api.cudaStreamEndCapture(stream.handle), doing)
            try:
                self._executable = check(api.cudaGraphInstantiate(graph, 0), doing)
            finally:
                api.cudaGraphDestroy(graph)
        except BackendError:
            api.cudaGetLastError()  # as above
            raise
        self._close = weakref.finalize(self, api.cudaGraphExecDestroy, self._executable)

    def launch(self, stream: Stream) -> None:
        """Queues the whole."""
        check(_api().cudaGraphLaunch(self._executable, stream.handle), "a CUDA graph")

    def close(self) -> None:
        """Gives the recording back; again does nothing."""
        self._close()


def num_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Size of an array without padding."""
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    return size


def on_host(array: AnyArray) -> Array:
    """A contiguous array of numpy's with the same content."""
    return np.ascontiguousarray(array)


def _api() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")  # ships no types
    except ModuleNotFoundError as error:
        raise BackendError("cuda-bindings is not installed; run: pip install 'ttt-video-engine[tensorrt]'") from error
    except ImportError as error:
        raise BackendError(f"cuda-bindings does not load ({error}); install it again") from error


def _device_count() -> int:
    api = _api()
    status, count = api.cudaGetDeviceCount()
    errors = api.cudaError_t
    if status == errors.cudaErrorInsufficientDriver and _driver_version() == "0.0":
        raise BackendError(f"no NVIDIA driver was found; {_CURE}")
    if status == errors.cudaErrorInsufficientDriver:
        raise BackendError(f"the NVIDIA driver is too old: it knows CUDA up to {_driver_version()}; update the driver")
    if status == errors.cudaErrorNoDevice or (int(status) == 0 and count == 0):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise BackendError(f"no NVIDIA GPU was found{hidden}; {_CURE}")
    return int(check((status, count), "the NVIDIA driver"))


def _driver_version() -> str:
    status, version = _api().cudaDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}" if int(status) == 0 else "0.0"
