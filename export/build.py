"""Builds a bundle: each component in turn, exported, gated, and only what changed.

No component is ever in memory: graphs are traced from modules without weights, weights go from the checkpoint to the
bundle a tensor at a time. The new bundle grows beside the old one and takes its place whole at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ttt_video_engine.export.engines import EngineRequest, build_engines, bytes_built, check_gpus
from ttt_video_engine.export.graphs.components import component_graphs, graph_weights
from ttt_video_engine.export.graphs.graph import OPSET, Graph, read_signature, save, trace
from ttt_video_engine.export.graphs.journal import journal_of
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, WeightFile, lay_out, write_weights
from ttt_video_engine.export.keys import TOOLS, Key, differences, graph_key, package_version, weights_key
from ttt_video_engine.export.parity.gate import Gate
from ttt_video_engine.export.sources.source import Component, ModelSource, components_of
from ttt_video_engine.export.stage import Stage, export_lock, open_stage
from ttt_video_engine.export.swap import bundle_files, settle
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.runtime.bundle import (
    ENGINES,
    TOKENIZER,
    Bundle,
    FileEntry,
    GraphEntry,
    Manifest,
    encode_manifest,
    open_bundle,
)
from ttt_video_engine.runtime.callbacks import Progress, Report
from ttt_video_engine.runtime.config import ModelConfig, num_scenes
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.files import check_replaceable, check_space, sha256_of, writing

WEIGHTS_FILE = "model.onnx_data"
GRAPH_BYTES = 8 << 20
"""At most, for a graph without its weights: the largest of the 5B model has 3.1 MB."""


def _no_progress(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Extras:
    """What few exports ask for: TensorRT engines, progress of long stages, and TTT nodes as standard operators."""

    engines: EngineRequest = field(default_factory=EngineRequest)
    progress: Progress = _no_progress
    inline: bool = False


def export_bundle(
    source: ModelSource,
    output: Path,
    lengths: Sequence[str],
    dtype: DType,
    report: Report,
    extras: Extras | None = None,
) -> Bundle:
    """Makes or updates the bundle at `output`, for `lengths` and those it already has.

    Engines for other GPUs stay while their graphs do, and files that are not the bundle's stay in its folder. `report`
    is told in a line each what is built, why, and how parity came out. Raises CheckFailed where a component is over
    tolerance. However it ends before the end, `output` is then as it was, and what was finished waits beside it for the
    next export. Raises OutputError, before any work, where another export of the same bundle is running, and where
    `output` cannot be replaced or holds anything but a bundle.
    """
    extras = extras or Extras()
    check_gpus(extras.engines.gpus)
    for length in lengths:
        source.model.clip_size(length)
    output = check_replaceable(output)
    components = components_of(source)
    with writing(output), export_lock(output):
        previous = _previous(output)
        has = () if previous is None else previous.manifest.lengths
        lengths = sorted({*lengths, *has}, key=num_scenes)
        with _staging(output, previous, report) as stage:
            build = _Build(source, components, dtype, lengths, stage, report, extras.progress, extras.inline)
            build.check_space(output, extras.engines.gpus)
            build.tokenizer()
            for name in components:
                build.component(name)
            build.engines(extras.engines)
            if previous is not None and not build.changed and list(has) == lengths:
                report("nothing has changed")
                stage.discard()
                return previous
            stage.complete(encode_manifest(build.manifest()), output)
        return open_bundle(output)


@dataclass
class _Build:
    """A bundle in the making."""

    source: ModelSource
    components: Mapping[str, Component[nn.Module]]
    dtype: DType
    lengths: Sequence[str]
    stage: Stage
    report: Report
    progress: Progress
    inline: bool
    graphs: dict[str, GraphEntry] = field(default_factory=dict)
    tokenizer_key: Key = field(default_factory=dict)
    changed: bool = False

    @property
    def model(self) -> ModelConfig:
        """The source's model, with the text length of every exported length stated.

        Keys hold the source's own, so that another length leaves the graphs that are there as they are.
        """
        return self.source.model.stating(self.lengths)

    def __post_init__(self) -> None:
        self._gate = Gate(self.model, self.components, self.dtype, self.stage.root / TOKENIZER)

    def check_space(self, output: Path, gpus: Sequence[str]) -> None:
        """Raises OutputError unless the disk has room for all that may have to be written."""
        previous = self.stage.previous
        folders = [self.stage.root] if previous is None else [previous.root, self.stage.root]
        built = bytes_built(folders, gpus)
        needs = {}
        for name in self.components:
            file, _ = self._layout(name)
            graphs = len(self.lengths) if name == "transformer" else 2 if name == "vae_decoder" else 1
            engines = graphs * len(gpus) * file.size  # an engine holds the weights of its graph
            if self.stage.has_weights(f"{name}/{WEIGHTS_FILE}", self._weights_key(name)):
                engines = max(0, engines - sum(size for graph, size in built.items() if graph.startswith(name)))
                weights = 0
            else:
                weights = file.size - (file.path.stat().st_size if journal_of(file.path).exists() else 0)
            needs[name] = weights + graphs * GRAPH_BYTES + engines
        check_space(output, needs)

    def tokenizer(self) -> None:
        path = self.stage.root / TOKENIZER
        path.parent.mkdir(exist_ok=True)
        self.source.tokenizer().save(str(path))
        self.tokenizer_key = {"content": sha256_of(path)}
        previous = self.stage.previous
        if previous is None or previous.manifest.tokenizer_key != self.tokenizer_key:
            self.changed = True

    def component(self, name: str) -> None:
        """Brings the weights of one component and its graphs into the stage, built or taken over."""
        file, entry = self._weights(name)
        module = with_placeholder_weights(self.components[name].build, TORCH_DTYPES[self.dtype])
        for graph in component_graphs(module, self.model, self.lengths, inline=self.inline):
            key = graph_key(
                self.source.model,
                weights=entry.sha256,
                dtype=self.dtype,
                opset=OPSET,
                length=graph.length,
                inline=graph.inline,
            )
            kept = self.stage.graph(graph.name, key)
            if kept is not None:
                self.report(f"{graph.name}: unchanged")
            self.graphs[graph.name] = kept or self.stage.add_graph(graph.name, self._graph(graph, file, key))
            self.changed = self.changed or not self._is_previous(graph.name)

    def engines(self, request: EngineRequest) -> None:
        """Brings TensorRT's engines into the stage, built or taken over."""
        before, manifest, root = self.stage.previous, self.manifest(), self.stage.root
        previous = None if before is None else before.root
        if build_engines(manifest, root, previous, request, self.report, self.progress):
            self.changed = True
        had = [] if before is None else [name for name in before.manifest.files if name.startswith(ENGINES)]
        if not all((root / name).exists() for name in had):  # damaged, or of a program before this one
            self.changed = True

    def manifest(self) -> Manifest:
        """What the stage holds; it then holds nothing else."""
        weights = {graph.weights for graph in self.graphs.values()}
        return Manifest(
            model=self.model,
            dtype=self.dtype,
            opset=OPSET,
            lengths=tuple(self.lengths),
            graphs=self.graphs,
            tokenizer_key=self.tokenizer_key,
            weight_keys={name: self.stage.finished.weight_keys[name] for name in sorted(weights)},
            files=self.stage.keep_only({*weights, *(graph.file for graph in self.graphs.values()), TOKENIZER}),
            tools={name: package_version(name) for name in TOOLS},
        )

    def _weights(self, name: str) -> tuple[WeightFile, FileEntry]:
        """The weight file of a component: of an earlier export where the checkpoint is the same, else written."""
        file, weights = self._layout(name)
        weights_name, key = f"{name}/{WEIGHTS_FILE}", self._weights_key(name)
        entry = self.stage.weights(weights_name, key)
        if entry is None:
            self.report(f"{name}: {file.size:,} bytes of weights")
            self.stage.place(weights_name)
            entry = write_weights(
                weights,
                file,
                TORCH_DTYPES[self.dtype],
                key,
                lambda written: self.progress(f"{name} MiB", written >> 20, file.size >> 20),
            )
            previous = self.stage.previous
            if previous is not None and previous.manifest.files.get(weights_name) == entry:
                entry = self.stage.reuse_weights(weights_name, key)  # another checkpoint of the same weights
            else:
                entry = self.stage.add_weights(weights_name, key, entry)
        return file, entry

    def _layout(self, name: str) -> tuple[WeightFile, LazyStateDict]:
        component = self.components[name]
        weights = graph_weights(component.build, component.weights, self.source.model)
        path = self.stage.root / name / WEIGHTS_FILE
        return lay_out(weights, path, TORCH_DTYPES[self.dtype]), weights

    def _weights_key(self, name: str) -> Key:
        return weights_key(self.source.model, origin=self.components[name].origin, dtype=self.dtype)

    def _graph(self, graph: Graph, weights: WeightFile, key: Key) -> GraphEntry:
        self.report(f"{graph.name}: {self._why(graph.name, key)}")
        path = self.stage.place(graph.file)
        save(trace(graph), path, weights, graph.ttt, inline=graph.inline)
        part = self._gate.part(graph.component)
        if part:
            self.report(f"{graph.name}: too large to run here; held to the reference by {part}, with their own weights")
        parity = self._gate.check(graph, path, weights)
        worst = max(parity, key=lambda check: check.max_error)
        self.report(f"{graph.name}: parity {worst.max_error:.1e} of {worst.tolerance:.0e} allowed ({worst.inputs})")
        name = weights.path.relative_to(self.stage.root).as_posix()
        return GraphEntry(graph.file, name, *read_signature(path), parity, key)

    def _is_previous(self, name: str) -> bool:
        previous = self.stage.previous
        return previous is not None and previous.manifest.graphs.get(name) == self.graphs[name]

    def _why(self, name: str, key: Key) -> str:
        previous = self.stage.previous
        entry = None if previous is None else previous.manifest.graphs.get(name)
        return "new" if entry is None else ", ".join(differences(entry.key, key))


def _previous(output: Path) -> Bundle | None:
    """The bundle that is there, if it is whole. Raises OutputError for a folder that holds anything else."""
    settle(output)
    if not bundle_files(output):
        return None
    try:
        bundle = open_bundle(output)
        bundle.check()
    except BundleError:
        return None
    return bundle


@contextmanager
def _staging(output: Path, previous: Bundle | None, report: Report) -> Iterator[Stage]:
    stage = open_stage(output, previous, report)
    try:
        yield stage
    except BaseException:
        kept = stage.suspend()
        if kept:
            report(f"{kept:,} bytes that are finished stay in {stage.root}: export again to go on, or remove it")
        raise
