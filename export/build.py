"""Builds a bundle: exports each component in turn, checks its parity, and rebuilds only what changed.

No component is ever whole in memory: graphs are traced from modules without weights, and weights are copied from the
checkpoint to the bundle one tensor at a time. The new bundle is built beside the old one and replaces it at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import UNSET, to_builtins
from torch import nn

from ttt_video_engine.engines.kernels.sizes import NoKernel, check_size
from ttt_video_engine.export.engines import EngineRequest, build_engines, check_gpus, engine_bytes
from ttt_video_engine.export.graphs.components import component_graphs, graph_weights
from ttt_video_engine.export.graphs.graph import OPSET, Graph, read_signature, save, trace
from ttt_video_engine.export.graphs.journal import journal_path
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, WeightFile, lay_out, write_weights
from ttt_video_engine.export.keys import TOOLS, Key, graph_key, key_changes, package_version, weights_key
from ttt_video_engine.export.parity.gate import Gate
from ttt_video_engine.export.sources.source import Component, ModelSource, components_of
from ttt_video_engine.export.stage import Stage, export_lock, open_stage
from ttt_video_engine.export.swap import bundle_files, finish_replacement
from ttt_video_engine.planning.devices import check_devices
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
from ttt_video_engine.runtime.config import ModelConfig, TransformerConfig, num_scenes
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BundleError
from ttt_video_engine.runtime.files import check_space, replaceable_path, sha256_of, writing
from ttt_video_engine.runtime.quantization import Quantization, check_quantization
from ttt_video_engine.runtime.settings import Settings, settings_for
from ttt_video_engine.runtime.ttt_op import VERSION, OpVersion, exported_version

WEIGHTS_FILE = "model.onnx_data"
GRAPH_BYTES = 12 << 20
"""Upper bound in bytes for a graph without its weights. The largest graph of the 5B model has 6.1 MB."""


def _no_progress(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export: TensorRT engines to build, progress, and TTT nodes inlined as standard operators.

    `defaults` are those of rendering that the bundle states; None for those of the model's kind. `quantize` says how
    the transformer is quantised. For each of `devices`, the transformer gets another graph of each length.
    """

    engines: EngineRequest = field(default_factory=EngineRequest)
    progress: Progress = _no_progress
    inline: bool = False
    defaults: Settings | None = None
    quantize: Quantization = "none"
    devices: tuple[int, ...] = ()


def export_bundle(
    source: ModelSource,
    output: Path,
    lengths: Sequence[str],
    dtype: DType,
    report: Report,
    options: ExportOptions | None = None,
) -> Bundle:
    """Creates or updates the bundle at `output`, for `lengths` and the lengths that it already has.

    Engines for other GPUs are kept while their graphs are unchanged. Files that are not the bundle's stay in its
    folder. `report` receives one line for each thing that is built, with the reason, and one for each parity result.

    If the export fails or is interrupted, `output` is unchanged, and the finished files stay beside it for the next
    export. Raises CheckFailed if a component exceeds the parity tolerance. Raises OutputError, before any work, if
    another export of the same bundle is running, or if `output` cannot be replaced or holds anything but a bundle;
    ConfigError for a quantisation that does not go with the precision or with engines.
    """
    options = options or ExportOptions()
    check_quantization(options.quantize, dtype, tensorrt=bool(options.engines.gpus))
    check_gpus(options.engines.gpus)
    for length in lengths:
        source.model.clip_size(length)
        for number in options.devices:
            check_devices(source.model.transformer, source.model.clip_size(length), number)
    output = replaceable_path(output)
    components = components_of(source)
    with writing(output), export_lock(output):
        previous = _previous_bundle(output)
        previous_lengths = () if previous is None else previous.manifest.lengths
        lengths = sorted({*lengths, *previous_lengths}, key=num_scenes)
        previous_devices = () if previous is None else previous.manifest.devices
        devices = tuple(sorted({*options.devices, *previous_devices}))
        with _opened_stage(output, previous, report) as stage:
            defaults = options.defaults or settings_for(source.model.transformer.ttt)
            build = _Build(
                source,
                components,
                dtype,
                lengths,
                stage,
                report,
                options.progress,
                options.inline,
                defaults,
                options.quantize,
                op_version(source.model.transformer, options.engines, dtype),
                devices,
            )
            build.check_space(output, options.engines.gpus)
            build.tokenizer()
            for name in components:
                build.component(name)
            build.engines(options.engines)
            build.compare_defaults()
            if (
                previous is not None
                and not build.changed
                and (list(previous_lengths), previous_devices) == (lengths, devices)
            ):
                report("nothing has changed")
                stage.discard()
                return previous
            stage.complete(encode_manifest(build.manifest()), output)
        return open_bundle(output)


