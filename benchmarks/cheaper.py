"""Times a step of the transformer, and a film, in PyTorch eager and compiled, and in ONNX Runtime, float32 and int8."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measure import ROOT, interleaved, print_row, table

from demo.fast import COMPILED
from demo.scan import mini_batch, scan
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, OnnxRuntimeRunner
from ttt_video_engine.export.build import WEIGHTS_FILE, ExportOptions, export_bundle
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import component_graphs, transformer_graph
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.parity.gate import random_cases
from ttt_video_engine.export.sources.source import CheckpointSource, ModelSource, SeededSource, components_of
from ttt_video_engine.reference.ttt_layer import TTTLinear
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.errors import CheckFailed
from ttt_video_engine.runtime.events import VideoFailed
from ttt_video_engine.runtime.pipeline import Pipeline
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.storyboard import Scene, Storyboard

AIMS = {"float32": 1.7, "int8": 3.0}
"""Wanted speedup over eager of a step at `debug`, by our precision."""
FILM_AIM = 3.0
LENGTH, FILM_STEPS = "9s", 4
REPETITIONS = 3
THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
"""Of both sides; on a machine that other work shares, OMP_NUM_THREADS=1 is fairer."""
QUANTIZATIONS: dict[str, Quantization] = {"float32": "none", "int8": "int8"}

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def source_of(name: str) -> ModelSource:
    """The model of a preset with random weights, or the demo model."""
    if name != "demo":
        return SeededSource(preset(name, "linear"), seed=0)
    model = resolve_config(ROOT / "demo" / "demo.toml").model
    return CheckpointSource(model, ROOT / "demo" / "checkpoint", 0)


@contextmanager
def compiled() -> Iterator[None]:
    """Within the block, the reference runs compiled: a mini-batch of the scan, and what is computed value by value.

    The whole step is not: its loop over mini-batches would be unrolled, which takes the compiler hours.
    """
    step = _compiled("mini_batch", mini_batch)
    with ExitStack() as stack:
        stack.enter_context(patch.object(TTTLinear, "scan", staticmethod(lambda *inputs: scan(step, *inputs))))
        for place, name in COMPILED:
            original = vars(place)[name]
            stack.enter_context(patch.object(place, name, _compiled(f"{place.__name__}.{name}", original)))
        yield


_CACHE: dict[str, Callable[..., object]] = {}


def _compiled(name: str, function: Callable[..., object]) -> Callable[..., object]:
    if name not in _CACHE:
        _CACHE[name] = torch.compile(function, dynamic=False)
    return _CACHE[name]


def steps() -> str:
    rows = [print_row(_step_row(name)) for name in ("tiny", "demo", "debug")]
    header = ["step, 9s, batch 2", "eager ms", "compiled ms", "float32 ms", "int8 ms"]
    header += ["compiled", "float32", "int8", "int8 error"]
    printed = table(header, rows)
    found = {name: float(rows[-1][column].rstrip("x")) for name, column in (("float32", 6), ("int8", 7))}
    verdicts = [
        f"{name} {found[name]:.2f}x (aim {aim:g}x: {'met' if found[name] >= aim else 'missed'})"
        for name, aim in AIMS.items()
    ]
    return f"{printed}\n\n{THREADS} threads; debug over eager: {', '.join(verdicts)}"


def _step_row(name: str) -> list[str]:
    source = source_of(name)
    torch.set_num_threads(THREADS)
    graph = transformer_graph(source.transformer().load(), source.model, LENGTH)
    case = random_cases(graph)["random, batch 2"]
    feeds = {spec.name: value.numpy() for spec, value in zip(graph.inputs, case, strict=True)}

    @torch.no_grad()
    def eager() -> Array:
        velocity: Array = graph.module(*case).numpy()
        return velocity

    def compiled_step() -> Array:
        with compiled():
            return eager()

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        calls = [eager, compiled_step]
        for precision, quantize in QUANTIZATIONS.items():
            runner = stack.enter_context(_runner(replace(graph, quantize=quantize), Path(folder) / precision))
            calls.append(lambda runner=runner: runner.run(feeds)["velocity"])  # type: ignore[misc]
        expected = eager()
        error = float(np.abs(calls[-1]() - expected).max() / np.abs(expected).max())
        seconds = interleaved(calls, REPETITIONS)
    ratios = [seconds[0] / taken for taken in seconds[1:]]
    milliseconds = [f"{taken * 1e3:.0f}" for taken in seconds]
    return [f"{name} linear", *milliseconds, *(f"{ratio:.2f}x" for ratio in ratios), f"{error:.1e}"]


def _runner(graph: Graph, folder: Path) -> OnnxRuntimeRunner:
    folder.mkdir()
    path = folder / "model.onnx"
    weights = write_module(graph.module, path.with_name(WEIGHTS_FILE), quantize=graph.quantize)
    onnx_graph.save(onnx_graph.trace(graph), path, weights, graph.ttt)
    return OnnxRuntimeRunner(path, *onnx_graph.read_signature(path), num_threads=THREADS)


class TorchRunner:
    """A graph of a bundle in the reference."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._graph.module(*(torch.from_numpy(np.asarray(inputs[spec.name])) for spec in self._graph.inputs))
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: value.numpy() for name, value in zip(self._graph.outputs, values, strict=True)}

    def __enter__(self) -> "TorchRunner":
        return self

    def __exit__(self, *_: object) -> None: ...


