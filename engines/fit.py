"""Whether a model fits, before anything is built, and the least costly settings that make it.

The verdict on a GPU is that of `tensorrt/checks.py`, from sizes that are estimated instead of read from a plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.checks import weight_budget
from ttt_video_engine.engines.tensorrt.plan import list_plans
from ttt_video_engine.runtime.bundle import ENGINES, Bundle
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, DType, ModelConfig
from ttt_video_engine.runtime.errors import ConfigError, EngineError
from ttt_video_engine.runtime.flops import VideoFlops, video_flops
from ttt_video_engine.runtime.memory import Memory, build_memory, cpu_memory, gpu_memory, host_memory
from ttt_video_engine.runtime.shapes import file_bytes, num_parameters, weight_shapes

EngineName = Literal["onnxruntime", "tensorrt"]

MORE_RAM = "add swap, or export where there is more"
"""What to do where TensorRT's build does not fit."""

GRAPHS = {"text_encoder": 1, "transformer": 1, "vae_decoder": 2}
"""Graphs of one length; TensorRT builds the weights into the plan of each."""


class Choice(Struct, frozen=True, kw_only=True):
    """Settings that change how much memory a video takes."""

    length: str
    dtype: DType
    low_memory: bool = False
    weight_streaming: bool = False


class Attempt(Struct, frozen=True, kw_only=True):
    """One choice and the memory that its largest component needs, on the GPU or, in ONNX Runtime, in RAM.

    `fits` is None where there is nothing to fit in. `ram` is what the machine needs besides; with weights streamed it
    holds all of them.
    """

    choice: Choice
    component: str
    needed: int
    fits: bool | None
    ram: int


class Component(Struct, frozen=True, kw_only=True):
    """One component with the settings asked for. `gpu`, and `build_ram` to make its plans with, are None in ONNX
    Runtime; `disk` is without graphs, which are small, where there is no bundle yet; `flops` are those of a whole
    video."""

    parameters: int
    disk: int
    ram: int
    build_ram: int | None
    gpu: Memory | None
    flops: int


class Stored(Struct, frozen=True):
    """Parameters of a component in a checkpoint, and their bytes."""

    parameters: int
    size: int


class Fit(Struct, frozen=True, kw_only=True):
    """What `ttt-video plan` found. `available` is the memory to fit in, None where it was not given; `ram_here` is what
    this machine has free, where it says."""

    model: ModelConfig
    asked: Choice
    engine: EngineName
    num_steps: int
    components: dict[str, Component]
    flops_per_step: int
    flops_per_video: int
    available: int | None
    ram_here: int | None
    attempts: tuple[Attempt, ...]
    chosen: Attempt | None


@dataclass(frozen=True)
class Subject:
    """A model and how it is to be run. `disk` are the bytes of each component in a bundle, where there is one."""

    model: ModelConfig
    asked: Choice
    engine: EngineName
    num_steps: int
    disk: dict[str, int] | None = None

    def weights(self, dtype: DType) -> dict[str, int]:
        return {name: file_bytes(shapes, dtype) for name, shapes in weight_shapes(self.model).items()}


def fit(subject: Subject, available: int | None, ram_here: int | None) -> Fit:
    """Tries settings from the least costly on; the first is chosen with which every component has room.

    Shorter lengths are tried where nothing helps the one asked for.

    Raises ConfigError for bfloat16 in ONNX Runtime and for a length that the model does not have.
    """
    if subject.engine == "onnxruntime" and subject.asked.dtype == "bfloat16":
        raise ConfigError("--precision bfloat16: ONNX Runtime runs none here; use float32, or --engine tensorrt")
    subject.model.clip_size(subject.asked.length)
    attempts: list[Attempt] = []
    for choice in choices(subject):
        settled = available is None or any(attempt.fits for attempt in attempts)
        if settled and choice.length != subject.asked.length:
            break
        attempts.append(_attempt(subject, choice, available))
    flops = video_flops(subject.model, subject.asked.length, subject.num_steps)
    return Fit(
        model=subject.model,
        asked=subject.asked,
        engine=subject.engine,
        num_steps=subject.num_steps,
        components=_components(subject, flops),
        flops_per_step=flops.transformer_step,
        flops_per_video=flops.total,
        available=available,
        ram_here=ram_here,
        attempts=tuple(attempts),
        chosen=next((attempt for attempt in attempts if attempt.fits), None),
    )