@dataclass
class _Build:
    """The state of one export."""

    source: ModelSource
    components: Mapping[str, Component[nn.Module]]
    dtype: DType
    lengths: Sequence[str]
    stage: Stage
    report: Report
    progress: Progress
    inline: bool
    defaults: Settings
    quantize: Quantization
    op_version: OpVersion
    devices: tuple[int, ...]
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
        """Raises OutputError unless the disk has room for all files that the export may write."""
        previous = self.stage.previous
        folders = [self.stage.root] if previous is None else [previous.root, self.stage.root]
        existing_engines = engine_bytes(folders, gpus)
        needs = {}
        for name in self.components:
            file, _ = self._layout(name)
            own = {"transformer": len(self.lengths), "vae_decoder": 2}.get(name, 1)
            graphs = own * (1 + len(self.devices)) if name == "transformer" else own
            engines = own * len(gpus) * file.size  # an engine holds the weights of its graph
            if self.stage.has_weights(f"{name}/{WEIGHTS_FILE}", self._weights_key(name)):
                engines = max(
                    0, engines - sum(size for graph, size in existing_engines.items() if graph.startswith(name))
                )
                weights = 0
            else:
                weights = file.size - (file.path.stat().st_size if journal_path(file.path).exists() else 0)
            needs[name] = weights + graphs * GRAPH_BYTES + engines
        check_space(output, needs)

    def tokenizer(self) -> None:
        """Writes the tokenizer into the stage."""
        path = self.stage.root / TOKENIZER
        path.parent.mkdir(exist_ok=True)
        self.source.tokenizer().save(str(path))
        self.tokenizer_key = {"content": sha256_of(path)}
        previous = self.stage.previous
        if previous is None or previous.manifest.tokenizer_key != self.tokenizer_key:
            self.changed = True

    def component(self, name: str) -> None:
        """Builds or reuses the weights and the graphs of one component."""
        file, entry = self._weights(name)
        module = with_placeholder_weights(self.components[name].build, TORCH_DTYPES[self.dtype])
        for graph in component_graphs(
            module,
            self.model,
            self.lengths,
            inline=self.inline,
            quantize=self.quantize,
            op_version=self.op_version,
            devices=self.devices,
        ):
            key = graph_key(
                self.source.model,
                weights=entry.sha256,
                dtype=self.dtype,
                opset=OPSET,
                length=graph.length,
                inline=graph.inline,
                quantize=graph.quantize,
                op_version=graph.op_version if graph.ttt else None,
                devices=graph.devices,
            )
            reused = self.stage.find_graph(graph.name, key)
            if reused is not None:
                self.report(f"{graph.name}: unchanged")
            self.graphs[graph.name] = reused or self.stage.add_graph(graph.name, self._build_graph(graph, file, key))
            self.changed = self.changed or not self._is_unchanged(graph.name)

    def engines(self, request: EngineRequest) -> None:
        """Builds or reuses the TensorRT engines."""
        previous, manifest, root = self.stage.previous, self.manifest(), self.stage.root
        previous_root = None if previous is None else previous.root
        if build_engines(manifest, root, previous_root, request, self.report, self.progress):
            self.changed = True
        files = [] if previous is None else [name for name in previous.manifest.files if name.startswith(ENGINES)]
        if not all((root / name).exists() for name in files):  # damaged, or of an older version of this program
            self.changed = True

    def compare_defaults(self) -> None:
        """Reports the defaults of rendering that differ from those of the previous bundle."""
        previous = self.stage.previous
        if previous is not None and previous.manifest.defaults != self.defaults:
            old, new = (to_builtins(settings) for settings in (previous.manifest.defaults, self.defaults))
            changes = [f"{name} {old[name]} → {new[name]}" for name in new if old[name] != new[name]]
            self.report(f"defaults of rendering: {', '.join(changes)}")
            self.changed = True

    def manifest(self) -> Manifest:
        """The manifest of the stage. Removes the files of earlier exports that it does not list."""
        weights = {graph.weights for graph in self.graphs.values()}
        return Manifest(
            model=self.model,
            dtype=self.dtype,
            stored_quantize=UNSET if self.quantize == "none" else self.quantize,
            stored_devices=self.devices or UNSET,
            opset=OPSET,
            lengths=tuple(self.lengths),
            graphs=self.graphs,
            tokenizer_key=self.tokenizer_key,
            weight_keys={name: self.stage.finished.weight_keys[name] for name in sorted(weights)},
            files=self.stage.keep_only({*weights, *(graph.file for graph in self.graphs.values()), TOKENIZER}),
            defaults=self.defaults,
            tools={name: package_version(name) for name in TOOLS},
        )

    def _weights(self, name: str) -> tuple[WeightFile, FileEntry]:
        """The weight file of a component: reused if the checkpoint is unchanged, otherwise written."""
        file, weights = self._layout(name)
        weights_name, key = f"{name}/{WEIGHTS_FILE}", self._weights_key(name)
        entry = self.stage.find_weights(weights_name, key)
        if entry is None:
            self.report(f"{name}: {file.size:,} bytes of weights")
            self.stage.prepare_file(weights_name)
            entry = write_weights(
                weights,
                file,
                TORCH_DTYPES[self.dtype],
                key,
                lambda written: self.progress(f"{name} MiB", written >> 20, file.size >> 20),
            )
            previous = self.stage.previous
            if previous is not None and previous.manifest.files.get(weights_name) == entry:
                entry = self.stage.reuse_weights(weights_name, key)  # another checkpoint with the same weights
            else:
                entry = self.stage.add_weights(weights_name, key, entry)
        return file, entry

    def _layout(self, name: str) -> tuple[WeightFile, LazyStateDict]:
        """The layout of a component's weight file, and the weights."""
        component = self.components[name]
        weights = graph_weights(component.build, component.weights, self.source.model, self.quantize)
        path = self.stage.root / name / WEIGHTS_FILE
        return lay_out(weights, path, TORCH_DTYPES[self.dtype]), weights

    def _weights_key(self, name: str) -> Key:
        origin = self.components[name].origin
        quantize: Quantization = self.quantize if name == "transformer" else "none"
        return weights_key(self.source.model, origin=origin, dtype=self.dtype, quantize=quantize)

    def _build_graph(self, graph: Graph, weights: WeightFile, key: Key) -> GraphEntry:
        """Traces and writes a graph, and checks its parity. Raises CheckFailed if it exceeds the tolerance."""
        self.report(f"{graph.name}: {self._build_reason(graph.name, key)}")
        path = self.stage.prepare_file(graph.file)
        save(trace(graph), path, weights, graph.ttt, inline=graph.inline)
        part = self._gate.part(graph.component)
        if part:
            self.report(
                f"{graph.name}: too large to run here; a subset with its weights is compared with the reference: {part}"
            )
        parity = self._gate.check(graph, path, weights)
        worst = max(parity, key=lambda check: check.max_error)
        self.report(f"{graph.name}: parity {worst.max_error:.1e} of {worst.tolerance:.1e} allowed ({worst.inputs})")
        name = weights.path.relative_to(self.stage.root).as_posix()
        return GraphEntry(graph.file, name, *read_signature(path), parity, key)

    def _is_unchanged(self, name: str) -> bool:
        previous = self.stage.previous
        return previous is not None and previous.manifest.graphs.get(name) == self.graphs[name]

    def _build_reason(self, name: str, key: Key) -> str:
        previous = self.stage.previous
        entry = None if previous is None else previous.manifest.graphs.get(name)
        return "new" if entry is None else ", ".join(key_changes(entry.key, key))


def op_version(model: TransformerConfig, engines: EngineRequest, dtype: DType) -> OpVersion:
    """The version of the TTT nodes: 1 for engines without plugins, as TensorRT-RTX 1.7 builds no other body."""
    if not engines.gpus or model.ttt_kind is None:
        return exported_version(dtype)
    try:
        for gpu in engines.gpus:
            check_size(model.ttt_kind, gpu, model.mini_batch_size, model.head_dim)
    except NoKernel:
        return VERSION
    return exported_version(dtype) if engines.settings.plugins else VERSION


def _previous_bundle(output: Path) -> Bundle | None:
    """The bundle at `output`; None if there is none or it is damaged.

    Raises OutputError if the folder holds anything but a bundle.
    """
    finish_replacement(output)
    if not bundle_files(output):
        return None
    try:
        bundle = open_bundle(output)
        bundle.check()
    except BundleError:
        return None
    return bundle


@contextmanager
def _opened_stage(output: Path, previous: Bundle | None, report: Report) -> Iterator[Stage]:
    stage = open_stage(output, previous, report)
    try:
        yield stage
    except BaseException:
        kept = stage.suspend()
        if kept:
            report(f"{kept:,} bytes are finished and stay in {stage.root}: export again to resume, or remove it")
        raise
