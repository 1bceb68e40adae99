"""TensorRT engines of a bundle: one per graph and GPU, built again only where what they are made of has changed."""

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
from ttt_video_engine.export.keys import Key, differences, engine_environment, package_version
from ttt_video_engine.export.stage import is_written
from ttt_video_engine.planning.fit import MORE_RAM, available_ram
from ttt_video_engine.planning.memory import build_memory
from ttt_video_engine.planning.report import gib
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, FileEntry, Manifest, transformer_graph_name
from ttt_video_engine.runtime.callbacks import Progress, Report
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.files import link_or_copy
from ttt_video_engine.runtime.runner import TensorSpec

TRANSFORMER_BATCHES = (1, 2)
"""Smallest and largest batch of the transformer: with --low-memory the branches run one after the other."""

GraphOnGpu = tuple[str, str]
"""A graph and the GPU that its engine is for."""


@dataclass(frozen=True)
class EngineRequest:
    """TensorRT engines to have in a bundle: for which GPUs, built how."""

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
    """Fills `stage`/engines with the engines of every graph that are asked for; whether any is new.

    `stage` holds the graphs that `manifest` describes; engines of the bundle at `previous` are taken over where they
    are made of the same, those for other GPUs too, and so are those that an export that was stopped left in `stage`.
    Raises BackendError where a build fails.
    """
    engines, settings = readable_engines(previous) if previous else [], request.settings
    old = {(engine.entry.graph, engine.entry.gpu): engine for engine in engines}
    wanted = {(graph, gpu): _key(manifest, graph, gpu, settings) for graph in manifest.graphs for gpu in request.gpus}
    finished = _finished(stage, wanted)
    changed = False
    for (graph, gpu), engine in old.items():
        if (graph, gpu) not in wanted and _usable(manifest, engine):
            _reuse_engine(engine, stage)
        elif (graph, gpu) not in wanted:
            report(f"{graph} for {gpu}: dropped, its graph has changed; build it again with --gpu {gpu}")
            changed = True
    for (graph, gpu), key in sorted(wanted.items()):
        before = old.get((graph, gpu))
        why = ["new"] if before is None else differences(before.entry.key, key)
        if before is not None and not why:
            report(f"{graph} for {gpu}: unchanged")
            _reuse_engine(before, stage)
            continue
        if (graph, gpu) in finished:
            report(f"{graph} for {gpu}: was built before the export was stopped")
            changed = True
            continue
        report(f"{graph} for {gpu}: {', '.join(why)}")
        _warn_of_memory(graph, manifest.files[manifest.graphs[graph].weights].size, report)
        engine = build_engine(_request(manifest, graph, gpu, settings, key, stage), stage / FOLDER, progress)
        report(f"{graph} for {gpu}: {_summary(engine)}")
        changed = True
    return changed


def bytes_built(folders: Iterable[Path], gpus: Collection[str]) -> dict[str, int]:
    """Graph → bytes of its engines for `gpus` that one of these bundles has, or a folder in which one grows."""
    sizes: dict[GraphOnGpu, int] = {}
    for folder in folders:
        sizes |= {(engine.entry.graph, engine.entry.gpu): engine.entry.size for engine in readable_engines(folder)}
    built: dict[str, int] = {}
    for (graph, gpu), size in sizes.items():
        if gpu in gpus:
            built[graph] = built.get(graph, 0) + size
    return built


def check_gpus(gpus: Iterable[str]) -> None:
    """Raises ConfigError for what is no architecture, BackendError where the package that builds for one is missing."""
    for gpu in gpus:
        load_package(package_for(gpu))


def stale_engines(manifest: Manifest, engines: Iterable[EngineFile]) -> dict[str, list[str]]:
    """EngineFile → why the same export would build it again here; empty where it would be kept."""
    return {
        engine.path.name: differences(
            engine.entry.key, _key(manifest, engine.entry.graph, engine.entry.gpu, engine.entry.settings)
        )
        if engine.entry.graph in manifest.graphs
        else ["its graph is no longer in the bundle"]
        for engine in engines
    }


