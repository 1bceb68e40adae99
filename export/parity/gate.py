"""The parity gate: a graph in ONNX Runtime against the module it was exported from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.engines.sharded import ShardedRunner
from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import Graph, save, trace
from ttt_video_engine.export.graphs.quantize import round_like_int8, stored_names
from ttt_video_engine.export.graphs.upcast import upcast_bfloat16
from ttt_video_engine.export.graphs.weights import TORCH_DTYPES, WeightFile
from ttt_video_engine.export.parity.onnx_graphs import open_graph
from ttt_video_engine.export.parity.real_text import real_prompts
from ttt_video_engine.export.parity.shrink import describe_subset, full_weight_name, shrink_component, shrink_config
from ttt_video_engine.export.sources.source import Component
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, ParityCheck
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import CheckFailed
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.runner import TensorSpec

TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Largest error over the largest reference value."""
ROUNDING_MARGIN = 4.0
"""A float32 transformer may be this much further from the reference than float32 is from float64 in the reference: over
a long clip the inner models magnify rounding, and no order of the same sums is more right than another."""
INT8_TOLERANCE = 5e-2
"""The same for a transformer in int8."""
INT8_ROUNDING_MARGIN = 2.0
"""A transformer in int8 may be this many times as far from the reference as the reference with its rounding is."""

Cases = dict[str, list[Tensor]]
"""Name of a case → its inputs, in the order of the graph."""


@dataclass
class Gate:
    """Compares the graphs of a model with its reference, which runs in float32.

    A model that is too large for the exporting machine is compared by a subset of it (`shrink.py`): a graph of the
    subset is exported temporarily and reads its weights from the full model's file.
    """

    model: ModelConfig
    components: Mapping[str, Component[nn.Module]]
    dtype: DType
    tokenizer: Path
    _embeddings: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._subset_model = shrink_config(self.model)

    def part(self, component: str) -> str:
        """Describes the subset that runs in place of a component that is too large; empty if the whole one runs."""
        return describe_subset(component, self._subset_model, self.model)

    def check(self, graph: Graph, path: Path, weights: WeightFile) -> tuple[ParityCheck, ...]:
        """Runs random inputs, and real text where a graph takes text, through the file at `path` and the reference.

        A bfloat16 graph runs with its own weights and constants and float32 arithmetic (`graphs/upcast.py`). Raises
        CheckFailed for an output that has a NaN or is over tolerance.
        """
        cases, expected = self._run_reference(graph)
        with self._runnable(graph, path, weights) as runnable:
            checks = tuple(self._compare(graph, runnable, cases, expected))
        if graph.component == "transformer" and self.dtype == "float32":
            checks = tuple(self._allow_rounding(graph, check, cases, expected) for check in checks)
        for check in checks:
            if not check.max_error <= check.tolerance:
                raise CheckFailed(
                    f"{graph.name}: parity on {check.inputs}: error {check.max_error:.1e} is over "
                    f"{check.tolerance:.0e}; the bundle was left as it was"
                )
        return checks

    @torch.no_grad()
    def _run_reference(self, graph: Graph) -> tuple[Cases, dict[str, list[Tensor]]]:
        """Inputs and the reference's outputs by case. The reference is freed before the graph is loaded."""
        text = self._embedded(graph.length) if graph.component == "transformer" else None
        reference = self._reference(graph.component, graph.whole_name, graph.length)
        cases = random_cases(reference)
        if graph.component == "text_encoder":
            cases["real text"] = [self._prompts(next(iter(self.model.text_lengths)))]
        if text is not None:
            latents, _, timestep = next(iter(cases.values()))
            cases["real text"] = [latents, text, timestep]
        if self.part(graph.component):
            cases.pop("random, batch 2", None)  # real text has batch 2 as well, and each takes minutes
        return cases, {name: _as_list(reference.module(*case)) for name, case in cases.items()}

    @torch.no_grad()
    def _allow_rounding(
        self, graph: Graph, check: ParityCheck, cases: Cases, expected: dict[str, list[Tensor]]
    ) -> ParityCheck:
        """`check`, its tolerance raised to a multiple of what rounding changes in the reference, if it needs that."""
        if check.max_error <= check.tolerance:
            return check
        module = self._reference(graph.component, graph.whole_name, graph.length).module
        if graph.quantize == "int8":
            margin, module = INT8_ROUNDING_MARGIN, round_like_int8(module)
        else:
            margin, module = ROUNDING_MARGIN, module.double()
        others = (tensor.numpy() for tensor in _as_list(module(*cases[check.inputs])))
        outputs = zip(graph.outputs, others, expected[check.inputs], strict=True)
        rounding = max(_error(graph, check.inputs, output, other, ours)[0] for output, other, ours in outputs)
        return replace(check, tolerance=max(check.tolerance, margin * rounding))

    def _reference(self, component: str, name: str, length: str) -> Graph:
        return _named(name, component_graphs(self._subset(component).load(), self._subset_model, [length]))

    def _subset(self, component: str) -> Component[nn.Module]:
        whole = self.components[component]
        return shrink_component(component, whole, self._subset_model, self.model) if self.part(component) else whole

    @contextmanager
    def _runnable(self, graph: Graph, path: Path, weights: WeightFile) -> Iterator[Path]:
        """Yields the path of the graph to run: `path`, or a temporary graph of the subset beside it."""
        if not self.part(graph.component):
            yield path
            return
        module = with_placeholder_weights(self._subset(graph.component).build, TORCH_DTYPES[self.dtype])
        graphs = component_graphs(
            module,
            self._subset_model,
            [graph.length],
            quantize=graph.quantize,
            op_version=graph.op_version,
            devices=(graph.devices,) if graph.devices > 1 else (),
        )
        part = _named(graph.name, graphs)
        ranges = {
            name: weights.ranges[full_weight_name(graph.component, name, self._subset_model, self.model)]
            for name in stored_names(part.module.state_dict(), graph.quantize)
        }
        target = path.with_name(f".part.{path.name}")
        try:
            save(trace(part), target, WeightFile(weights.path, ranges), part.ttt, inline=graph.inline)
            yield target
        finally:
            target.unlink(missing_ok=True)

    def _compare(
        self, graph: Graph, path: Path, cases: Cases, expected: dict[str, list[Tensor]]
    ) -> Iterator[ParityCheck]:
        with _open(path, graph.devices, self.dtype) as runner:
            for name, case in cases.items():
                feeds = {spec.name: _as_spec(value, spec) for spec, value in zip(runner.inputs, case, strict=True)}
                found = runner.run(feeds)
                outputs = zip(graph.outputs, expected[name], strict=True)
                errors = [_error(graph, name, output, found[output], tensor) for output, tensor in outputs]
                yield ParityCheck(
                    inputs=name,
                    max_error=max(largest for largest, _ in errors),
                    mean_error=max(mean for _, mean in errors),
                    tolerance=tolerance(self.dtype, graph.quantize),
                    part=self.part(graph.component),
                )

    def _prompts(self, length: str) -> Tensor:
        """Token ids [2·S, N] of real text."""
        return real_prompts(self.tokenizer, self._subset_model, length).flatten(0, 1)

    def _embedded(self, length: str) -> Tensor:
        """Embeddings [2, S, N, text_dim] of real text. The encoder is loaded once for all lengths."""
        if not self._embeddings:
            encoder = self._reference("text_encoder", TEXT_ENCODER, length).module
            for other in self.model.text_lengths:
                self._embeddings[other] = encoder(self._prompts(other)).unflatten(0, (2, -1))
        return self._embeddings[length]


