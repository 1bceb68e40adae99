"""Stand-ins for the objects of TensorRT that exist only on a GPU. Each has no more names than TensorRT's own class.

An engine "runs" on a GPU of `FREE` bytes: it doubles `x`, and records what it was asked.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.tensorrt.engine import BuildSettings, EngineEntry, EngineFile, Profile, ShapeRange
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.runtime.runner import TensorSpec

GPU = cuda.Device(0, "NVIDIA L4", "sm_89", 24 << 30, 24 << 30, "13.0", resident_threads=1000)
ACTIVATIONS = (1000, 2000)
"""Bytes of scratch memory for a batch of 1 and of 2."""
STREAMABLE = 500


def profile(batch: int) -> Profile:
    return {"x": ShapeRange((batch, 4), (batch, 4), (batch, 4))}


def engine_file(folder: Path, **changes: Any) -> EngineFile:
    """Of `transformer-3s`, with a profile for a batch of 1 and one of 2."""
    values: dict[str, Any] = {
        "graph": "transformer-3s",
        "gpu": "sm_89",
        "dtype": "float32",
        "package": "tensorrt_rtx",
        "package_version": "1.7",
        "inputs": (TensorSpec("x", "float32", ("batch", 4)),),
        "outputs": (TensorSpec("y", "float32", ("batch", 4)),),
        "profiles": (profile(1), profile(2)),
        "plugins": {},
        "settings": BuildSettings(),
        "activations": ACTIVATIONS,
        "size": 1,
        "weights": 800,
        "sha256": "0" * 64,
        "seconds": 0.0,
        "key": {},
    }
    return EngineFile(folder / "transformer-3s.engine", EngineEntry(**{**values, **changes}))


@dataclass
class Buffer:
    """In place of `cuda.DeviceBuffer`; its pointer is its place in `memory`."""

    num_bytes: int
    stream: Any
    memory: list["Buffer"]
    content: Any = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.memory.append(self)
        self.pointer = len(self.memory)

    def copy_from(self, array: Any, stream: Any) -> None:
        self.content = np.array(array)

    def copy_to(self, array: Any, stream: Any) -> None:
        array[...] = self.content

    def close(self) -> None:
        self.closed = True


@dataclass
class Cache:
    """IRuntimeCache: one line of text for each kernel that was compiled."""

    kernels: bytes = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.kernels = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.kernels


@dataclass
class Config:
    """IRuntimeConfig."""

    dynamic_shapes_kernel_specialization_strategy: Any = None
    runtime_cache: Any = field(default=None, init=False)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy.name == "USER_MANAGED"

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.runtime_cache = cache
        return True


@dataclass
class Context:
    """IExecutionContext."""

    owner: "Engine"
    cache: Cache
    active_optimization_profile: int = 0

    def __post_init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.active_optimization_profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape == profile(self.active_optimization_profile + 1)["x"].opt

    def update_device_memory_size_for_shapes(self) -> int:
        return self.owner.get_device_memory_size_for_profile_v2(self.active_optimization_profile)

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.owner.scratch.append(size)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        kernel = b"kernels %d\n" % self.active_optimization_profile
        if kernel not in self.cache.kernels:
            self.cache.kernels += kernel
            self.owner.compiled += 1
        source, target = (self.owner.memory[self.addresses[name] - 1] for name in "xy")
        target.content = 2 * source.content
        return True


@dataclass
class Engine:
    """ICudaEngine. `scratch` has the size of each buffer that a context was given, `compiled` counts kernels."""

    memory: list[Buffer] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    compiled: int = 0
    weight_streaming_budget_v2: int | None = None
    streamable_weights_size: int = STREAMABLE
    num_optimization_profiles: int = 2
    num_io_tensors: int = 2

    def get_device_memory_size_for_profile_v2(self, number: int) -> int:
        return ACTIVATIONS[number]

    def get_tensor_name(self, number: int) -> str:
        return "xy"[number]

    def get_tensor_dtype(self, name: str) -> Any:
        return "float32"

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config) -> Context:
        return Context(self, config.runtime_cache)


class Graph:
    """In place of `cuda.Graph`: what is captured runs at each launch."""

    def __init__(self, stream: Any, enqueue: Any) -> None:
        self._enqueue = enqueue

    def launch(self, stream: Any) -> None:
        self._enqueue()

    def close(self) -> None:
        pass


class Stream:
    handle = 1

    def synchronize(self, operation: str) -> None:
        pass

    def close(self) -> None:
        pass


def package(real: TensorRT, engine: Engine) -> TensorRT:
    """TensorRT-RTX with a runtime that loads `engine`."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, content: Any) -> Engine:
            return engine

    api = SimpleNamespace(**{name: getattr(real.api, name) for name in dir(real.api)})
    api.Runtime = Runtime
    api.DataType = SimpleNamespace(FLOAT="float32", HALF="float16", BF16="bfloat16", INT64="int64")
    return TensorRT(real.name, api, real.version, real.logger, real.errors)
