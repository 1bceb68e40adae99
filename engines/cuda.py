"""The part of CUDA that a TensorRT runner needs: devices, memory, streams and graphs.

Uses NVIDIA's `cuda-core`, which is imported on first use, so that this module loads without the package or a driver.
Its errors become BackendErrors that name the failed operation. Uses the primary context, as TensorRT does. `close`
never raises, because it often runs after CUDA has failed.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import Array, HostOrDeviceArray

_CURE = "run on a machine with an NVIDIA GPU, or use --engine onnxruntime"


@dataclass(frozen=True)
class Device:
    """A GPU. `gpu` is its architecture, such as "sm_89"; memory is in bytes.

    `driver` is the newest CUDA version that its driver supports, such as "13.0". `resident_threads` can run at the same
    time.
    """

    index: int
    name: str
    gpu: str
    total_memory: int
    free_memory: int
    driver: str
    resident_threads: int


def device(index: int = 0) -> Device:
    """The GPU with this index. Makes it the current device of this thread.

    Raises BackendError with the cure where the package, the driver or the GPU is missing.
    """
    gpus = _gpus()
    if index >= len(gpus):
        raise BackendError(f"GPU {index} is missing, {len(gpus)} were found; {_CURE}")
    with cuda_errors(f"GPU {index}"):
        gpu = gpus[index]
        gpu.set_current()
        free, total = _memory_info()
        return Device(
            index=index,
            name=gpu.name,
            gpu=f"sm_{gpu.arch}",
            total_memory=total,
            free_memory=free,
            driver=".".join(map(str, _driver_version())),
            resident_threads=gpu.properties.multiprocessor_count * gpu.properties.max_threads_per_multiprocessor,
        )


def devices() -> list[Device]:
    """All GPUs. Raises BackendError as `device` does; creates a CUDA context on each of them."""
    return [device(index) for index in range(len(_gpus()))]


def free_memory() -> int:
    """Free bytes on the current GPU, after all queued work is complete."""
    _current_gpu()
    _check(_driver().cuCtxSynchronize()[0], "GPU memory")  # memory freed in stream order is returned here
    return _memory_info()[0]


@contextmanager
def cuda_errors(operation: str) -> Iterator[None]:
    """Turns errors of cuda-core, which have no public class, into BackendErrors that begin with `operation`."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"{operation}: CUDA failed ({' '.join(str(error).split())[:300]})") from error


class Stream:
    """A non-blocking stream on the current GPU: it does not wait for the default stream."""

    def __init__(self) -> None:
        with cuda_errors("a stream"):
            self.core: Any = _current_gpu().create_stream()

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self.core.handle)

    def synchronize(self, operation: str) -> None:
        """Waits for all queued work. Raises BackendError that begins with `operation` where any of it failed."""
        with cuda_errors(operation):
            self.core.sync()

    def close(self) -> None:
        """Releases the stream; a second call does nothing."""
        with suppress(Exception):
            self.core.close()


class DeviceBuffer:
    """Memory on the GPU. `close`, or dropping the last reference, frees it in the order of its stream.

    Raises BackendError where too little is free.
    """

    def __init__(self, num_bytes: int, stream: Stream) -> None:
        self.num_bytes = num_bytes
        with cuda_errors(f"{num_bytes:,} bytes of GPU memory"):
            try:
                self._buffer = _current_gpu().allocate(max(1, num_bytes), stream=stream.core)
            except Exception as error:
                if "OUT_OF_MEMORY" not in str(error):
                    raise
                raise BackendError(
                    f"{num_bytes:,} bytes of GPU memory are needed, {free_memory():,} are free; use --low-memory, or "
                    "export with --weight-streaming and use --gpu-memory"
                ) from error
            self.pointer = int(self._buffer.handle)

    def copy_from(self, array: Array, stream: Stream) -> None:
        """Queues a copy of a contiguous array into the buffer. The array must live until the stream is synchronized.

        The host memory is pageable: copies are short compared with a run of the engine.
        """
        with cuda_errors("a copy to the GPU"):
            self._part(array).copy_from(_host_buffer(array), stream=stream.core)

    def copy_to(self, array: Array, stream: Stream) -> None:
        """Queues a copy of the first bytes into a contiguous array. It is complete when the stream is synchronized."""
        with cuda_errors("a copy from the GPU"):
            self._part(array).copy_to(_host_buffer(array), stream=stream.core)

    def close(self) -> None:
        """Frees the memory; a second call does nothing."""
        with suppress(Exception):
            self._buffer.close()

    def _part(self, array: Array) -> Any:
        """A view of the first `array.nbytes` bytes. Raises ValueError unless the array is contiguous and fits."""
        if not array.flags.c_contiguous or array.nbytes > self.num_bytes:
            raise ValueError(f"{array.dtype}{list(array.shape)} is not contiguous or over {self.num_bytes} bytes")
        return _core().Buffer.from_handle(self.pointer, array.nbytes, owner=self._buffer)


