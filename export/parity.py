"""The parity gate: a graph in ONNX Runtime against the module it was exported from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeEngine
from ttt_video_engine.export.components import Graph
from ttt_video_engine.export.graph import Signature
from ttt_video_engine.export.widen import widened
from ttt_video_engine.runtime.bundle import ParityCheck
from ttt_video_engine.runtime.config import DType
from ttt_video_engine.runtime.engine import TensorSpec
from ttt_video_engine.runtime.errors import CheckFailed

TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Largest error over the largest reference value."""


def check_parity(
    graph: Graph,
    path: Path,
    signature: Signature,
    cases: dict[str, Sequence[Tensor]],
    dtype: DType,
) -> tuple[ParityCheck, ...]:
    """Runs every case (name → inputs in order) through the file at `path` and through the graph's module, in float32.

    A bfloat16 graph runs with its own weights and constants but float32 between them: see `widen.py`. Raises
    CheckFailed where an output has a NaN or is over tolerance.
    """
    checks = []
    with _open(path, signature, dtype) as engine:
        for name, case in cases.items():
            feeds = {spec.name: _as_spec(value, spec) for spec, value in zip(engine.inputs, case, strict=True)}
            found = engine.run(feeds)
            with torch.no_grad():
                expected = graph.module(*case)
            tensors = expected if isinstance(expected, tuple) else (expected,)
            errors = [_error(graph, name, key, found[key], t) for key, t in zip(graph.outputs, tensors, strict=True)]
            checks.append(
                ParityCheck(
                    inputs=name,
                    max_error=max(largest for largest, _ in errors),
                    mean_error=max(mean for _, mean in errors),
                    tolerance=TOLERANCES[dtype],
                )
            )
    for check in checks:
        if not check.max_error <= check.tolerance:
            raise CheckFailed(
                f"{graph.name}: parity on {check.inputs}: error {check.max_error:.1e} is over {check.tolerance:.0e}; "
                "the bundle was left as it was"
            )
    return tuple(checks)


@contextmanager
def _open(path: Path, signature: Signature, dtype: DType) -> Iterator[OnnxRuntimeEngine]:
    if dtype != "bfloat16":
        with OnnxRuntimeEngine(path, *signature) as engine:
            yield engine
        return
    inputs, outputs = (tuple(_wide(spec) for spec in specs) for specs in signature)
    with TemporaryDirectory(prefix="ttt-video-parity-") as folder:
        wide = widened(path, Path(folder) / "model.onnx")
        with OnnxRuntimeEngine(wide, inputs, outputs) as engine:
            yield engine


def _wide(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec


def random_case(graph: Graph) -> dict[str, Sequence[Tensor]]:
    """The example inputs, and the first of each batch alone."""
    examples = [spec.example for spec in graph.inputs]
    if not any(0 in spec.free_axes for spec in graph.inputs):
        return {"random": examples}
    return {"random, batch 2": examples, "random, batch 1": [example[:1] for example in examples]}


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
