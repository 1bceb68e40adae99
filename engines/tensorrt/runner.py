"""Runs plans. Everything on the GPU belongs to an engine and goes with it, but for the arrays that it gave away."""

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.tensorrt.checks import choose_profile, export_again, usable_plan, weight_budget
from ttt_video_engine.engines.tensorrt.deserialise import check_tensors, deserialised
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.plan import KERNELS, Plan, Shape
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.engine import AnyArray, TensorSpec, check_inputs
from ttt_video_engine.runtime.errors import EngineError

CACHE_PREFIX = "cache_"
"""Inputs and outputs that stay on the GPU: what the VAE hands from window to window."""
REPEATED_PREFIX = "transformer-"
"""Graphs that run many times with one set of shapes, so that recording them pays."""


@dataclass(frozen=True)
class Memory:
    """What an engine may take of the GPU's memory: `limit` in bytes, None for all that is free."""

    limit: int | None = None
    low_memory: bool = False

    def available(self, taken: int = 0) -> int:
        """Bytes that are left to an engine that has `taken` some."""
        free = cuda.free_memory()
        return free if self.limit is None else min(free, self.limit - taken)


class TensorRTLoader:
    """Loads graphs of a bundle on the GPU of this machine. `gpu_memory` is the most that an engine may take, in bytes.

    With `low_memory` nothing is recorded as a CUDA graph, which takes memory of its own. Raises EngineError where there
    is no driver or no GPU.
    """

    def __init__(self, bundle: Bundle, *, low_memory: bool = False, gpu_memory: int | None = None) -> None:
        self._device = cuda.device()
        self._bundle = bundle
        self._memory = Memory(gpu_memory, low_memory)
        self._plans: dict[str, tuple[Plan, TensorRT]] = {}

    def check(self, graphs: Iterable[str]) -> None:
        """Raises EngineError unless each of these graphs has a plan that is whole and fits GPU, package and bundle."""
        for graph in graphs:
            self._plan(graph)

    def __call__(self, graph: str) -> "TensorRTEngine":
        plan, package = self._plan(graph)
        return TensorRTEngine(self._bundle, plan, package, self._memory)

    def _plan(self, graph: str) -> tuple[Plan, TensorRT]:
        if graph not in self._plans:
            self._plans[graph] = usable_plan(self._bundle, graph, self._device.gpu)
        return self._plans[graph]


