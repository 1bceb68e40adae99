"""A bundle's graphs in our runners and in Polygraphy's, compared by Polygraphy and saved in its format.

Polygraphy's runner has ONNX Runtime's graph optimizations off, so that a fusion that goes wrong shows, as does an input
or output that our runner hands over wrongly. Where a graph has a TensorRT engine for the GPU of this machine, that is
compared as well. Polygraphy ships no types.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np
from msgspec import Struct
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.ort import ort
from ttt_video_engine.engines.tensorrt.engine import list_engines
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.export.parity.gate import tolerance
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, VAE_FIRST, VAE_NEXT, Bundle, transformer_graph_name
from ttt_video_engine.runtime.config import num_scenes
from ttt_video_engine.runtime.errors import BackendError, OutputError
from ttt_video_engine.runtime.files import writing
from ttt_video_engine.runtime.runner import Array, Runner, TensorSpec

INPUTS, OUTPUTS = "inputs.json", "outputs.json"
"""What `polygraphy run` takes as --load-inputs and --load-outputs."""

OURS, POLYGRAPHYS, TENSORRT = "onnxruntime", "polygraphy", "tensorrt"
BATCH = 2
INTEGERS_BELOW = 1000
"""Timesteps and token ids."""


class Opinion(Struct, frozen=True):
    """How far a runner is from our ONNX Runtime on one graph: the largest error over the largest value of an output.

    `passed` is Polygraphy's verdict, and that all outputs are there and finite; `max_error` may be NaN where not.
    """

    graph: str
    runner: str
    max_error: float
    tolerance: float
    passed: bool


def second_opinions(bundle: Bundle, output: Path) -> Iterator[Opinion]:
    """Runs every kind of graph on random inputs, the transformer of the shortest length, a graph at a time.

    Writes INPUTS and OUTPUTS into a folder of `output` for each graph. Raises OutputError, at once, where `output` has
    files, and BackendError for a bundle in bfloat16; BackendError where a graph does not run.
    """
    load = OnnxRuntimeLoader(bundle, provider="cpu")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise OutputError(f"{output}: is not empty; choose another folder")
    return _opinions(bundle, output, load)


def _opinions(bundle: Bundle, output: Path, load: OnnxRuntimeLoader) -> Iterator[Opinion]:
    shortest = min(bundle.manifest.lengths, key=num_scenes)
    for graph in (TEXT_ENCODER, transformer_graph_name(shortest), VAE_FIRST, VAE_NEXT):
        folder = output / graph
        with writing(folder), G_LOGGER.verbosity():
            folder.mkdir()
            results = Comparator.run(
                _runners(bundle, graph, load),
                data_loader=[random_feeds(bundle, graph)],
                save_inputs_path=str(folder / INPUTS),
                save_outputs_path=str(folder / OUTPUTS),
            )
            quantize = bundle.manifest.quantize if graph.startswith("transformer") else "none"
            allowed = tolerance(bundle.manifest.dtype, quantize)
            opinions = [_opinion(graph, results, i, allowed) for i in range(1, len(results))]
        yield from opinions


def random_feeds(bundle: Bundle, graph: str) -> dict[str, Array]:
    """Inputs of a graph: normal values, integers from 0, and for free axes a batch of two and the shortest prompts."""
    model = bundle.manifest.model
    sizes = {"batch": BATCH, "tokens": min(model.text_lengths[length] for length in bundle.manifest.lengths)}
    highest = min(INTEGERS_BELOW, model.text_encoder.vocab_size)
    generator = np.random.default_rng(0)

    def values(spec: TensorSpec) -> Array:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        if spec.dtype == "int64":
            return generator.integers(highest, size=shape)
        return generator.standard_normal(shape).astype(spec.dtype)

    return {spec.name: values(spec) for spec in bundle.graph(graph).inputs}


def _runners(bundle: Bundle, graph: str, load: OnnxRuntimeLoader) -> list[BaseRunner]:
    """Ours first, to which the others are compared. Each is loaded when its turn comes, and freed after it."""
    inputs, path = bundle.graph(graph).inputs, bundle.path(bundle.graph(graph).file)
    runners = [_OurRunner(OURS, inputs, lambda: load(graph)), OnnxrtRunner(lambda: _plain_session(path), POLYGRAPHYS)]
    if any((engine.entry.graph, engine.entry.gpu) == (graph, _gpu()) for engine in list_engines(bundle.root)):
        runners.append(_OurRunner(TENSORRT, inputs, lambda: TensorRTLoader(bundle)(graph)))
    return runners


def _plain_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # errors
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's classes have no base
        raise BackendError(f"{path}: ONNX Runtime cannot load it without its optimizations ({error})") from error


def _gpu() -> str | None:
    """Architecture of this machine's GPU, None without one."""
    with suppress(BackendError):
        return cuda.device().gpu
    return None


class _OurRunner(BaseRunner):  # type: ignore[misc]  # the base has no types
    """A Runner of ours as one of Polygraphy's."""

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], load: Callable[[], Runner]) -> None:
        super().__init__(name=name)
        self._inputs, self._load = inputs, load
        self._runner: Runner | None = None

    def activate_impl(self) -> None:
        self._runner = self._load().__enter__()

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self._inputs:
            metadata.add(spec.name, dtype=np.dtype(spec.array_dtype), shape=spec.shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        assert self._runner is not None
        start = perf_counter()
        outputs = {name: np.asarray(value) for name, value in self._runner.run(feed_dict).items()}
        self.inference_time = perf_counter() - start
        return outputs

    def deactivate_impl(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None


def _opinion(graph: str, results: list[tuple[str, list[Mapping[str, Array]]]], index: int, tolerance: float) -> Opinion:
    """Polygraphy's verdict on runner `index` of its `results`. Tolerance is relative to an output's largest value."""
    (_, (ours,)), (runner, (theirs,)) = results[0], results[index]
    scales = {name: max(float(np.abs(value).max()), 1e-12) for name, value in ours.items()}
    verdicts = Comparator.compare_accuracy(
        results,
        comparisons=[(0, index)],
        compare_func=SimpleCompareFunc(
            check_error_stat="max", atol={name: tolerance * scale for name, scale in scales.items()}, rtol=0
        ),
    )
    ((found,),) = verdicts[0].values()
    complete = set(ours) == set(theirs) == set(found)
    finite = all(np.isfinite(value).all() for outputs in (ours, theirs) for value in outputs.values())
    errors = [found[name].max_absdiff / scale for name, scale in scales.items() if name in found]
    return Opinion(graph, runner, float(np.max(errors)), tolerance, complete and finite and bool(verdicts))
