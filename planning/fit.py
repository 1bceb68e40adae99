"""Whether a model fits, before anything is built, and the least costly settings that make it.

The verdict on a GPU is that of `tensorrt/checks.py`, from sizes that are estimated instead of read from an engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from msgspec import Struct
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.checks import EngineMemory, weight_budget
from ttt_video_engine.engines.tensorrt.engine import list_engines
from ttt_video_engine.planning.flops import VideoFlops, video_flops
from ttt_video_engine.planning.memory import ComponentMemory, build_memory, cpu_memory, gpu_memory, host_memory
from ttt_video_engine.planning.shapes import file_bytes, num_parameters, weight_shapes
from ttt_video_engine.runtime.bundle import ENGINES, Bundle
from ttt_video_engine.runtime.config import ModelConfig, num_scenes
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError, ConfigError
from ttt_video_engine.runtime.settings import BackendName

MORE_RAM = "add swap, or export where there is more"
"""What to do where TensorRT's build does not fit."""

GRAPHS = {"text_encoder": 1, "transformer": 1, "vae_decoder": 2}
"""Graphs of one length; TensorRT builds the weights into the engine of each."""


class MemorySettings(Struct, frozen=True, kw_only=True):
    """Settings that change how much memory a video takes."""

    length: str
    dtype: DType
    low_memory: bool = False
    weight_streaming: bool = False


class Candidate(Struct, frozen=True, kw_only=True):
    """Settings and the memory that its largest component needs, on the GPU or, in ONNX Runtime, in RAM.

    `fits` is None where there is nothing to fit in. `ram` is what the machine needs besides; with weights streamed it
    holds all of them.
    """

    settings: MemorySettings
    component: str
    needed: int
    fits: bool | None
    ram: int


class ComponentNeeds(Struct, frozen=True, kw_only=True):
    """One component with the settings asked for. `gpu`, and `build_ram` to build its engines with, are None in ONNX
    Runtime; `disk` is without graphs, which are small, where there is no bundle yet; `flops` are those of a whole
    video."""

    parameters: int
    disk: int
    ram: int
    build_ram: int | None
    gpu: ComponentMemory | None
    flops: int


class Stored(Struct, frozen=True):
    """Parameters of a component in a checkpoint, and their bytes."""

    parameters: int
    size: int


class Fit(Struct, frozen=True, kw_only=True):
    """What `ttt-video plan` found. `available` is the memory to fit in, None where it was not given; `ram_here` is what
    this machine has free, where it says."""

    model: ModelConfig
    asked: MemorySettings
    engine: BackendName
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
    """A model and how it is to be run. `disk` are the bytes of each component in a bundle, where there is one."""

    model: ModelConfig
    asked: MemorySettings
    engine: BackendName
    num_steps: int
    disk: dict[str, int] | None = None

    def weights(self, dtype: DType) -> dict[str, int]:
        return {name: file_bytes(shapes, dtype) for name, shapes in weight_shapes(self.model).items()}


def fit(wanted: PlanInput, available: int | None, ram_here: int | None) -> Fit:
    """Tries settings from the least costly on; the first is chosen with which every component has room.

    Shorter lengths are tried where nothing helps the one asked for.

    Raises ConfigError for bfloat16 in ONNX Runtime and for a length that the model does not have.
    """
    if wanted.engine == "onnxruntime" and wanted.asked.dtype == "bfloat16":
        raise ConfigError("--precision bfloat16: ONNX Runtime runs none here; use float32, or --engine tensorrt")
    wanted.model.clip_size(wanted.asked.length)
    candidates: list[Candidate] = []
    for settings in settings_to_try(wanted):
        settled = available is None or any(candidate.fits for candidate in candidates)
        if settled and settings.length != wanted.asked.length:
            break
        candidates.append(_candidate(wanted, settings, available))
    flops = video_flops(wanted.model, wanted.asked.length, wanted.num_steps)
    return Fit(
        model=wanted.model,
        asked=wanted.asked,
        engine=wanted.engine,
        num_steps=wanted.num_steps,
        components=_components(wanted, flops),
        flops_per_step=flops.transformer_step,
        flops_per_video=flops.total,
        available=available,
        ram_here=ram_here,
        candidates=tuple(candidates),
        chosen=next((candidate for candidate in candidates if candidate.fits), None),
    )


