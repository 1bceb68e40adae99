"""Builds a bundle: each component in turn, exported, gated, and only what changed.

The new bundle grows beside the old one and takes its place whole at the end, so that a failure or a kill at any point
leaves the old one as it was.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ttt_video_engine.engines.tensorrt.builder import Progress
from ttt_video_engine.engines.tensorrt.plan import BuildSettings
from ttt_video_engine.export import graph as onnx_graph
from ttt_video_engine.export.components import Graph, text_encoder_graph, transformer_graph, vae_graphs
from ttt_video_engine.export.keys import TOOLS, Key, differences, environment_key, graph_key
from ttt_video_engine.export.parity import check_parity, random_case
from ttt_video_engine.export.plans import build_plans, check_gpus
from ttt_video_engine.export.real_text import real_prompts
from ttt_video_engine.export.source import ModelSource
from ttt_video_engine.export.weights import WeightFile, weight_file, weights_digest
from ttt_video_engine.runtime.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    FileEntry,
    GraphEntry,
    Manifest,
    encode_manifest,
    open_bundle,
)
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, DType
from ttt_video_engine.runtime.errors import BundleError, OutputError
from ttt_video_engine.runtime.files import link_or_copy, sha256_of, writing

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
WEIGHTS_FILE = "model.onnx_data"

Report = Callable[[str], None]
Cases = dict[str, Sequence[Tensor]]


@dataclass(frozen=True)
class PlanRequest:
    """TensorRT plans to have in a bundle: for which GPUs, built how. `progress` is told of every step of a build."""

    gpus: tuple[str, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)
    progress: Progress = lambda phase, done, total: None


def export_bundle(
    source: ModelSource,
    output: Path,
    lengths: Sequence[str],
    dtype: DType,
    report: Report,
    plans: PlanRequest | None = None,
) -> Bundle:
    """Makes or updates the bundle at `output`, for `lengths` and those it already has.

    Plans for other GPUs stay while their graphs do. `report` is told in a line each what is built, why, and how parity
    came out. Raises CheckFailed where a component is over tolerance; `output` is then as it was before.
    """
    plans = plans or PlanRequest()
    check_gpus(plans.gpus)
    previous = _previous(output)
    if previous is not None:
        lengths = [*lengths, *previous.manifest.lengths]
    lengths = sorted(set(lengths), key=lambda length: SCENES_PER_LENGTH.get(length, 0))
    for length in lengths:
        source.model.clip_size(length)
    with writing(output), _staging(output) as stage:
        build = _Build(source, dtype, stage, previous, report)
        build.everything(lengths)
        build.plans(lengths, plans)
        if previous is not None and not build.changed and list(previous.manifest.lengths) == lengths:
            report("nothing has changed")
            return previous
        (stage / MANIFEST).write_bytes(encode_manifest(build.manifest(lengths)))
        _swap(stage, output)
    return open_bundle(output)


@dataclass
class _Build:
    """A bundle in the making, in the folder `stage`."""

    source: ModelSource
    dtype: DType
    stage: Path
    previous: Bundle | None
    report: Report
    graphs: dict[str, GraphEntry] = field(default_factory=dict)
    tokenizer_key: Key = field(default_factory=dict)
    changed: bool = False

    def everything(self, lengths: Sequence[str]) -> None:
        model = self.source.model
        self._tokenizer()

        encoder = self.source.text_encoder()
        graph = text_encoder_graph(encoder, vocab_size=model.text_encoder.vocab_size)
        prompts = {length: real_prompts(self.stage / TOKENIZER, model, length) for length in lengths}
        self._component([(graph, "any", {"real text": [prompts[lengths[0]].flatten(0, 1)]})])
        with torch.no_grad():
            embeddings = {
                length: encoder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]) for length, ids in prompts.items()
            }
        del encoder, graph

        transformer = self.source.transformer()
        graphs = {length: transformer_graph(transformer, model, length) for length in lengths}
        self._component([(graph, length, _with_text(graph, embeddings[length])) for length, graph in graphs.items()])
        del transformer, graphs

        size = model.clip_size(lengths[0])
        first, following = vae_graphs(self.source.vae_decoder(), height=size.height, width=size.width)
        self._component([(first, "any", {}), (following, "any", {})])

    def manifest(self, lengths: Sequence[str]) -> Manifest:
        files = sorted(path for path in self.stage.rglob("*") if path.is_file())
        environment = environment_key()
        return Manifest(
            model=self.source.model,
            dtype=self.dtype,
            opset=onnx_graph.OPSET,
            lengths=tuple(lengths),
            graphs=self.graphs,
            tokenizer_key=self.tokenizer_key,
            files={
                path.relative_to(self.stage).as_posix(): FileEntry(sha256_of(path), path.stat().st_size)
                for path in files
            },
            tools={name: environment[f"tool {name}"] for name in TOOLS},
        )

    def plans(self, lengths: Sequence[str], request: PlanRequest) -> None:
        root = None if self.previous is None else self.previous.root
        manifest = self.manifest(lengths)
        if build_plans(manifest, self.stage, root, request.gpus, request.settings, self.report, request.progress):
            self.changed = True

    def _tokenizer(self) -> None:
        path = self.stage / TOKENIZER
        path.parent.mkdir()
        self.source.tokenizer().save(str(path))
        self.tokenizer_key = {"content": sha256_of(path)}
        if self.previous is None or self.previous.manifest.tokenizer_key != self.tokenizer_key:
            self.changed = True

    def _component(self, graphs: Sequence[tuple[Graph, str, Cases]]) -> None:
        """Builds the graphs of one component, or takes them over from the previous bundle, and their weights."""
        weights = graphs[0][0].module.state_dict()
        digest = weights_digest(weights)
        keys = {
            graph.name: graph_key(
                self.source.model, weights=digest, dtype=self.dtype, opset=onnx_graph.OPSET, length=length
            )
            for graph, length, _ in graphs
        }
        kept = {name: entry for name, key in keys.items() if (entry := self._unchanged(name, key)) is not None}
        target = (self.stage / graphs[0][0].file).with_name(WEIGHTS_FILE)
        target.parent.mkdir()
        if kept and self.previous is not None:
            link_or_copy(self.previous.path(next(iter(kept.values())).weights), target)
        for name, entry in kept.items():
            self.report(f"{name}: unchanged")
            self.graphs[name] = entry
            if self.previous is not None:
                link_or_copy(self.previous.path(entry.file), self.stage / entry.file)

        to_build = [(graph, cases) for graph, _, cases in graphs if graph.name not in kept]
        if not to_build:
            return
        self.changed = True
        module = _converted(graphs[0][0].module, self.dtype)
        file = weight_file(module.state_dict(), target, write=not kept)
        for graph, cases in to_build:
            self._graph(graph, file, keys[graph.name], {**random_case(graph), **cases})

    def _graph(self, graph: Graph, file: WeightFile, key: Key, cases: Cases) -> None:
        self.report(f"{graph.name}: {self._why(graph.name, key)}")
        module = _converted(graph.module, self.dtype)
        inputs = graph.inputs_as(TORCH_DTYPES[self.dtype])
        path = self.stage / graph.file
        onnx_graph.save(onnx_graph.trace(module, inputs, graph.outputs, graph.ttt), path, file, graph.ttt)
        signature = onnx_graph.read_signature(path)
        parity = check_parity(graph, path, signature, cases, self.dtype)
        worst = max(parity, key=lambda check: check.max_error)
        self.report(f"{graph.name}: parity {worst.max_error:.1e} of {worst.tolerance:.0e} allowed ({worst.inputs})")
        weights = file.path.relative_to(self.stage).as_posix()
        self.graphs[graph.name] = GraphEntry(graph.file, weights, *signature, parity, key)

    def _unchanged(self, name: str, key: Key) -> GraphEntry | None:
        entry = self.previous.manifest.graphs.get(name) if self.previous is not None else None
        return entry if entry is not None and not differences(entry.key, key) else None

    def _why(self, name: str, key: Key) -> str:
        entry = self.previous.manifest.graphs.get(name) if self.previous is not None else None
        return "new" if entry is None else ", ".join(differences(entry.key, key))


def _with_text(graph: Graph, embeddings: Tensor) -> Cases:
    latents, _, timestep = (spec.example for spec in graph.inputs)
    return {"real text": [latents, embeddings, timestep]}


def _converted(module: nn.Module, dtype: DType) -> nn.Module:
    return module if dtype == "float32" else copy.deepcopy(module).to(TORCH_DTYPES[dtype])


def _previous(output: Path) -> Bundle | None:
    """The bundle that is there, if it is whole; a folder that holds anything else is not ours to replace."""
    retired = _retired(output)
    if retired.exists() and not output.exists():
        os.replace(retired, output)  # killed between the two renames of an earlier export
    if not output.exists():
        return None
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise OutputError(f"{output}: exists and is not a bundle; choose another folder or remove it")
    try:
        bundle = open_bundle(output)
        bundle.verify()
    except BundleError:
        return None
    return bundle


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    stage = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, output: Path) -> None:
    retired = _retired(output)
    shutil.rmtree(retired, ignore_errors=True)
    if output.exists():
        os.replace(output, retired)
    os.replace(stage, output)
    shutil.rmtree(retired, ignore_errors=True)


def _retired(output: Path) -> Path:
    return output.absolute().with_name(f".{output.name}.previous")
