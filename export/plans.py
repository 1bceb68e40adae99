"""TensorRT plans of a bundle: one per graph and GPU, built again only where something they are made of has changed."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ttt_video_engine.engines.tensorrt.builder import BuildRequest, Progress, Scans, build_plan
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.engines.tensorrt.plan import (
    FOLDER,
    KERNELS,
    BuildSettings,
    Plan,
    Profile,
    ShapeRange,
    entry_path,
    list_plans,
)
from ttt_video_engine.export.keys import Key, differences, package_version, source_digest
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, FileEntry, Manifest
from ttt_video_engine.runtime.bundle import transformer_graph as graph_name
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.engine import TensorSpec
from ttt_video_engine.runtime.files import link_or_copy

GUIDANCE_BRANCHES = (1, 2)
"""Smallest and largest batch of the transformer: with --low-memory the branches run one after the other."""

_SOURCES = ("engines/tensorrt/builder.py", "engines/tensorrt/plugin.py", "engines/kernels/*.py", "export/plans.py")

Report = Callable[[str], None]


def build_plans(
    manifest: Manifest,
    stage: Path,
    previous: Path | None,
    gpus: Collection[str],
    settings: BuildSettings,
    report: Report,
    progress: Progress,
) -> bool:
    """Fills `stage`/engines with the plans of every graph for `gpus`; whether any is new.

    `stage` holds the graphs that `manifest` describes; plans of the bundle at `previous` are taken over where they are
    made of the same, those for other GPUs too. Raises EngineError where a build fails.
    """
    old = {(plan.entry.graph, plan.entry.gpu): plan for plan in (list_plans(previous) if previous else [])}
    wanted = {(graph, gpu) for graph in manifest.graphs for gpu in gpus}
    changed = False
    for (graph, gpu), plan in old.items():
        if (graph, gpu) not in wanted and _usable(manifest, plan):
            _take_over(plan, stage)
        elif (graph, gpu) not in wanted:
            report(f"{graph} for {gpu}: dropped, its graph has changed; build it again with --gpu {gpu}")
            changed = True
    for graph, gpu in sorted(wanted):
        key = _key(manifest, graph, gpu, settings)
        before = old.get((graph, gpu))
        why = ["new"] if before is None else differences(before.entry.key, key)
        if before is not None and not why:
            report(f"{graph} for {gpu}: unchanged")
            _take_over(before, stage)
            continue
        report(f"{graph} for {gpu}: {', '.join(why)}")
        plan = build_plan(_request(manifest, graph, gpu, settings, key, stage), stage / FOLDER, progress)
        report(f"{graph} for {gpu}: {_summary(plan)}")
        changed = True
    return changed


def check_gpus(gpus: Iterable[str]) -> None:
    """Raises ConfigError for what is no architecture, EngineError where the package that builds for one is missing."""
    for gpu in gpus:
        load_package(package_for(gpu))


def stale_plans(manifest: Manifest, plans: Iterable[Plan]) -> dict[str, list[str]]:
    """Plan → why the same export would build it again here; empty where it would be kept."""
    return {
        plan.path.name: differences(
            plan.entry.key, _key(manifest, plan.entry.graph, plan.entry.gpu, plan.entry.settings)
        )
        if plan.entry.graph in manifest.graphs
        else ["its graph is no longer in the bundle"]
        for plan in plans
    }


def profiles(
    model: ModelConfig, lengths: Collection[str], inputs: Iterable[TensorSpec], name: str
) -> tuple[Profile, ...]:
    """One profile with the shapes that the pipeline feeds a graph; none where no axis is free."""
    text_lengths = [model.text_lengths[length] for length in lengths]
    ranges = {"batch": GUIDANCE_BRANCHES}
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
    if name not in {graph_name(length) for length in manifest.lengths}:
        return None
    return Scans(config.ttt, config.mini_batch_size, config.head_dim, count=2 * config.num_layers)


def _key(manifest: Manifest, name: str, gpu: str, settings: BuildSettings) -> Key:
    """Everything that could change a plan."""
    graph = manifest.graphs[name]
    package = package_for(gpu)
    shapes = profiles(manifest.model, manifest.lengths, graph.inputs, name)
    if _scans(manifest, name) is None:
        settings = replace(settings, plugins=True)  # nothing there that they could be for
    return {
        "graph": _digest(manifest.files, graph.file),
        "weights": _digest(manifest.files, graph.weights),
        "gpu": gpu,
        "precision": manifest.dtype,
        "profiles": hashlib.sha256(msgspec.json.encode(shapes, order="deterministic")).hexdigest(),
        "settings": msgspec.json.encode(settings, order="deterministic").decode(),
        "code": source_digest(*_SOURCES),
        "package": package,
        "package version": package_version(package),
    }


def _usable(manifest: Manifest, plan: Plan) -> bool:
    """Whether a plan still is of the bundle's graph and weights; packages and code may have moved on."""
    graph = manifest.graphs.get(plan.entry.graph)
    if graph is None:
        return False
    here = (_digest(manifest.files, graph.file), _digest(manifest.files, graph.weights), manifest.dtype)
    return here == tuple(plan.entry.key.get(part) for part in ("graph", "weights", "precision"))


def _digest(files: Mapping[str, FileEntry], name: str) -> str:
    return files[name].sha256


def _summary(plan: Plan) -> str:
    entry = plan.entry
    ttt = f", {len(entry.plugins)} plugin layers" if entry.plugins else ""
    fallback = f", TTT as standard operators: {entry.fallback}" if entry.fallback else ""
    return f"{entry.size:,} bytes in {entry.seconds:.1f} s{ttt}{fallback}"


def _take_over(plan: Plan, stage: Path) -> None:
    """A plan, its JSON and the cubins it launches, from the bundle before."""
    folder = stage / FOLDER
    folder.mkdir(exist_ok=True)
    for path in (plan.path, entry_path(plan.path)):
        link_or_copy(path, folder / path.name)
    old_kernels = plan.path.parent / Path(KERNELS).name
    for cubin in set(plan.entry.plugins.values()):
        (stage / KERNELS).mkdir(exist_ok=True)
        for path in old_kernels.glob(f"{cubin}.*"):
            if not (stage / KERNELS / path.name).exists():
                link_or_copy(path, stage / KERNELS / path.name)