class TensorRTEngine:
    """One plan, loaded. Inputs and outputs have buffers of its own, which grow when shapes do.

    Caches are the exception: it gives each away as a `DeviceArray` and reads them where they are.
    """

    def __init__(self, bundle: Bundle, plan: Plan, package: TensorRT, memory: Memory) -> None:
        self._name, self._entry, self._package, self._memory = plan.entry.graph, plan.entry, package, memory
        self._records = self._name.startswith(REPEATED_PREFIX) and not memory.low_memory
        self._shapes: dict[str, Shape] | None = None
        self._graph: cuda.Graph | None = None
        self._buffers: dict[str, cuda.DeviceBuffer] = {}
        self._scratch: cuda.DeviceBuffer | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._weights = 0
        with ExitStack() as stack:
            if plan.entry.plugins:
                from ttt_video_engine.engines.tensorrt.plugin import registered_plugins  # needs the kernels' packages

                stack.enter_context(registered_plugins(package, bundle.path(KERNELS), plan.entry.gpu))
            self._stream = cuda.Stream()
            stack.callback(self._stream.close)
            stack.callback(self._free_buffers)
            stack.callback(self._unload)
            self._load(plan)
            self._open: ExitStack | None = stack.pop_all()

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """As `Engine.run`. bfloat16 travels as uint16; caches come back as `DeviceArray`, and are taken as one or the
        other. Raises EngineError, too, where memory or CUDA fails."""
        if self._open is None:
            raise EngineError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self._entry.inputs, inputs)
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        if shapes != self._shapes:
            self._prepare(shapes)
        sources = [self._feed(spec.name, inputs[spec.name]) for spec in self._entry.inputs]
        outputs = {spec.name: self._place_for(spec) for spec in self._entry.outputs}
        self._execute()
        for name, array in outputs.items():
            if isinstance(array, np.ndarray):
                self._buffers[name].copy_to(array, self._stream)
        self._stream.synchronize(self._name)
        del sources  # the copies that were queued read from them until here
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _load(self, plan: Plan) -> None:
        entry, memory = plan.entry, self._memory
        available = memory.available()
        if not entry.settings.weight_streaming:
            self._budget(0, 0, available)
        self._runtime = self._package.api.Runtime(self._package.logger)
        self._engine = deserialised(self._package, self._runtime, plan)
        check_tensors(self._package, self._engine, plan)
        if entry.settings.weight_streaming:
            # No context yet, or the budget could not be set. With 0 the size below is that of a streaming engine.
            self._engine.weight_streaming_budget_v2 = 0
            streamable = int(self._engine.streamable_weights_size)
            budget = self._budget(streamable, int(self._engine.device_memory_size_v2), available)
            self._engine.weight_streaming_budget_v2 = streamable if budget is None else budget
            self._weights -= streamable - (streamable if budget is None else budget)
        self._context = self._engine.create_execution_context(self._context_options())
        if self._context is None:
            raise EngineError(f"{plan.path}: {self._package.name} cannot run it ({self._package.take_errors()})")

    def _budget(self, streamable: int, activations: int, available: int) -> int | None:
        self._weights = max(self._entry.weights, streamable)
        return weight_budget(
            self._name,
            weights=self._weights,
            streamable=streamable,
            activations=activations,
            available=available,
            low_memory=self._memory.low_memory,
        )

    def _context_options(self) -> Any:
        """Scratch memory is ours to give, so that it is what the shapes need and not what the largest would."""
        api = self._package.api
        ours = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._package.name != "tensorrt_rtx":
            return ours
        options = self._engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(ours)
        # Kernels for the shapes are compiled before the first run: one that is recorded cannot be replaced later.
        options.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        return options

    def _prepare(self, shapes: dict[str, Shape]) -> None:
        """Makes the context ready for these shapes. What was recorded with others is worth nothing then."""
        self._shapes = None
        self._drop_graph()
        profile = choose_profile(self._name, self._entry.profiles, shapes)
        if profile != self._context.active_optimization_profile:
            self._must(self._context.set_optimization_profile_async(profile, self._stream.handle), f"profile {profile}")
            self._stream.synchronize(self._name)
        for name, shape in shapes.items():
            self._must(self._context.set_input_shape(name, shape), f"input {name} of {list(shape)}")
        self._allocate_scratch(int(self._context.update_device_memory_size_for_shapes()))
        for spec in (*self._entry.inputs, *self._entry.outputs):
            if not spec.name.startswith(CACHE_PREFIX):
                self._allocate(spec)
        self._shapes = shapes

    def _allocate_scratch(self, size: int) -> None:
        if self._scratch is None or self._scratch.num_bytes < size:
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            available = self._memory.available(self._weights)
            weight_budget(
                self._name,
                weights=0,
                streamable=0,
                activations=size,
                available=available,
                low_memory=self._memory.low_memory,
            )
            self._scratch = cuda.DeviceBuffer(size)
        self._context.set_device_memory(self._scratch.pointer, self._scratch.num_bytes)

    def _allocate(self, spec: TensorSpec) -> None:
        size = cuda.num_bytes(self._shape(spec.name), spec.array_dtype)
        before = self._buffers.get(spec.name)
        if before is None or before.num_bytes < size:
            if before is not None:
                before.close()
            self._buffers[spec.name] = cuda.DeviceBuffer(size)
        self._address(spec.name, self._buffers[spec.name])

    def _shape(self, name: str) -> Shape:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise EngineError(f"{self._name}: {name} has no shape that follows from the inputs; {self._cure()}")
        return shape

    def _feed(self, name: str, array: AnyArray) -> AnyArray:
        """Brings an input to where the engine reads it, and returns what must live until it has."""
        if name.startswith(CACHE_PREFIX):
            if not isinstance(array, cuda.DeviceArray):
                array = cuda.to_device(array, self._stream)
            self._address(name, array.buffer)
            return array
        host = cuda.on_host(array)
        self._buffers[name].copy_from(host, self._stream)
        return host

    def _place_for(self, spec: TensorSpec) -> AnyArray:
        """Where an output comes to be: memory on the host to copy to, or on the GPU to give away."""
        shape = self._shape(spec.name)
        if not spec.name.startswith(CACHE_PREFIX):
            return np.empty(shape, spec.array_dtype)
        array = cuda.DeviceArray(shape, spec.array_dtype)
        self._address(spec.name, array.buffer)
        return array

    def _execute(self) -> None:
        """Queues one run: as it is the first time, which loads and compiles what it needs, then as recorded."""
        if self._graph is not None:
            self._graph.launch(self._stream)
            return
        self._enqueue()
        if self._records:
            self._stream.synchronize(self._name)
            self._record()

    def _record(self) -> None:
        """The next runs are recorded ones, or where this one cannot be recorded, as they were: slower, and right."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX only
        try:
            if capturable is None or capturable(self._stream.handle):
                self._graph = cuda.Graph(self._stream, self._enqueue)
                return
        except EngineError:
            self._package.errors.clear()
        self._records = False

    def _enqueue(self) -> None:
        self._must(self._context.execute_async_v3(self._stream.handle), "the run")

    def _address(self, name: str, buffer: cuda.DeviceBuffer) -> None:
        self._must(self._context.set_tensor_address(name, buffer.pointer), f"the address of {name}")

    def _must(self, succeeded: bool, doing: str) -> None:
        if not succeeded:
            raise EngineError(f"{self._name}: {self._package.name} refuses {doing} ({self._package.take_errors()})")

    def _cure(self) -> str:
        return export_again(self._entry.gpu)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _unload(self) -> None:
        """In this order: each needs the next."""
        with contextlib.suppress(EngineError):
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
