"""Runs TensorRT engines. A runner owns the GPU memory that it allocates, except for the caches that it returns."""

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.tensorrt.checks import choose_profile, usable_engine
from ttt_video_engine.engines.tensorrt.deserialise import check_tensors, create_context, deserialise_engine
from ttt_video_engine.engines.tensorrt.engine import KERNELS, EngineFile, Shape
from ttt_video_engine.engines.tensorrt.memory import (
    GRAPH_RESERVE,
    MemoryLimit,
    MemoryNeeds,
    kernel_stacks,
    profile_bytes,
    weight_budget,
)
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.runtime_cache import RuntimeCache
from ttt_video_engine.runtime.bundle import CACHE_IN, CACHE_OUT, Bundle
from ttt_video_engine.runtime.errors import BackendError, export_for_gpu
from ttt_video_engine.runtime.runner import HostOrDeviceArray, TensorSpec, check_inputs

REPEATED_PREFIX = "transformer-"
"""Prefix of the graphs that run many times with the same shapes: their runs are captured as CUDA graphs."""


class TensorRTLoader:
    """Loads the engines of a bundle. `gpu_memory` is the maximum that an engine may use, in bytes; None for all.

    `low_memory` turns CUDA graphs off, which need additional memory. Raises BackendError where the driver or the GPU
    is missing.
    """

    def __init__(self, bundle: Bundle, *, low_memory: bool = False, gpu_memory: int | None = None) -> None:
        self._gpu = cuda.device()
        self._bundle = bundle
        self._memory = MemoryLimit(gpu_memory, low_memory)
        self._engines: dict[str, tuple[EngineFile, TensorRT]] = {}

    def environment(self) -> dict[str, str]:
        """As `RunnerLoader.environment`, with the TensorRT packages of the graphs that were checked or loaded."""
        packages = {package.name: package.version for _, package in self._engines.values()}
        return {
            "engine": "tensorrt",
            **{str(name): version for name, version in packages.items()},
            "gpu": self._gpu.name,
            "architecture": self._gpu.gpu,
            "driver": f"CUDA {self._gpu.driver}",
        }

    def check(self, graphs: Iterable[str]) -> None:
        """Raises BackendError unless each graph has an undamaged engine for this GPU, package and bundle."""
        for graph in graphs:
            self._find(graph)

    def __call__(self, graph: str) -> "TensorRTRunner":
        engine, package = self._find(graph)
        return TensorRTRunner(self._bundle, engine, package, self._memory, self._gpu)

    def _find(self, graph: str) -> tuple[EngineFile, TensorRT]:
        if graph not in self._engines:
            self._engines[graph] = usable_engine(self._bundle, graph, self._gpu.gpu)
        return self._engines[graph]


