"""Decides before an export whether a model fits in memory, and finds the least costly settings with which it does.

For a GPU, `tensorrt/checks.py` decides, as it does for a real engine, but from estimated sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
from msgspec import Struct
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.engine import list_engines
from ttt_video_engine.engines.tensorrt.memory import MemoryNeeds, weight_budget
from ttt_video_engine.planning.flops import VideoFlops, video_flops
from ttt_video_engine.planning.measured import Activations, EngineOf, activations_of
from ttt_video_engine.planning.memory import (
    GPU_WEIGHTS,
    ComponentMemory,
    build_memory,
    cpu_memory,
    gpu_memory,
    host_memory,
)
from ttt_video_engine.planning.shapes import file_bytes, num_parameters, weight_shapes
from ttt_video_engine.runtime.bundle import ENGINES, Bundle
from ttt_video_engine.runtime.config import ModelConfig, num_scenes
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError, ConfigError
from ttt_video_engine.runtime.quantization import Quantization, check_quantization
from ttt_video_engine.runtime.settings import GraphBackend

MORE_RAM = "add swap, or export on a machine with more RAM"
"""The cure where the RAM is too small for TensorRT to build an engine."""

GRAPHS = {"text_encoder": 1, "transformer": 1, "vae_decoder": 2}
"""Number of graphs by component, for one length. The engine of each graph contains its weights."""


class MemorySettings(Struct, frozen=True, kw_only=True):
    """Settings that determine how much memory a video needs. `length` is a name such as "9s"."""

    length: str
    dtype: DType
    quantize: Quantization = "none"
    low_memory: bool = False
    weight_streaming: bool = False


class Candidate(Struct, frozen=True, kw_only=True):
    """Settings, and the bytes that they need.

    `component` is the one that needs most: `needed` bytes of GPU memory, or of RAM in ONNX Runtime. `fits` is None
    where the available memory is unknown. `ram` is the RAM that rendering needs; streamed weights are part of it.
    """

    settings: MemorySettings
    component: str
    needed: int
    fits: bool | None
    ram: int


class ComponentNeeds(Struct, frozen=True, kw_only=True):
    """What one component needs with the requested settings, in bytes.

    `ram` is for rendering, `build_ram` for building its engines. `build_ram` and `gpu` are None in ONNX Runtime. `disk`
    does not include the graph files, which are small, before there is a bundle. `flops` are those of a whole video.
    """

    parameters: int
    disk: int
    ram: int
    build_ram: int | None
    gpu: ComponentMemory | None
    flops: int


class Stored(Struct, frozen=True):
    """Number of parameters of a component in a checkpoint, and their size in bytes."""

    parameters: int
    size: int


class Fit(Struct, frozen=True, kw_only=True):
    """The result of `ttt-video plan`, in bytes and FLOPs.

    `available` is the memory in which the model must fit, `ram_here` is the free RAM of this machine. Each is None
    where it is unknown. `chosen` is the first candidate that fits, or None.
    """

    model: ModelConfig
    asked: MemorySettings
    engine: GraphBackend
    num_steps: int
    components: dict[str, ComponentNeeds]
    flops_per_step: int
    flops_per_video: int
    available: int | None
    ram_here: int | None
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None


@dataclass(frozen=True)
class PlanInput:
    """A model and how it is to run.

    `disk` is the bytes of each component in a bundle; None without a bundle. `activations` are those of its engines.
    """

    model: ModelConfig
    asked: MemorySettings
    engine: GraphBackend
    num_steps: int
    disk: dict[str, int] | None = None
    activations: Activations = field(default_factory=dict)

    def weights(self, dtype: DType, quantize: Quantization = "none") -> dict[str, int]:
        """Bytes of the weights of each component."""
        return {name: file_bytes(shapes, dtype, quantize) for name, shapes in weight_shapes(self.model).items()}


def fit(request: PlanInput, available: int | None, ram_here: int | None) -> Fit:
    """Tries settings in order of their cost, and chooses the first with which every component fits.

    Tries shorter lengths only where the requested one does not fit. Raises ConfigError for bfloat16 in ONNX Runtime,
    for int8 with another precision or in TensorRT, and for a length that the model does not have.
    """
    if request.engine == "onnxruntime" and request.asked.dtype == "bfloat16":
        raise ConfigError(
            "--precision bfloat16: ONNX Runtime does not support it here; use float32, or --engine tensorrt"
        )
    check_quantization(request.asked.quantize, request.asked.dtype, tensorrt=request.engine == "tensorrt")
    request.model.clip_size(request.asked.length)
    candidates: list[Candidate] = []
    for settings in candidate_settings(request):
        settled = available is None or any(candidate.fits for candidate in candidates)
        if settled and settings.length != request.asked.length:
            break
        candidates.append(_candidate(request, settings, available))
    flops = video_flops(request.model, request.asked.length, request.num_steps)
    return Fit(
        model=request.model,
        asked=request.asked,
        engine=request.engine,
        num_steps=request.num_steps,
        components=_components(request, flops),
        flops_per_step=flops.transformer_step,
        flops_per_video=flops.total,
        available=available,
        ram_here=ram_here,
        candidates=tuple(candidates),
        chosen=next((candidate for candidate in candidates if candidate.fits), None),
    )


def candidate_settings(request: PlanInput) -> Iterator[MemorySettings]:
    """Yields the requested settings, then those that cost time, then precision, then length.

    --low-memory and --weight-streaming cost time: first each alone, then both.
    """
    asked, lengths = request.asked, sorted(request.model.text_lengths, key=lambda name: -num_scenes(name))
    tensorrt = request.engine == "tensorrt"
    dtypes: list[DType] = [asked.dtype]
    if tensorrt and asked.dtype == "float32":
        dtypes.append("bfloat16")
    for length in lengths[lengths.index(asked.length) :]:
        for dtype in dtypes:
            settings = replace(asked, length=length, dtype=dtype)
            yield settings
            yield replace(settings, low_memory=True)
            if tensorrt:
                yield replace(settings, weight_streaming=True)
                yield replace(settings, low_memory=True, weight_streaming=True)


def disk_bytes(bundle: Bundle) -> dict[str, int]:
    """Size in bytes of each component of a bundle: graphs, weights and TensorRT engines."""
    files = [(name, entry.size) for name, entry in bundle.manifest.files.items() if not name.startswith(ENGINES)]
    files += [(engine.entry.graph, engine.entry.size) for engine in list_engines(bundle.root)]
    return {component: sum(size for name, size in files if name.startswith(component)) for component in GRAPHS}


def available_ram() -> int:
    """Bytes of RAM that are available on this machine without swapping."""
    return psutil.virtual_memory().available


def _candidate(request: PlanInput, settings: MemorySettings, available: int | None) -> Candidate:
    fits = None
    if request.engine == "onnxruntime":
        ram = needs = _cpu_needs(request, settings)
        if available is not None:
            fits = max(needs.values()) <= available
    else:
        memory, streaming = _gpu_needs(request, settings), settings.weight_streaming
        needs = {name: part.total - part.weights * streaming for name, part in memory.items()}
        host = host_memory(request.model, settings.length)
        ram = {name: host[name] + part.weights * streaming for name, part in memory.items()}
        if available is not None:
            fits = all(_fits(name, part, settings, available) for name, part in memory.items())
    largest = max(needs, key=lambda name: needs[name])
    return Candidate(settings=settings, component=largest, needed=needs[largest], fits=fits, ram=max(ram.values()))


def _cpu_needs(request: PlanInput, settings: MemorySettings) -> dict[str, int]:
    weights = request.weights("float32", settings.quantize)
    memory = cpu_memory(request.model, settings.length, weights, low_memory=settings.low_memory)
    return {name: part.total for name, part in memory.items()}


def _gpu_needs(request: PlanInput, settings: MemorySettings) -> dict[str, ComponentMemory]:
    low_memory, weights = settings.low_memory, request.weights(settings.dtype)
    wanted = EngineOf(settings.dtype, settings.weight_streaming, 1 if low_memory else 2)
    measured = activations_of(request.activations, settings.length, wanted)
    return gpu_memory(request.model, settings.length, settings.dtype, weights, low_memory=low_memory, measured=measured)


def _fits(name: str, memory: ComponentMemory, settings: MemorySettings, available: int) -> bool:
    """Whether the runner would accept the engine of a component."""
    try:
        streamable = memory.weights if settings.weight_streaming else None
        engine = MemoryNeeds(memory.weights, memory.activations, streamable)
        room = available - memory.process - memory.io - memory.reserve
        weight_budget(name, engine, room, low_memory=settings.low_memory)
    except BackendError:
        return False
    return True


def _components(request: PlanInput, flops: VideoFlops) -> dict[str, ComponentNeeds]:
    asked, model = request.asked, request.model
    weights = request.weights(asked.dtype, asked.quantize)
    if request.engine == "tensorrt":
        gpu: dict[str, ComponentMemory] = _gpu_needs(request, asked)
        ram = host_memory(model, asked.length)
    else:
        gpu, ram = {}, _cpu_needs(request, asked)
    work = {
        "text_encoder": flops.text_encoder,
        "transformer": flops.num_steps * flops.transformer_step,
        "vae_decoder": flops.vae_decoder,
    }
    engines = {name: int(GRAPHS[name] * GPU_WEIGHTS[name] * size) if gpu else 0 for name, size in weights.items()}
    return {
        name: ComponentNeeds(
            parameters=num_parameters(shapes),
            disk=request.disk[name] if request.disk is not None else weights[name] + engines[name],
            ram=ram[name],
            build_ram=build_memory(weights[name]) if gpu else None,
            gpu=gpu.get(name),
            flops=work[name],
        )
        for name, shapes in weight_shapes(model).items()
    }