def choices(subject: Subject) -> Iterator[Choice]:
    """As asked, then what costs time (one branch after the other; weights over the bus), precision, length.

    With weights streamed, --low-memory would change nothing: the runner leaves room for both branches, as it has to
    set the budget before it can ask what one of them takes.
    """
    asked, lengths = subject.asked, sorted(subject.model.text_lengths, key=lambda name: -SCENES_PER_LENGTH[name])
    tensorrt = subject.engine == "tensorrt"
    dtypes: list[DType] = [asked.dtype]
    if tensorrt and asked.dtype == "float32":
        dtypes.append("bfloat16")
    for length in lengths[lengths.index(asked.length) :]:
        for dtype in dtypes:
            choice = replace(asked, length=length, dtype=dtype)
            yield choice
            yield replace(choice, low_memory=True)
            if tensorrt:
                yield replace(choice, weight_streaming=True)


def disk_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of each component of a bundle: graphs, weights and TensorRT plans."""
    files = [(name, entry.size) for name, entry in bundle.manifest.files.items() if not name.startswith(ENGINES)]
    files += [(plan.entry.graph, plan.entry.size) for plan in list_plans(bundle.root)]
    return {component: sum(size for name, size in files if name.startswith(component)) for component in GRAPHS}


def available_ram() -> int | None:
    """Bytes that this machine can give without swapping; None where it does not say (it does on Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kibibytes) << 10 for kibibytes in found), None)


def _attempt(subject: Subject, choice: Choice, available: int | None) -> Attempt:
    fits = None
    if subject.engine == "onnxruntime":
        ram = needs = _cpu_needs(subject, choice)
        if available is not None:
            fits = max(needs.values()) <= available
    else:
        memory, streaming = _gpu(subject, choice), choice.weight_streaming
        needs = {name: part.total - part.weights * streaming for name, part in memory.items()}
        host = host_memory(subject.model, choice.length)
        ram = {name: host[name] + part.weights * streaming for name, part in memory.items()}
        if available is not None:
            fits = all(_runs(name, part, choice, available) for name, part in memory.items())
    largest = max(needs, key=lambda name: needs[name])
    return Attempt(choice=choice, component=largest, needed=needs[largest], fits=fits, ram=max(ram.values()))


def _cpu_needs(subject: Subject, choice: Choice) -> dict[str, int]:
    memory = cpu_memory(subject.model, choice.length, subject.weights("float32"), low_memory=choice.low_memory)
    return {name: part.total for name, part in memory.items()}


def _gpu(subject: Subject, choice: Choice) -> dict[str, Memory]:
    weights = subject.weights(choice.dtype)
    return gpu_memory(subject.model, choice.length, choice.dtype, weights, low_memory=choice.low_memory)


def _runs(name: str, memory: Memory, choice: Choice, available: int) -> bool:
    """Whether the runner would take a component on."""
    try:
        weight_budget(
            name,
            weights=memory.weights,
            streamable=memory.weights if choice.weight_streaming else 0,
            activations=memory.activations,
            available=available - memory.process - memory.io,
            low_memory=choice.low_memory,
        )
    except EngineError:
        return False
    return True


def _components(subject: Subject, flops: VideoFlops) -> dict[str, Component]:
    asked, model = subject.asked, subject.model
    weights = subject.weights(asked.dtype)
    if subject.engine == "tensorrt":
        gpu: dict[str, Memory] = _gpu(subject, asked)
        ram = host_memory(model, asked.length)
    else:
        gpu, ram = {}, _cpu_needs(subject, asked)
    work = {
        "text_encoder": flops.text_encoder,
        "transformer": flops.num_steps * flops.transformer_step,
        "vae_decoder": flops.vae_decoder,
    }
    plans = {name: GRAPHS[name] * size if gpu else 0 for name, size in weights.items()}
    return {
        name: Component(
            parameters=num_parameters(shapes),
            disk=subject.disk[name] if subject.disk is not None else weights[name] + plans[name],
            ram=ram[name],
            build_ram=build_memory(weights[name]) if gpu else None,
            gpu=gpu.get(name),
            flops=work[name],
        )
        for name, shapes in weight_shapes(model).items()
    }
