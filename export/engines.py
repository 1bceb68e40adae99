"""TensorRT engines of a bundle: one per graph and GPU, rebuilt only if their content key changed."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ttt_video_engine.engines.kernels.cubin import read_cubin
from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Scans, build_engine
from ttt_video_engine.engines.tensorrt.engine import (
    FOLDER,
    KERNELS,
    BuildSettings,
    EngineFile,
    Profile,
    ShapeRange,
    entry_path,
    readable_engines,
)
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.export.keys import Key, engine_environment, key_changes, package_version
from ttt_video_engine.export.stage import is_export_file
from ttt_video_engine.planning.fit import GRAPHS, MORE_RAM, available_ram
from ttt_video_engine.planning.memory import build_memory, gpu_activations
from ttt_video_engine.planning.report import gib
from ttt_video_engine.runtime.bundle import RANK, TEXT_ENCODER, FileEntry, Manifest, transformer_graph_name
from ttt_video_engine.runtime.callbacks import Progress, Report
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.files import link_or_copy
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.ttt_op import exported_version, num_scans

TRANSFORMER_BATCHES = (1, 2)
"""Batches of the transformer, each a profile: with --low-memory the guidance branches run one after the other. One
profile for both would need the memory of two for one."""
LEAST_WORKSPACE = 4 << 30
"""Bytes. The estimate is for large models; small ones need more than it in proportion, but never this much."""
WORKSPACE_FACTOR = 1.5
"""Factor on the estimate, which is within 5 % where attention and TTT layers run as single kernels, and too low for a
size that has none. The limit reserves nothing: an engine takes what it needs."""

GraphOnGpu = tuple[str, str]
"""(graph name, GPU architecture) of an engine."""


@dataclass(frozen=True)
class EngineRequest:
    """The engines that an export builds: GPU architectures such as `sm_89`, and the builder's settings."""

    gpus: tuple[str, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


def build_engines(
    manifest: Manifest,
    stage: Path,
    previous: Path | None,
    request: EngineRequest,
    report: Report,
    progress: Progress,
) -> bool:
    """Writes the requested engines of every graph for one device into `stage`. Returns whether the engines changed.

    `stage` holds the graphs that `manifest` describes. Engines are reused from the bundle at `previous`, those for
    other GPUs included, and from an interrupted export in `stage`, if their keys match. Raises BackendError if a build
    fails.
    """
    engines, settings = readable_engines(previous) if previous else [], request.settings
    old = {(engine.entry.graph, engine.entry.gpu): engine for engine in engines}
    graphs = [name for name, graph in manifest.graphs.items() if all(spec.name != RANK for spec in graph.inputs)]
    wanted = {(graph, gpu): _key(manifest, graph, gpu, settings) for graph in graphs for gpu in request.gpus}
    finished = _finished_engines(stage, wanted)
    changed = False
    for (graph, gpu), engine in old.items():
        if (graph, gpu) not in wanted and _matches_bundle(manifest, engine):
            _reuse_engine(engine, stage)
        elif (graph, gpu) not in wanted:
            report(f"{graph} for {gpu}: dropped because its graph has changed; add --gpu {gpu} to rebuild it")
            changed = True
    for (graph, gpu), key in sorted(wanted.items()):
        existing = old.get((graph, gpu))
        reasons = ["new"] if existing is None else key_changes(existing.entry.key, key)
        if existing is not None and not reasons:
            report(f"{graph} for {gpu}: unchanged")
            _reuse_engine(existing, stage)
            continue
        if (graph, gpu) in finished:
            report(f"{graph} for {gpu}: was built by the interrupted export")
            changed = True
            continue
        report(f"{graph} for {gpu}: {', '.join(reasons)}")
        _warn_of_memory(graph, manifest.files[manifest.graphs[graph].weights].size, report)
        engine = build_engine(_request(manifest, graph, gpu, settings, key, stage), stage / FOLDER, progress)
        report(f"{graph} for {gpu}: {_summary(engine)}")
        changed = True
    return changed


def engine_bytes(folders: Iterable[Path], gpus: Collection[str]) -> dict[str, int]:
    """Graph → bytes of its engines for `gpus` in these bundles and stages."""
    sizes: dict[GraphOnGpu, int] = {}
    for folder in folders:
        sizes |= {(engine.entry.graph, engine.entry.gpu): engine.entry.size for engine in readable_engines(folder)}
    totals: dict[str, int] = {}
    for (graph, gpu), size in sizes.items():
        if gpu in gpus:
            totals[graph] = totals.get(graph, 0) + size
    return totals


def check_gpus(gpus: Iterable[str]) -> None:
    """Raises ConfigError for an unknown architecture, BackendError if the package that builds for it is missing."""
    for gpu in gpus:
        load_package(package_for(gpu))


def stale_engines(manifest: Manifest, engines: Iterable[EngineFile]) -> dict[str, list[str]]:
    """Engine file name → why the same export would rebuild it with this installation; empty if it would be reused."""
    return {
        engine.path.name: key_changes(
            engine.entry.key, _key(manifest, engine.entry.graph, engine.entry.gpu, engine.entry.settings)
        )
        if engine.entry.graph in manifest.graphs
        else ["its graph is no longer in the bundle"]
        for engine in engines
    }


def _finished_engines(stage: Path, wanted: Mapping[GraphOnGpu, Key]) -> set[GraphOnGpu]:
    """The `wanted` engines that an interrupted export built in `stage`: their keys and digests match.

    Removes the files of all other engines.
    """
    engines = [
        engine
        for engine in readable_engines(stage)
        if wanted.get((engine.entry.graph, engine.entry.gpu)) == engine.entry.key and _is_intact(engine)
    ]
    kept = {path for engine in engines for path in _files(engine)}
    for path in (stage / FOLDER).rglob("*"):
        if path.is_file() and path not in kept and is_export_file(path.relative_to(stage).as_posix()):
            path.unlink()
    return {(engine.entry.graph, engine.entry.gpu) for engine in engines}


def _is_intact(engine: EngineFile) -> bool:
    try:
        engine.verify()
        for cubin in engine.entry.cubins:
            read_cubin(engine.path.with_name(Path(KERNELS).name), cubin)
    except BackendError:
        return False
    return True


def profiles(
    model: ModelConfig, lengths: Collection[str], inputs: Iterable[TensorSpec], name: str
) -> tuple[Profile, ...]:
    """Optimization profiles with the input shapes that the pipeline uses; none if the graph has no dynamic axes."""
    dynamic = [spec for spec in inputs if any(isinstance(axis, str) for axis in spec.shape)]
    if not dynamic:
        return ()
    if name == TEXT_ENCODER:
        text_lengths = [model.text_lengths[length] for length in lengths]
        return (
            _profile(dynamic, {"batch": 1, "tokens": min(text_lengths)}, {"batch": 1, "tokens": max(text_lengths)}),
        )
    return tuple(_profile(dynamic, {"batch": batch}, {"batch": batch}) for batch in TRANSFORMER_BATCHES)


def _profile(specs: Iterable[TensorSpec], low: Mapping[str, int], high: Mapping[str, int]) -> Profile:
    """A profile from the sizes `low` of the dynamic axes to the sizes `high`, optimised for these."""
    shapes: Profile = {}
    for spec in specs:
        least, most = (tuple(ends[n] if isinstance(n, str) else n for n in spec.shape) for ends in (low, high))
        shapes[spec.name] = ShapeRange(min=least, opt=most, max=most)
    return shapes


def workspace(model: ModelConfig, lengths: Collection[str], dtype: DType, name: str) -> int:
    """Bytes of scratch memory that the engine of a graph may need, for any of the lengths that it is for."""
    (component,) = (component for component in GRAPHS if name.startswith(component))
    own = [length for length in lengths if transformer_graph_name(length) == name] or lengths
    estimate = max(gpu_activations(model, length, dtype, max(TRANSFORMER_BATCHES))[component] for length in own)
    return max(LEAST_WORKSPACE, int(WORKSPACE_FACTOR * estimate))


def _request(manifest: Manifest, name: str, gpu: str, settings: BuildSettings, key: Key, stage: Path) -> BuildRequest:
    graph = manifest.graphs[name]
    return BuildRequest(
        graph=name,
        onnx=stage / graph.file,
        gpu=gpu,
        dtype=manifest.dtype,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=profiles(manifest.model, manifest.lengths, graph.inputs, name),
        settings=settings,
        kernels=stage / KERNELS,
        scans=_scans(manifest, name),
        weights=(stage / graph.weights).stat().st_size,
        workspace=workspace(manifest.model, manifest.lengths, manifest.dtype, name),
        key=key,
    )


def _scans(manifest: Manifest, name: str) -> Scans | None:
    """The TTT scans of a transformer: two per layer, forward and backward in time. None for a graph without any."""
    config = manifest.model.transformer
    if name not in {transformer_graph_name(length) for length in manifest.lengths} or config.ttt_kind is None:
        return None
    (length,) = (length for length in manifest.lengths if transformer_graph_name(length) == name)
    version = exported_version(manifest.dtype)
    count = num_scans(config, manifest.model.clip_size(length), version)
    return Scans(config.ttt_kind, config.mini_batch_size, config.head_dim, count, version)


def _key(manifest: Manifest, name: str, gpu: str, settings: BuildSettings) -> Key:
    """The key of an engine: everything that could change it."""
    graph = manifest.graphs[name]
    package = package_for(gpu)
    shapes = profiles(manifest.model, manifest.lengths, graph.inputs, name)
    environment = engine_environment()
    if _scans(manifest, name) is None:
        settings = replace(settings, plugins=True)  # without TTT nodes the setting has no effect
        del environment["tool triton"]  # Triton compiles the kernels of plugins only
    return {
        "graph": _digest(manifest.files, graph.file),
        "weights": _digest(manifest.files, graph.weights),
        "gpu": gpu,
        "precision": manifest.dtype,
        "profiles": hashlib.sha256(msgspec.json.encode(shapes, order="deterministic")).hexdigest(),
        "settings": msgspec.json.encode(settings, order="deterministic").decode(),
        **environment,
        "package": package,
        "package version": package_version(package),
    }


def _warn_of_memory(graph: str, weights: int, report: Report) -> None:
    needs, free = build_memory(weights), available_ram()
    if free is not None and needs > free:
        report(f"warning: {graph}: the TensorRT build needs {gib(needs)} of RAM, {gib(free)} are free; {MORE_RAM}")


def _matches_bundle(manifest: Manifest, engine: EngineFile) -> bool:
    """Whether an engine was built from the bundle's graph and weights. Packages and code may have changed since."""
    graph = manifest.graphs.get(engine.entry.graph)
    if graph is None:
        return False
    current = (_digest(manifest.files, graph.file), _digest(manifest.files, graph.weights), manifest.dtype)
    return current == tuple(engine.entry.key.get(part) for part in ("graph", "weights", "precision"))


def _digest(files: Mapping[str, FileEntry], name: str) -> str:
    return files[name].sha256


def _summary(engine: EngineFile) -> str:
    entry = engine.entry
    ttt = f", {len(entry.plugins)} plugin layers" if entry.plugins else ""
    fallback = f", TTT as standard operators: {entry.fallback}" if entry.fallback else ""
    return f"{entry.size:,} bytes in {entry.seconds:.1f} s{ttt}{fallback}"


def _reuse_engine(engine: EngineFile, stage: Path) -> None:
    """Links or copies an engine, its JSON and its cubins from the previous bundle into the stage."""
    bundle = engine.path.parent.parent
    for path in _files(engine):
        target = stage / path.relative_to(bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            link_or_copy(path, target)


def _files(engine: EngineFile) -> list[Path]:
    """Paths of an engine, its JSON, and the cubins that it launches, each with its JSON."""
    folder = engine.path.with_name(Path(KERNELS).name)
    cubins = [path for cubin in engine.entry.cubins for path in folder.glob(f"{cubin}.*")]
    return [engine.path, entry_path(engine.path), *cubins]