def settings_to_try(wanted: PlanInput) -> Iterator[MemorySettings]:
    """As asked, then what costs time (one branch after the other; weights over the bus), precision, length.

    With weights streamed, --low-memory would change nothing: the runner leaves room for both branches, as it has to
    set the budget before it can ask what one of them takes.
    """
    asked, lengths = wanted.asked, sorted(wanted.model.text_lengths, key=lambda name: -num_scenes(name))
    tensorrt = wanted.engine == "tensorrt"
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


def disk_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of each component of a bundle: graphs, weights and TensorRT engines."""
    files = [(name, entry.size) for name, entry in bundle.manifest.files.items() if not name.startswith(ENGINES)]
    files += [(engine.entry.graph, engine.entry.size) for engine in list_engines(bundle.root)]
    return {component: sum(size for name, size in files if name.startswith(component)) for component in GRAPHS}


def available_ram() -> int:
    """Bytes of RAM that this machine can give without swapping."""
    return psutil.virtual_memory().available


def _candidate(wanted: PlanInput, settings: MemorySettings, available: int | None) -> Candidate:
    fits = None
    if wanted.engine == "onnxruntime":
        ram = needs = _cpu_needs(wanted, settings)
        if available is not None:
            fits = max(needs.values()) <= available
    else:
        memory, streaming = _gpu(wanted, settings), settings.weight_streaming
        needs = {name: part.total - part.weights * streaming for name, part in memory.items()}
        host = host_memory(wanted.model, settings.length)
        ram = {name: host[name] + part.weights * streaming for name, part in memory.items()}
        if available is not None:
            fits = all(_runs(name, part, settings, available) for name, part in memory.items())
    largest = max(needs, key=lambda name: needs[name])
    return Candidate(settings=settings, component=largest, needed=needs[largest], fits=fits, ram=max(ram.values()))


def _cpu_needs(wanted: PlanInput, settings: MemorySettings) -> dict[str, int]:
    memory = cpu_memory(wanted.model, settings.length, wanted.weights("float32"), low_memory=settings.low_memory)
    return {name: part.total for name, part in memory.items()}


def _gpu(wanted: PlanInput, settings: MemorySettings) -> dict[str, ComponentMemory]:
    weights = wanted.weights(settings.dtype)
    return gpu_memory(wanted.model, settings.length, settings.dtype, weights, low_memory=settings.low_memory)


def _runs(name: str, memory: ComponentMemory, settings: MemorySettings, available: int) -> bool:
    """Whether the runner would take a component on."""
    try:
        streamable = memory.weights if settings.weight_streaming else None
        engine = EngineMemory(memory.weights, memory.activations, streamable)
        weight_budget(name, engine, available - memory.process - memory.io, low_memory=settings.low_memory)
    except BackendError:
        return False
    return True


def _components(wanted: PlanInput, flops: VideoFlops) -> dict[str, ComponentNeeds]:
    asked, model = wanted.asked, wanted.model
    weights = wanted.weights(asked.dtype)
    if wanted.engine == "tensorrt":
        gpu: dict[str, ComponentMemory] = _gpu(wanted, asked)
        ram = host_memory(model, asked.length)
    else:
        gpu, ram = {}, _cpu_needs(wanted, asked)
    work = {
        "text_encoder": flops.text_encoder,
        "transformer": flops.num_steps * flops.transformer_step,
        "vae_decoder": flops.vae_decoder,
    }
    engines = {name: GRAPHS[name] * size if gpu else 0 for name, size in weights.items()}
    return {
        name: ComponentNeeds(
            parameters=num_parameters(shapes),
            disk=wanted.disk[name] if wanted.disk is not None else weights[name] + engines[name],
            ram=ram[name],
            build_ram=build_memory(weights[name]) if gpu else None,
            gpu=gpu.get(name),
            flops=work[name],
        )
        for name, shapes in weight_shapes(model).items()
    }
