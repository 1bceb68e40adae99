"""Graphs in ONNX Runtime: on the CPU, or on a CUDA device where onnxruntime-gpu is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import onnxruntime as ort

from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.engine import Array, TensorSpec, check_inputs
from ttt_video_engine.runtime.errors import EngineError

_ERRORS_ONLY = 3
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


class OnnxRuntimeEngine:
    """One ONNX file in a session of its own.

    `inputs` and `outputs` are what the file must have; EngineError where it has others, or where it does not load.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        num_threads: int = 0,
    ) -> None:
        self._name = path.name
        self.inputs, self.outputs = inputs, outputs
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code, without a base
            raise EngineError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)})") from error
        _check_signature(path, inputs, self._session.get_inputs())
        _check_signature(path, outputs, self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise EngineError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self.inputs, inputs)
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # as above
            raise EngineError(f"{self._name}: ONNX Runtime failed ({_first_line(error)})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


class OnnxRuntimeLoader:
    """Loads graphs of a bundle. `num_threads` 0 lets ONNX Runtime take every core."""

    def __init__(self, bundle: Bundle, *, num_threads: int = 0) -> None:
        self._bundle = bundle
        self._num_threads = num_threads

    def __call__(self, graph: str) -> OnnxRuntimeEngine:
        entry = self._bundle.graph(graph)
        path = self._bundle.path(entry.file)
        return OnnxRuntimeEngine(
            path, entry.inputs, entry.outputs, providers=available_providers(), num_threads=self._num_threads
        )


def available_providers() -> list[str]:
    """Execution providers in order of preference, of those that this build of ONNX Runtime has."""
    available = ort.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]


def _check_signature(path: Path, expected: tuple[TensorSpec, ...], nodes: list[ort.NodeArg]) -> None:
    found = {node.name: _spec(node) for node in nodes}
    for spec in expected:
        if found.get(spec.name) != spec:
            has = found.get(spec.name, "nothing of that name")
            raise EngineError(f"{path}: the bundle promises {spec}, the graph has {has}; export the bundle again")
    extra = sorted(set(found) - {spec.name for spec in expected})
    if extra:
        raise EngineError(f"{path}: the graph has {', '.join(extra)}, not in the bundle; export the bundle again")


def _spec(node: ort.NodeArg) -> TensorSpec:
    if node.type not in _DTYPES:
        raise EngineError(f"{node.name} is a {node.type}; must be one of {', '.join(_DTYPES)}")
    return TensorSpec(node.name, _DTYPES[node.type], tuple(node.shape))  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
