"""Runs graphs in ONNX Runtime: on the CPU, with onnxruntime-gpu on an NVIDIA GPU, or with a plugin provider."""

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from ttt_video_engine.engines.ort import ort
from ttt_video_engine.engines.plugin_providers import PluginName, plugin_devices
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BackendError
from ttt_video_engine.runtime.runner import Array, HostOrDeviceArray, TensorSpec, check_inputs

ProviderName = Literal["cpu", "cuda", "tensorrt", PluginName]
PROVIDERS: dict[ProviderName, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Execution providers that ONNX Runtime brings itself: first the named one, then those for nodes that it lacks."""

SPIN_US = 20
"""Microseconds for which a thread that waits for work keeps its core busy before it sleeps. On an idle machine that is
faster than to sleep at once; more is hardly faster, and slower beside other work (benchmarks/spinning.py)."""

_ERRORS_ONLY = 3
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


class OnnxRuntimeRunner:
    """One ONNX file in its own session.

    `devices` of a plugin provider come before `providers`. With a `spin_us` of 0, threads sleep as soon as they wait.
    Raises BackendError where the file does not load, or where its inputs and outputs are not `inputs` and `outputs`.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        devices: Sequence[ort.OrtEpDevice] = (),
        num_threads: int = 0,
        spin_us: int = SPIN_US,
    ) -> None:
        self._name = path.name
        self.inputs, self.outputs = inputs, outputs
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or _default_threads()
        options.log_severity_level = _ERRORS_ONLY
        # From the second run on, ONNX Runtime would allocate a block for a whole run beside the blocks of the first.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
        try:
            if devices:
                options.add_provider_for_devices(devices, {})
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                path, options, providers=None if devices else list(providers)
            )
        except Exception as error:  # its exceptions have no common base class
            raise BackendError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)})") from error
        _check_signature(path, inputs, self._session.get_inputs())
        _check_signature(path, outputs, self._session.get_outputs())

    @property
    def providers(self) -> list[str]:
        """The execution providers that started, in order of preference."""
        return self._session.get_providers() if self._session is not None else []

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, Array]:
        if self._session is None:
            raise BackendError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self.inputs, inputs)
        names = [spec.name for spec in self.outputs]
        try:
            host = {name: np.asarray(array) for name, array in inputs.items()}
            return dict(zip(names, self._session.run(names, host), strict=True))
        except Exception as error:  # see above
            raise BackendError(f"{self._name}: ONNX Runtime failed ({_first_line(error)})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        _return_freed_memory()


class OnnxRuntimeLoader:
    """Loads the graphs of a bundle in ONNX Runtime.

    `provider` None means CUDA if this ONNX Runtime has it, else the CPU. `num_threads` 0 means all cores. Raises
    BackendError for a provider that is not there or finds no device, and for a bfloat16 bundle.
    """

    def __init__(self, bundle: Bundle, *, provider: ProviderName | None = None, num_threads: int = 0) -> None:
        if bundle.manifest.dtype == "bfloat16":
            raise BackendError(
                f"{bundle.root}: is in bfloat16, which ONNX Runtime on a CPU and NumPy do not support; "
                "use --engine tensorrt, or export with --dtype float16 or float32"
            )
        self._bundle = bundle
        self._devices: tuple[ort.OrtEpDevice, ...] = ()
        if provider == "nv-tensorrt-rtx" or provider == "openvino":
            self._devices = plugin_devices(provider)
            self._providers: tuple[str, ...] = (self._devices[0].ep_name,)
        else:
            self._providers = available_providers() if provider is None else execution_providers(provider)
        self._provider = provider
        self._num_threads = num_threads
        self._environment = {"engine": "onnxruntime", "onnxruntime": ort.__version__, "provider": self._providers[0]}

    def check(self, graphs: Iterable[str]) -> None:
        """Raises BundleError where the bundle lacks one of these graphs."""
        for graph in graphs:
            self._bundle.graph(graph)

    def environment(self) -> dict[str, str]:
        """As `RunnerLoader.environment`. `provider` is that of the graph loaded last."""
        return dict(self._environment)

    def __call__(self, graph: str) -> OnnxRuntimeRunner:
        entry = self._bundle.graph(graph)
        path = self._bundle.path(entry.file)
        runner = OnnxRuntimeRunner(
            path,
            entry.inputs,
            entry.outputs,
            providers=self._providers,
            devices=self._devices,
            num_threads=self._num_threads,
        )
        # Where a provider does not start, ONNX Runtime silently uses the next one.
        if self._provider is not None and self._providers[0] not in runner.providers:
            raise BackendError(
                f"--provider {self._provider}: {self._providers[0]} did not start; check the GPU and its driver, "
                "or use --provider cpu"
            )
        self._environment["provider"] = runner.providers[0]
        return runner


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_threads() -> int:
    """0, a pinned thread for every core, or, where this process may run on some cores only, their number.

    ONNX Runtime pins threads of a default number to cores that taskset, Slurm or Kubernetes gave to others.
    """
    allowed = num_cores()
    return 0 if allowed == os.cpu_count() else allowed


def _return_freed_memory() -> None:
    """Gives memory that is free back to the system.

    glibc keeps freed blocks of up to 32 MiB once it has seen such, so that a process that loads graphs in turn grows.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def available_providers() -> tuple[str, ...]:
    """The execution providers of this ONNX Runtime, in order of preference."""
    available = ort.get_available_providers()
    return tuple(name for name in PROVIDERS["cuda"] if name in available)


def execution_providers(provider: ProviderName) -> tuple[str, ...]:
    """The execution providers of a value of `--provider`. Raises BackendError where this ONNX Runtime lacks one.

    A missing GPU is found only when a graph is loaded.
    """
    available = ort.get_available_providers()
    for name in PROVIDERS[provider]:
        if name not in available:
            raise BackendError(
                f"--provider {provider}: the installed ONNX Runtime {ort.__version__} has no {name}; "
                "run: pip uninstall onnxruntime; pip install onnxruntime-gpu"
            )
    return PROVIDERS[provider]


def _check_signature(path: Path, expected: tuple[TensorSpec, ...], nodes: list[ort.NodeArg]) -> None:
    found = {node.name: _spec(node) for node in nodes}
    for spec in expected:
        if found.get(spec.name) != spec:
            has = found.get(spec.name, "no such tensor")
            raise BackendError(f"{path}: the bundle lists {spec}, the graph has {has}; {EXPORT_AGAIN}")
    extra = sorted(set(found) - {spec.name for spec in expected})
    if extra:
        raise BackendError(f"{path}: the graph has {', '.join(extra)}, which the bundle does not list; {EXPORT_AGAIN}")


def _spec(node: ort.NodeArg) -> TensorSpec:
    if node.type not in _DTYPES:
        raise BackendError(f"{node.name} is a {node.type}; must be one of {', '.join(_DTYPES)}")
    return TensorSpec(node.name, _DTYPES[node.type], tuple(node.shape))  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
