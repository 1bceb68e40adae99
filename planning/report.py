"""Formats the output of `ttt-video plan`: components, settings, verdict and commands."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from msgspec import UNSET
from msgspec.structs import replace

from ttt_video_engine.planning.fit import MORE_RAM, Candidate, Fit, MemorySettings, Stored
from ttt_video_engine.planning.shapes import can_be_seeded
from ttt_video_engine.planning.table import text_table
from ttt_video_engine.runtime.bundle import Bundle, transformer_graph_name
from ttt_video_engine.runtime.config import ModelConfig, ttt_label
from ttt_video_engine.runtime.presets import COGVIDEOX, PRESETS
from ttt_video_engine.runtime.quantization import precision
from ttt_video_engine.runtime.settings import Settings

GPU_NOTE = """\
GPU memory is estimated, not measured on a GPU. Only one component is in memory at a time.
Disk is the weights and, with TensorRT, the engines for one GPU architecture."""
ENGINE_NOTE = "Activations of {}: as TensorRT stated them when it built the bundle's engines."
CPU_NOTE = """\
RAM is estimated, within 15% of what was measured for tiny and debug on a CPU. Only one component
is in memory at a time. ONNX Runtime computes in float32 there: float16 saves disk, not memory."""
_PLACEHOLDERS = ("CHECKPOINT", "ARCH", "FILE")
_FILL_IN = "Replace the words in capitals. ARCH is the architecture of your GPU, see ttt-video devices."
_COLUMNS = 96
_DEFAULT_STEPS = Settings().num_steps


def report(found: Fit, commands: Sequence[str], checkpoint: Mapping[str, Stored]) -> Iterator[str]:
    """Lines of at most 100 columns, except for the commands."""
    model, asked = found.model, found.asked
    size = model.clip_size(asked.length)
    tokens, frames = size.num_tokens(model.transformer.patch_size), model.num_video_frames(size)
    kind, numbers = ttt_label(model.transformer.ttt), precision(asked.dtype, asked.quantize)
    yield f"{model.name}, {kind}, {model.width}x{model.height}, {numbers}, {found.engine}"
    scenes = f"{size.num_scenes} scene{'s' if size.num_scenes > 1 else ''}"
    yield f"{asked.length}: {scenes}, {tokens:,} tokens, {frames:,} frames, {found.num_steps} steps"
    yield ""
    yield from _aligned(_component_rows(found))
    yield ""
    yield f"one denoising step:   {tera(found.flops_per_step)} TFLOP, both branches of guidance"
    yield f"whole video:          {tera(found.flops_per_video)} TFLOP"
    if found.engine == "tensorrt":
        yield from wrap(f"building the engines: {building(found)}", _COLUMNS, subsequent_indent=" " * 22)
    yield ""
    yield from _aligned(_candidate_rows(found))
    yield ""
    yield from wrap(verdict(found), _COLUMNS)
    for name, stored in checkpoint.items():
        yield f"checkpoint, {name}: {stored.parameters:,} parameters, {gib(stored.size)}"
    if commands:
        yield ""
        for command in commands:
            yield from _wrapped(command)
        if any(name in command for command in commands for name in _PLACEHOLDERS):
            yield ""
            yield _FILL_IN
    yield ""
    yield GPU_NOTE if found.engine == "tensorrt" else CPU_NOTE
    stated = [name for name, part in found.components.items() if part.gpu is not None and part.gpu.measured]
    if stated:
        yield ENGINE_NOTE.format(", ".join(stated))


def verdict(found: Fit) -> str:
    """One line: whether the model fits, and with which settings."""
    memory = "RAM" if found.engine == "onnxruntime" else "GPU memory"
    first, chosen = found.candidates[0], found.chosen
    if found.available is None:
        cure = "the RAM of this machine is unknown" if memory == "RAM" else "give --gpu-memory for a verdict"
        return f"needs {gib(first.needed)} of {memory} ({first.component}); {cure}"
    room = f"{gib(found.available)} of {memory}"
    if chosen is None:
        least = min(found.candidates, key=lambda candidate: candidate.needed)
        needs = f"at least {gib(least.needed)} ({least.component}), with {describe(least.settings)}"
        size = f"{found.model.width}x{found.model.height}"
        return f"does not fit in {room} with any settings: {size} needs {needs}"
    if chosen.settings == found.asked:
        return f"fits in {room} as requested: needs {gib(chosen.needed)} ({chosen.component})"
    return f"does not fit in {room} as requested; fits with {describe(chosen.settings)}"


def building(found: Fit) -> str:
    """The RAM that TensorRT needs to build the largest engine, and whether this machine has it."""
    needs = {name: part.build_ram for name, part in found.components.items() if part.build_ram is not None}
    largest = max(needs, key=lambda name: needs[name])
    needed = f"{gib(needs[largest])} of RAM ({largest})"
    if found.ram_here is None:
        return needed
    line = f"{needed}; this machine has {gib(found.ram_here)} free"
    return line if needs[largest] <= found.ram_here else f"{line}: {MORE_RAM}"


def commands(found: Fit, source: Sequence[str], bundle: Bundle | None, gpu_memory: str | None) -> list[str]:
    """The commands that export, where needed, and render with the chosen settings, or else the requested ones.

    Empty where nothing fits. `source` are the options of export that specify the model.
    """
    if found.available is not None and found.chosen is None:
        return []
    settings = found.chosen.settings if found.chosen is not None else found.asked
    tensorrt = found.engine == "tensorrt"
    target = "BUNDLE" if bundle is None else str(bundle.root)
    export = ["ttt-video", "export", *source, "--length", settings.length]
    if settings.dtype != "float32":
        export += ["--precision", settings.dtype]
    if settings.quantize != "none":
        export += ["--quantize", settings.quantize]
    if tensorrt:
        export += ["--engine", "tensorrt", "--gpu", "ARCH"]
    if settings.weight_streaming:
        export += ["--weight-streaming"]
    sample = ["ttt-video", "sample", "STORYBOARD", "--bundle", target]
    if found.num_steps != _DEFAULT_STEPS:
        sample += ["--num-steps", str(found.num_steps)]
    if tensorrt:
        sample += ["--engine", "tensorrt"]
    if settings.weight_streaming and gpu_memory is not None:
        sample += ["--gpu-memory", gpu_memory]
    if settings.low_memory:
        sample += ["--low-memory"]
    exported = [] if bundle is not None and _has(bundle, settings, found) else [" ".join([*export, "--output", target])]
    return [*exported, " ".join(sample)]


def source_options(model: ModelConfig, checkpoint: Path | None, config: Path | None = None) -> list[str]:
    """The options of `export` that specify this model."""
    kind = model.transformer.ttt
    if model.name == COGVIDEOX and config is None:  # the checkpoint states the rest
        return ["--ttt", kind, *_other_size(model), "--checkpoint", str(checkpoint or "CHECKPOINT")]
    named = PRESETS[model.name](kind) if model.name in PRESETS else None
    model = _as_exported(model, named)
    others = [name for name in model.__struct_fields__ if name not in ("width", "height")]
    if named is None or any(getattr(model, name) != getattr(named, name) for name in others):
        options = ["--config", str(config or "FILE")]
    else:
        options = ["--preset", model.name, "--ttt", kind]
        for name in ("width", "height"):
            if getattr(model, name) != getattr(named, name):
                options += [f"--{name}", str(getattr(model, name))]
    if checkpoint is not None or not can_be_seeded(model):
        options += ["--checkpoint", str(checkpoint or "CHECKPOINT")]
    return options


def _other_size(model: ModelConfig) -> list[str]:
    """The options for a size of frames that CogVideoX was not trained on."""
    step, grid = model.transformer.patch_size * model.vae.spatial_factor, model.transformer.rope_grid
    trained = () if grid is UNSET else tuple(step * side for side in grid)
    return [] if trained == (model.height, model.width) else [f"--height {model.height}", f"--width {model.width}"]


def _as_exported(model: ModelConfig, named: ModelConfig | None) -> ModelConfig:
    """`model` without the text lengths that a bundle states beside those of its preset, where they follow from them."""
    if named is None or not named.text_lengths.items() <= model.text_lengths.items():
        return model
    without = replace(model, text_lengths=named.text_lengths)
    return without if without.stating(model.text_lengths) == model else model


def describe(settings: MemorySettings) -> str:
    """Settings as options of `export` and `sample`."""
    options = [f"--length {settings.length}", f"--precision {settings.dtype}"]
    options += [f"--quantize {settings.quantize}"] * (settings.quantize != "none")
    return " ".join([*options, *_savings(settings)])


def _savings(settings: MemorySettings) -> list[str]:
    return ["--low-memory"] * settings.low_memory + ["--weight-streaming"] * settings.weight_streaming


def gib(size: int) -> str:
    """A size in bytes as GiB, or as MiB where it is smaller."""
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.1f} MiB"


def tera(flops: int) -> str:
    """FLOPs as a number of TFLOP."""
    return f"{flops / 1e12:,.3g}" if flops < 1e14 else f"{flops / 1e12:,.0f}"


def _has(bundle: Bundle, settings: MemorySettings, found: Fit) -> bool:
    """Whether a bundle can render with these settings already. Engines are ignored: their GPU is unknown here."""
    manifest = bundle.manifest
    return found.engine == "onnxruntime" and transformer_graph_name(settings.length) in manifest.graphs


def _component_rows(found: Fit) -> Iterator[list[str]]:
    gpu = ["GPU", "weights", "activations"] if found.engine == "tensorrt" else []
    yield ["component", "parameters", "disk", "RAM", *gpu, "TFLOP"]
    for name, part in found.components.items():
        memory = [] if part.gpu is None else [gib(part.gpu.total), gib(part.gpu.weights), gib(part.gpu.activations)]
        yield [name, f"{part.parameters:,}", gib(part.disk), gib(part.ram), *memory, tera(part.flops)]
    parts = found.components.values()
    peak = [] if not gpu else [gib(max(part.gpu.total for part in parts if part.gpu is not None)), "", ""]
    total = [f"{sum(part.parameters for part in parts):,}", gib(sum(part.disk for part in parts))]
    yield ["total / peak", *total, gib(max(part.ram for part in parts)), *peak, tera(found.flops_per_video)]


def _candidate_rows(found: Fit) -> Iterator[list[str]]:
    """All candidates of the requested length, and the last candidate."""
    tensorrt = found.engine == "tensorrt"
    yield ["settings", *(["GPU", "RAM"] if tensorrt else ["RAM"]), "largest component", "fits"]
    for candidate in found.candidates:
        if candidate.settings.length == found.asked.length or candidate == found.candidates[-1]:
            sizes = [gib(candidate.needed), gib(candidate.ram)] if tensorrt else [gib(candidate.ram)]
            settings = " ".join([candidate.settings.length, candidate.settings.dtype, *_savings(candidate.settings)])
            yield [settings, *sizes, candidate.component, _answer(candidate)]


def _answer(candidate: Candidate) -> str:
    return {True: "yes", False: "no", None: "?"}[candidate.fits]


def _wrapped(command: str) -> Iterator[str]:
    """A command on as many lines as needed, joined by backslashes; breaks only before options."""
    first, *options = command.split(" --")
    line = f"  {first}"
    for option in options:
        if len(line) + len(option) + 5 > _COLUMNS:
            yield f"{line} \\"
            line = "     "
        line += f" --{option}"
    yield line


def _aligned(rows: Iterator[list[str]]) -> list[str]:
    """The first column left-aligned, the others right-aligned."""
    cells = list(rows)
    return text_table(cells, numbers=range(1, len(cells[0])))