def _finished(stage: Path, wanted: Mapping[GraphOnGpu, Key]) -> set[GraphOnGpu]:
    """What an export that was stopped has built of the engines that are `wanted`, by their keys, each held to its
    digest; the files of all others are removed."""
    engines = [
        engine
        for engine in readable_engines(stage)
        if wanted.get((engine.entry.graph, engine.entry.gpu)) == engine.entry.key and _is_whole(engine)
    ]
    kept = {path for engine in engines for path in _files(engine)}
    for path in (stage / FOLDER).rglob("*"):
        if path.is_file() and path not in kept and is_written(path.relative_to(stage).as_posix()):
            path.unlink()
    return {(engine.entry.graph, engine.entry.gpu) for engine in engines}


def _is_whole(engine: EngineFile) -> bool:
    try:
        engine.verify()
        for cubin in set(engine.entry.plugins.values()):
            read_cubin(engine.path.with_name(Path(KERNELS).name), cubin)
    except BackendError:
        return False
    return True


def profiles(
    model: ModelConfig, lengths: Collection[str], inputs: Iterable[TensorSpec], name: str
) -> tuple[Profile, ...]:
    """One profile with the shapes that the pipeline feeds a graph; none where no axis is free."""
    text_lengths = [model.text_lengths[length] for length in lengths]
    ranges = {"batch": TRANSFORMER_BATCHES}
    if name == TEXT_ENCODER:
        ranges = {"batch": (1, 1), "tokens": (min(text_lengths), max(text_lengths))}
    shapes: Profile = {}
    for spec in inputs:
        if any(isinstance(axis, str) for axis in spec.shape):
            low, high = (
                tuple(ranges[axis][end] if isinstance(axis, str) else axis for axis in spec.shape) for end in (0, 1)
            )
            shapes[spec.name] = ShapeRange(min=low, opt=high, max=high)
    return (shapes,) if shapes else ()


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
        key=key,
    )


def _scans(manifest: Manifest, name: str) -> Scans | None:
    """A transformer reads every layer's clip forwards and backwards."""
    config = manifest.model.transformer
    if name not in {transformer_graph_name(length) for length in manifest.lengths}:
        return None
    return Scans(config.ttt, config.mini_batch_size, config.head_dim, count=2 * config.num_layers)


def _key(manifest: Manifest, name: str, gpu: str, settings: BuildSettings) -> Key:
    """Everything that could change an engine."""
    graph = manifest.graphs[name]
    package = package_for(gpu)
    shapes = profiles(manifest.model, manifest.lengths, graph.inputs, name)
    environment = engine_environment()
    if _scans(manifest, name) is None:
        settings = replace(settings, plugins=True)  # nothing there that they could be for
        del environment["tool triton"]  # which compiles the kernels of plugins
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
        report(f"warning: {graph}: TensorRT takes {gib(needs)} of RAM, {gib(free)} are free here; {MORE_RAM}")


def _usable(manifest: Manifest, engine: EngineFile) -> bool:
    """Whether an engine still is of the bundle's graph and weights; packages and code may have moved on."""
    graph = manifest.graphs.get(engine.entry.graph)
    if graph is None:
        return False
    here = (_digest(manifest.files, graph.file), _digest(manifest.files, graph.weights), manifest.dtype)
    return here == tuple(engine.entry.key.get(part) for part in ("graph", "weights", "precision"))


def _digest(files: Mapping[str, FileEntry], name: str) -> str:
    return files[name].sha256


def _summary(engine: EngineFile) -> str:
    entry = engine.entry
    ttt = f", {len(entry.plugins)} plugin layers" if entry.plugins else ""
    fallback = f", TTT as standard operators: {entry.fallback}" if entry.fallback else ""
    return f"{entry.size:,} bytes in {entry.seconds:.1f} s{ttt}{fallback}"


def _reuse_engine(engine: EngineFile, stage: Path) -> None:
    """An engine, its JSON and the cubins it launches, from the bundle before."""
    bundle = engine.path.parent.parent
    for path in _files(engine):
        target = stage / path.relative_to(bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            link_or_copy(path, target)


def _files(engine: EngineFile) -> list[Path]:
    """An engine, its JSON, and the files of the kernels that it launches, each with its JSON."""
    folder = engine.path.with_name(Path(KERNELS).name)
    cubins = [path for cubin in sorted(set(engine.entry.plugins.values())) for path in folder.glob(f"{cubin}.*")]
    return [engine.path, entry_path(engine.path), *cubins]