def tolerance(dtype: DType, quantize: Quantization = "none") -> float:
    """The largest error of a graph that passes, over the largest reference value."""
    return INT8_TOLERANCE if quantize == "int8" else TOLERANCES[dtype]


def random_cases(graph: Graph) -> Cases:
    """Random inputs for a graph: batch 2 and batch 1 if its batch is free, else one case."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        torch.randn(spec.example.shape, generator=generator) if spec.example.is_floating_point() else spec.example
        for spec in graph.inputs
    ]
    if not any(0 in spec.free_axes for spec in graph.inputs):
        return {"random": examples}
    return {"random, batch 2": examples, "random, batch 1": [example[:1] for example in examples]}


def _named(name: str, graphs: Sequence[Graph]) -> Graph:
    return next(graph for graph in graphs if graph.name == name)


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@contextmanager
def _open(path: Path, devices: int, dtype: DType) -> Iterator[OnnxRuntimeRunner | ShardedRunner]:
    if dtype != "bfloat16":
        with open_graph(path, devices) as runner:
            yield runner
        return
    with TemporaryDirectory(prefix="ttt-video-parity-") as folder:
        wide = upcast_bfloat16(path, Path(folder) / "model.onnx")
        with open_graph(wide, devices) as runner:
            yield runner


def _as_spec(value: Tensor, spec: TensorSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return value.numpy().astype(spec.dtype)


def _error(
    graph: Graph, case: str, output: str, found: np.ndarray[tuple[int, ...], np.dtype[np.generic]], expected: Tensor
) -> tuple[float, float]:
    """Largest and mean error relative to the largest reference value."""
    reference = expected.numpy().astype(np.float64)
    if not (np.isfinite(found).all() and np.isfinite(reference).all()):
        raise CheckFailed(f"{graph.name}: parity on {case}: {output} is not finite; the bundle was left as it was")
    difference = np.abs(found.astype(np.float64) - reference)
    scale = max(float(np.abs(reference).max()), 1e-12)
    return float(difference.max()) / scale, float(difference.mean()) / scale
