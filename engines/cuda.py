"""The little of CUDA that an engine needs: the GPU, memory on it, a stream, and recorded work.

All of it is NVIDIA's `cuda-core`, imported when first used, so that this module loads where neither the package nor a
driver is; what it raises becomes a BackendError that says what was being done. It works on the primary context, as
TensorRT does. No `close` raises: often it runs because CUDA has failed already.
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
from ttt_video_engine.runtime.runner import AnyArray, Array

_CURE = "run on a machine with an NVIDIA GPU, or use --engine onnxruntime"


@dataclass(frozen=True)
class Device:
    """A GPU. Memory is in bytes; `driver` is the newest CUDA version that its driver supports, such as "13.0"."""

    index: int
    name: str
    gpu: str
    total_memory: int
    free_memory: int
    driver: str


def device(index: int = 0) -> Device:
    """The GPU with this number, made the current one of this thread.

    Raises BackendError, in one line with its cure, where the package, the driver or the GPU is missing.
    """
    gpus = _gpus()
    if index >= len(gpus):
        raise BackendError(f"GPU {index} is missing, {len(gpus)} were found; {_CURE}")
    with reported(f"GPU {index}"):
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
        )


def devices() -> list[Device]:
    """All GPUs. Raises BackendError as `device` does; creates a CUDA context on each of them."""
    return [device(index) for index in range(len(_gpus()))]


def free_memory() -> int:
    """Bytes that are free on the current GPU, once all work that was queued on it is done."""
    _current_gpu()
    _check(_driver().cuCtxSynchronize()[0], "GPU memory")  # what was freed in a stream returns to the GPU here
    return _memory_info()[0]


@contextmanager
def reported(doing: str) -> Iterator[None]:
    """Turns an error of cuda-core, which has no public class, into a BackendError that begins with `doing`."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"{doing}: CUDA failed ({' '.join(str(error).split())[:300]})") from error


class Stream:
    """A queue of work on the current GPU, which does not wait for the default stream."""

    def __init__(self) -> None:
        with reported("a stream"):
            self.core: Any = _current_gpu().create_stream()

    @property
    def handle(self) -> int:
        """The stream's address."""
        return int(self.core.handle)

    def synchronize(self, doing: str) -> None:
        """Waits for all queued work. Raises BackendError that begins with `doing` where any of it failed."""
        with reported(doing):
            self.core.sync()

    def close(self) -> None:
        """Releases the stream; a second call does nothing."""
        with suppress(Exception):
            self.core.close()


class DeviceBuffer:
    """Memory on the GPU, freed by `close` or with the last reference, in the order of the stream it is allocated in.

    Raises BackendError where too little is free.
    """

    def __init__(self, num_bytes: int, stream: Stream) -> None:
        self.num_bytes = num_bytes
        with reported(f"{num_bytes:,} bytes of GPU memory"):
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
        """Queues a copy of a contiguous array into the buffer. The array must live until the stream is done.

        The host memory is pageable: a copy takes little time beside a run of the engine.
        """
        with reported("a copy to the GPU"):
            self._part(array).copy_from(_host_buffer(array), stream=stream.core)

    def copy_to(self, array: Array, stream: Stream) -> None:
        """Queues a copy of the first bytes into a contiguous array, complete when the stream is done."""
        with reported("a copy from the GPU"):
            self._part(array).copy_to(_host_buffer(array), stream=stream.core)

    def close(self) -> None:
        """Frees the memory; a second call does nothing."""
        with suppress(Exception):
            self._buffer.close()

    def _part(self, array: Array) -> Any:
        """The first bytes, as many as the array has."""
        if not array.flags.c_contiguous or array.nbytes > self.num_bytes:
            raise ValueError(f"{array.dtype}{list(array.shape)} is not contiguous or over {self.num_bytes} bytes")
        return _core().Buffer.from_handle(self.pointer, array.nbytes, owner=self._buffer)


class DeviceArray:
    """An array on the GPU. It owns its memory, so it outlives the engine that made it.

    Its content is complete: an engine returns it when its stream is done.
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
            raise ValueError("an array on the GPU reaches the host by a copy only")
        host = np.empty(self.shape, self.dtype)
        stream = Stream()
        self.buffer.copy_to(host, stream)
        stream.synchronize("a copy from the GPU")
        stream.close()
        return host if dtype is None else host.astype(dtype, copy=False)


def to_device(array: AnyArray, stream: Stream) -> DeviceArray:
    """A copy on the GPU, complete on return."""
    host = on_host(array)
    copy = DeviceArray(host.shape, host.dtype, stream)
    copy.buffer.copy_from(host, stream)
    stream.synchronize("a copy to the GPU")
    return copy


class Graph:
    """A CUDA graph: work that is recorded once and launched as a whole. `enqueue` is recorded, not executed.

    Addresses and shapes are part of the recording. Raises BackendError where the work cannot be recorded.
    """

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        with reported("a CUDA graph"):
            builder = stream.core.create_graph_builder()
            try:
                builder.begin_building(mode="thread_local")
                enqueue()
                self._graph = builder.end_building().complete()
            finally:
                with suppress(Exception):  # it raises where the recording failed, and ends it all the same
                    builder.close()

    def launch(self, stream: Stream) -> None:
        """Queues all recorded work."""
        with reported("a CUDA graph"):
            self._graph.launch(stream.core)

    def close(self) -> None:
        """Releases the recording; a second call does nothing."""
        with suppress(Exception):
            self._graph.close()


def num_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Size of an array without padding."""
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    return size


def on_host(array: AnyArray) -> Array:
    """A contiguous NumPy array with the same content."""
    return np.ascontiguousarray(array)


def _host_buffer(array: Array) -> Any:
    return _core().Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


def _core() -> Any:
    return _package("cuda.core")


def _driver() -> Any:
    """The driver API, for what cuda-core lacks."""
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
    """All GPUs, as cuda-core has them; at least one."""
    core, driver = _core(), _driver()
    try:
        major, minor = _driver_version()
    except RuntimeError as error:  # the library of the driver is missing
        raise BackendError(f"no NVIDIA driver was found; {_CURE}") from error
    if major < driver.CUDA_VERSION // 1000:
        raise BackendError(f"the NVIDIA driver is too old: it supports CUDA up to {major}.{minor}; update the driver")
    with reported("the NVIDIA driver"):
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
    """The current GPU of this thread, or else the first."""
    with reported("the current GPU"):
        gpu = _core().Device()
        gpu.set_current()
    return gpu


def _memory_info() -> tuple[int, int]:
    """Free and total bytes on the current GPU."""
    status, free, total = _driver().cuMemGetInfo()
    _check(status, "GPU memory")
    return int(free), int(total)


def _check(status: Any, doing: str) -> None:
    if int(status) != 0:
        raise BackendError(f"{doing}: CUDA failed ({status.name})")


def _driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports. Raises RuntimeError where there is no driver."""
    _, version = _driver().cuDriverGetVersion()
    return version // 1000, version % 1000 // 10