class TorchLoader:
    """The reference in the place of a bundle's graphs, loaded once."""

    def __init__(self, source: ModelSource) -> None:
        parts = (component_graphs(part.load(), source.model, [LENGTH]) for part in components_of(source).values())
        self._graphs = {graph.name: graph for graphs in parts for graph in graphs}

    def check(self, graphs: Iterable[str]) -> None: ...

    def environment(self) -> dict[str, str]:
        return {"engine": "torch", "torch": str(torch.__version__)}

    def __call__(self, graph: str) -> TorchRunner:
        return TorchRunner(self._graphs[graph])


def film() -> str:
    """The demo model's film of 9 s, text and frames included, without the loading of the reference.

    A precision that the parity gate refuses has no row, but the reason.
    """
    source = source_of("demo")
    torch.set_num_threads(THREADS)
    texts = ("A red cat walks to the left.", "It walks on.", "It jumps.")
    board = Storyboard("film", tuple(map(Scene, texts)), "film.json")
    with tempfile.TemporaryDirectory() as parent:
        bundles: dict[str, Bundle] = {}
        refused = ""
        for name, quantize in QUANTIZATIONS.items():
            options = ExportOptions(quantize=quantize)
            try:
                bundles[name] = export_bundle(source, Path(parent) / name, [LENGTH], "float32", lambda _: None, options)
            except CheckFailed as error:
                refused += f"\n\nNo film in {name}: {error}"
        reference, output = TorchLoader(source), Path(parent) / "output"

        def render(bundle: Bundle, loader: object) -> None:
            pipeline = Pipeline(bundle, loader)  # type: ignore[arg-type]
            jobs = pipeline.prepare((board,), Settings(num_steps=FILM_STEPS), output, overwrite=True)
            for outcome in pipeline.run(jobs).values():
                if isinstance(outcome, VideoFailed):
                    raise outcome.error

        def compiled_film() -> None:
            with compiled():
                render(bundles["float32"], reference)

        calls: list[Callable[[], None]] = [lambda: render(bundles["float32"], reference), compiled_film]
        calls += [
            lambda bundle=bundle: render(bundle, OnnxRuntimeLoader(bundle, num_threads=THREADS))
            for bundle in bundles.values()
        ]  # type: ignore[misc]
        seconds = interleaved(calls, REPETITIONS)
    rows = [
        [name, f"{taken:.1f}", f"{seconds[0] / taken:.2f}x"]
        for name, taken in zip(("eager", "compiled", *bundles), seconds, strict=True)
    ]
    best = seconds[0] / seconds[-1]
    verdict = "met" if best >= FILM_AIM else "missed"
    printed = table([f"demo, 9s, {FILM_STEPS} steps", "seconds", "over eager"], rows)
    return f"{printed}\n\nA film in {rows[-1][0]}: {best:.2f}x (aim {FILM_AIM:g}x: {verdict}){refused}"
