"""Runs the graphs of a bundle in PyTorch: the reference's modules, on a CPU or an NVIDIA GPU."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from ttt_video_engine.engines.tensorrt.engine import KERNELS
from ttt_video_engine.engines.torch.compiled import cannot_compile, compile_layers
from ttt_video_engine.engines.torch.components import Component, component_of
from ttt_video_engine.engines.torch.scan import REFERENCE, find_scan, use_scan
from ttt_video_engine.engines.torch.weights import named_by_graph, with_stored_weights
from ttt_video_engine.reference.ttt_layer import Scan
from ttt_video_engine.runtime.bundle import CACHE_IN, CACHE_OUT, Bundle
from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.errors import BackendError, brief
from ttt_video_engine.runtime.runner import HostOrDeviceArray, TensorSpec, check_inputs

DeviceName = Literal["cpu", "cuda"]


class TorchArray:
    """A tensor as an array. It stays on its device, and is copied to the host where NumPy asks for it.

    bfloat16 is uint16 with the same bits, as NumPy has no such dtype.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        name = str(self.tensor.dtype).removeprefix("torch.")
        return np.dtype("uint16" if name == "bfloat16" else name)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        host = self.tensor.detach().cpu().contiguous()
        array: NDArray[Any] = (host.view(torch.uint16) if host.dtype == torch.bfloat16 else host).numpy()
        return np.array(array, dtype, copy=copy)


class TorchRunner:
    """A module that runs as the graph of this name. `inputs` and `outputs` are those of the graph."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: Component,
        signature: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
        device: torch.device,
    ) -> None:
        self._name, self._component, self._device = name, component, device
        self._module: nn.Module | None = module
        self.inputs, self.outputs = signature
        # A stream of its own: the default stream has no address to launch kernels on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, HostOrDeviceArray]:
        """As `Runner.run`. Caches are returned as `TorchArray`; as inputs they may also be NumPy arrays."""
        if self._module is None:
            raise BackendError(f"{self._name}: has been freed; load it again")
        check_inputs(self._name, self.inputs, inputs)
        with self._running():
            given = {spec.name: self._tensor(inputs[spec.name], spec.dtype) for spec in self.inputs}
            found = self._component.run(self._module, given)
            outputs = {spec.name: self._array(spec, found[spec.name]) for spec in self.outputs}
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._module = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within the block, tensors that the modules create are on the device, and torch's errors are BackendErrors."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise BackendError(
                    f"{self._name}: the GPU's memory is too small ({brief(error)}); use --low-memory, or a larger GPU"
                ) from error
            except (RuntimeError, ValueError, IndexError) as error:
                raise BackendError(f"{self._name}: torch failed ({brief(error)})") from error

    def _tensor(self, array: HostOrDeviceArray, dtype: TensorDType) -> Tensor:
        if isinstance(array, TorchArray):
            return array.tensor.to(self._device)
        # torch warns of memory that cannot be written.
        tensor = torch.from_numpy(np.require(np.asarray(array), requirements=("C", "W")))
        return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).to(self._device)

    def _array(self, spec: TensorSpec, tensor: Tensor) -> HostOrDeviceArray:
        """On the host, and complete; a cache stays where it is, for work on the same device."""
        array = TorchArray(tensor)
        return array if spec.name.startswith((CACHE_IN, CACHE_OUT)) else np.asarray(array)


class TorchLoader:
    """Loads the components of a bundle in PyTorch. `device` None means a GPU where torch has one, else the CPU.

    Makes torch compute as the reference does for the rest of the process: no TF32, and convolutions that give the same
    every time. `warning` is not empty where a GPU has no kernel for the TTT layers. Raises BackendError where torch has
    no such device.
    """

    def __init__(self, bundle: Bundle, *, device: DeviceName | None = None) -> None:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        self._bundle = bundle
        self._device = open_device(device)
        self._scan, scan = self._find_scan()
        self._not_compiled = cannot_compile(self._device, self._scan, has_ttt=self._has_ttt())
        self.warning = f"TTT layers run without a kernel, many times slower: {scan}" if self._is_slow() else ""
        gpu = {"gpu": torch.cuda.get_device_name(self._device)} if self._device.type == "cuda" else {}
        self._environment = {
            "engine": "torch",
            "torch": str(torch.__version__),
            "provider": self._device.type,
            **gpu,
            "scan": scan,
            "layers": f"eager ({self._not_compiled})" if self._not_compiled else "compiled",
        }

    def check(self, graphs: Iterable[str]) -> None:
        """Raises BundleError where the bundle lacks one of these graphs."""
        for graph in graphs:
            self._bundle.graph(graph)

    def environment(self) -> dict[str, str]:
        """As `RunnerLoader.environment`, with the device, and the kernel that runs the scans of TTT layers."""
        return dict(self._environment)

    def __call__(self, graph: str) -> TorchRunner:
        entry, manifest = self._bundle.graph(graph), self._bundle.manifest
        component = component_of(graph, manifest.model)
        source = named_by_graph(
            self._bundle.path(entry.file), self._bundle.path(entry.weights), component.prefix, manifest.dtype
        )
        module = with_stored_weights(component.build, source, self._device)
        if self._not_compiled:
            use_scan(module, self._scan)
        else:
            compile_layers(module, self._scan)
        return TorchRunner(graph, module, component, (entry.inputs, entry.outputs), self._device)

    def _has_ttt(self) -> bool:
        return self._bundle.manifest.model.transformer.ttt_kind is not None

    def _is_slow(self) -> bool:
        return self._device.type == "cuda" and self._has_ttt() and self._scan is None

    def _find_scan(self) -> tuple[Scan | None, str]:
        manifest = self._bundle.manifest
        if self._device.type == "cpu":
            return None, REFERENCE
        return find_scan(manifest.model.transformer, manifest.dtype, self._bundle.path(KERNELS))


def open_device(name: DeviceName | None) -> torch.device:
    """The device to compute on. Raises BackendError where torch finds no GPU and "cuda" is asked for."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise BackendError(
            f"--provider cuda: torch {torch.__version__} finds no NVIDIA GPU; "
            "install a build of torch for CUDA and check the driver, or use --provider cpu"
        )
    # With its index, so that it is equal to the device of the tensors on it.
    return torch.device("cuda", torch.cuda.current_device()) if found and name != "cpu" else torch.device("cpu")