class DeviceArray:
    """An array on the GPU. It owns its memory, so it may outlive the engine that wrote it.

    Its content is complete: a runner returns it after it has synchronized the stream.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, stream: Stream) -> None:
        self.shape = shape
        self.dtype: np.dtype[np.generic] = np.dtype(dtype)
        self.buffer = DeviceBuffer(num_bytes(shape, self.dtype), stream)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """A copy on the host, in `dtype` if given."""
        if copy is False:
            raise ValueError("an array on the GPU cannot be used on the host without a copy")
        host = np.empty(self.shape, self.dtype)
        stream = Stream()
        self.buffer.copy_to(host, stream)
        stream.synchronize("a copy from the GPU")
        stream.close()
        return host if dtype is None else host.astype(dtype, copy=False)


def to_device(array: HostOrDeviceArray, stream: Stream) -> DeviceArray:
    """A copy on the GPU, complete on return."""
    host = to_host(array)
    copy = DeviceArray(host.shape, host.dtype, stream)
    copy.buffer.copy_from(host, stream)
    stream.synchronize("a copy to the GPU")
    return copy


class Graph:
    """A CUDA graph: work that is captured once and launched as a whole. `enqueue` is captured, not executed.

    Addresses and shapes are part of the graph. Raises BackendError where the work cannot be captured.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        with cuda_errors("a CUDA graph"):
            builder = stream.core.create_graph_builder()
            try:
                builder.begin_building(mode="thread_local")
                enqueue()
                self._graph = builder.end_building().complete()
            finally:
                with suppress(Exception):  # raises where the capture has failed, but still ends it
                    builder.close()

    def launch(self, stream: Stream) -> None:
        """Queues the whole graph."""
        with cuda_errors("a CUDA graph"):
            self._graph.launch(stream.core)

    def close(self) -> None:
        """Releases the graph; a second call does nothing."""
        with suppress(Exception):
            self._graph.close()


def num_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Size of an array without padding."""
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    return size


def to_host(array: HostOrDeviceArray) -> Array:
    """A contiguous NumPy array with the same content."""
    return np.ascontiguousarray(array)


def _host_buffer(array: Array) -> Any:
    return _core().Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


def _core() -> Any:
    return _package("cuda.core")


def _driver() -> Any:
    """The CUDA driver API, for functions that cuda-core lacks."""
    return _package("cuda.bindings.driver")


def _package(module: str) -> Any:
    wheel = "-".join(module.split(".")[:2])
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendError(f"{wheel} is not installed; run: pip install 'ttt-video-engine[tensorrt]'") from error
    except ImportError as error:
        raise BackendError(f"{wheel} does not load ({error}); install it again") from error


def _gpus() -> tuple[Any, ...]:
    """All GPUs as cuda-core devices, at least one."""
    core, driver = _core(), _driver()
    try:
        major, minor = _driver_version()
    except RuntimeError as error:  # the library of the driver is missing
        raise BackendError(f"no NVIDIA driver was found; {_CURE}") from error
    if major < driver.CUDA_VERSION // 1000:
        raise BackendError(f"the NVIDIA driver is too old: it supports CUDA up to {major}.{minor}; update the driver")
    with cuda_errors("the NVIDIA driver"):
        try:
            found: tuple[Any, ...] = core.Device.get_all_devices()
        except Exception as error:
            if "NO_DEVICE" not in str(error):
                raise
            found = ()
    if not found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise BackendError(f"no NVIDIA GPU was found{hidden}; {_CURE}")
    return found


def _current_gpu() -> Any:
    """The current GPU of this thread, else the first."""
    with cuda_errors("the current GPU"):
        gpu = _core().Device()
        gpu.set_current()
    return gpu


def _memory_info() -> tuple[int, int]:
    """Free and total bytes on the current GPU."""
    status, free, total = _driver().cuMemGetInfo()
    _check(status, "GPU memory")
    return int(free), int(total)


def _check(status: Any, operation: str) -> None:
    if int(status) != 0:
        raise BackendError(f"{operation}: CUDA failed ({status.name})")


def _driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports. Raises RuntimeError where there is no driver."""
    _, version = _driver().cuDriverGetVersion()
    return version // 1000, version % 1000 // 10