class TensorRTRunner:
    """One loaded engine, with a device buffer for each input and output. Buffers grow with the shapes.

    Caches have no buffers: each is returned as a `DeviceArray`, and read in place as an input.
    """

    def __init__(
        self, bundle: Bundle, engine_file: EngineFile, package: TensorRT, memory: MemoryLimit, gpu: cuda.Device
    ) -> None:
        self._name, self._entry = engine_file.entry.graph, engine_file.entry
        self._package, self._memory = package, memory
        self._use_graph = self._name.startswith(REPEATED_PREFIX) and not memory.low_memory
        self._shapes: dict[str, Shape] | None = None
        self._graph: cuda.Graph | None = None
        self._buffers: dict[str, cuda.DeviceBuffer] = {}
        self._scratch: cuda.DeviceBuffer | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._weights = 0
        # What CUDA allocates at the first run, which is not free although it is not taken before.
        self._reserve = kernel_stacks(bundle, engine_file, gpu.resident_threads)
        self._reserve += GRAPH_RESERVE if self._use_graph else 0
        self._has_run = False
        self._cache = RuntimeCache(engine_file, package, gpu)
        with ExitStack() as stack:
            if engine_file.entry.plugins:
                from ttt_video_engine.engines.tensorrt.plugin import registered_plugins  # needs the kernels' packages

                stack.enter_context(registered_plugins(package, bundle.path(KERNELS), engine_file.entry.gpu))
            self._stream = cuda.Stream()
            stack.callback(self._stream.close)
            stack.callback(self._free_buffers)
            stack.callback(self._unload)
            self._load(engine_file)
            self._open: ExitStack | None = stack.pop_all()

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, HostOrDeviceArray]:
        """As `Runner.run`. bfloat16 arrays are uint16. Caches are returned as `DeviceArray`; as inputs they may also be
        NumPy arrays. Also raises BackendError where the GPU's memory is too small or CUDA fails."""
        if self._open is None:
            raise BackendError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self._entry.inputs, inputs)
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        new = shapes != self._shapes
        if new:
            self._prepare(shapes)
        sources = [self._feed(spec.name, inputs[spec.name]) for spec in self._entry.inputs]
        outputs = {spec.name: self._allocate_output(spec) for spec in self._entry.outputs}
        self._execute()
        for name, array in outputs.items():
            if isinstance(array, np.ndarray):
                self._buffers[name].copy_to(array, self._stream)
        self._stream.synchronize(self._name)
        self._has_run = True
        if new:
            self._cache.save()
        del sources  # the queued copies read from them until here
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _load(self, engine_file: EngineFile) -> None:
        available = self._available(0)
        self._weights = self._entry.weights
        streaming = self._entry.settings.weight_streaming
        if not streaming:
            activations = profile_bytes(self._entry.activations, low_memory=self._memory.low_memory)
            self._budget(MemoryNeeds(self._weights, activations), available)
        self._runtime = self._package.api.Runtime(self._package.logger)
        self._engine = deserialise_engine(self._package, self._runtime, engine_file)
        check_tensors(self._package, self._engine, engine_file)
        if streaming:
            # Before the context, which fixes the budget. With 0, the sizes below are those of a streaming engine.
            self._engine.weight_streaming_budget_v2 = 0
            streamable = int(self._engine.streamable_weights_size)
            numbers = range(self._engine.num_optimization_profiles)
            sizes = map(self._engine.get_device_memory_size_for_profile_v2, numbers)
            activations = profile_bytes([int(size) for size in sizes], low_memory=self._memory.low_memory)
            weights = max(self._weights, streamable)
            budget = self._budget(MemoryNeeds(weights, activations, streamable), available)
            kept = streamable if budget is None else budget
            self._engine.weight_streaming_budget_v2 = kept
            self._weights = weights - (streamable - kept)
        self._context = create_context(self._package, self._engine, engine_file, self._cache)

    def _budget(self, memory: MemoryNeeds, available: int) -> int | None:
        return weight_budget(self._name, memory, available, low_memory=self._memory.low_memory)

    def _available(self, taken: int) -> int:
        """Bytes that may still be allocated, of which `taken` are: what CUDA reserves is not among them."""
        if self._has_run:
            return self._memory.available(taken + self._reserve)
        return self._memory.available(taken, pending=self._reserve)

    def _prepare(self, shapes: dict[str, Shape]) -> None:
        """Sets the shapes of the context, and drops the CUDA graph of the previous shapes."""
        self._shapes = None
        self._drop_graph()
        profile = choose_profile(self._name, self._entry.profiles, shapes)
        if profile != self._context.active_optimization_profile:
            self._require(
                self._context.set_optimization_profile_async(profile, self._stream.handle), f"profile {profile}"
            )
            self._stream.synchronize(self._name)
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"input {name} of {list(shape)}")
        self._allocate_scratch(int(self._context.update_device_memory_size_for_shapes()))
        for spec in (*self._entry.inputs, *self._entry.outputs):
            if not spec.name.startswith((CACHE_IN, CACHE_OUT)):
                self._allocate(spec)
        self._shapes = shapes

    def _allocate_scratch(self, size: int) -> None:
        if self._scratch is None or self._scratch.num_bytes < size:
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            streamable = 0 if self._entry.settings.weight_streaming else None
            self._budget(MemoryNeeds(0, size, streamable), self._available(self._weights))
            self._scratch = cuda.DeviceBuffer(size, self._stream)
        self._context.set_device_memory(self._scratch.pointer, self._scratch.num_bytes)

    def _allocate(self, spec: TensorSpec) -> None:
        size = cuda.num_bytes(self._shape(spec.name), spec.array_dtype)
        before = self._buffers.get(spec.name)
        if before is None or before.num_bytes < size:
            if before is not None:
                before.close()
            self._buffers[spec.name] = cuda.DeviceBuffer(size, self._stream)
        self._set_address(spec.name, self._buffers[spec.name])

    def _shape(self, name: str) -> Shape:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BackendError(
                f"{self._name}: {name} has no shape that follows from the inputs; {export_for_gpu(self._entry.gpu)}"
            )
        return shape

    def _feed(self, name: str, array: HostOrDeviceArray) -> HostOrDeviceArray:
        """Queues the copy of an input to the GPU. Returns the array, which must live until the copy is complete."""
        if name.startswith((CACHE_IN, CACHE_OUT)):
            if not isinstance(array, cuda.DeviceArray):
                array = cuda.to_device(array, self._stream)
            self._set_address(name, array.buffer)
            return array
        host = cuda.to_host(array)
        self._buffers[name].copy_from(host, self._stream)
        return host

    def _allocate_output(self, spec: TensorSpec) -> HostOrDeviceArray:
        """An array for an output: on the GPU for a cache, else on the host."""
        shape = self._shape(spec.name)
        if not spec.name.startswith((CACHE_IN, CACHE_OUT)):
            return np.empty(shape, spec.array_dtype)
        array = cuda.DeviceArray(shape, spec.array_dtype, self._stream)
        self._set_address(spec.name, array.buffer)
        return array

    def _execute(self) -> None:
        """Queues one run. The first run loads and compiles kernels; later runs launch the CUDA graph."""
        if self._graph is not None:
            self._graph.launch(self._stream)
            return
        self._enqueue()
        if self._use_graph:
            self._stream.synchronize(self._name)
            self._capture()

    def _capture(self) -> None:
        """Captures a CUDA graph. Where that fails, later runs are queued kernel by kernel, which is slower."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX only
        try:
            if capturable is None or capturable(self._stream.handle):
                self._graph = cuda.Graph(self._stream, self._enqueue)
                return
        except BackendError:
            self._package.errors.clear()
        self._use_graph = False

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._stream.handle), "the run")

    def _set_address(self, name: str, buffer: cuda.DeviceBuffer) -> None:
        self._require(self._context.set_tensor_address(name, buffer.pointer), f"the address of {name}")

    def _require(self, succeeded: bool, doing: str) -> None:
        if not succeeded:
            raise BackendError(f"{self._name}: {self._package.name} refused {doing} ({self._package.take_errors()})")

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _unload(self) -> None:
        """Releases the TensorRT objects, each before the one that it needs."""
        with contextlib.suppress(BackendError):
            self._stream.synchronize(self._name)
        self._drop_graph()
        self._context = None
        self._engine = None
        self._runtime = None

    def _free_buffers(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
