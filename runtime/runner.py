"""What the pipeline needs of a backend: a `Runner` is a loaded graph with named inputs and outputs."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.errors import BackendError

Array = NDArray[np.generic]


class HostOrDeviceArray(Protocol):
    """A NumPy array, or an array on a device, which `np.asarray` copies to the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __array__(self) -> NDArray[Any]: ...


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Name, dtype and shape of one input or output. An axis with a name instead of a size is dynamic."""

    name: str
    dtype: TensorDType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @property
    def array_dtype(self) -> str:
        """Dtype of its arrays. NumPy has no bfloat16: such arrays are uint16 with the same bits, which only a backend
        interprets."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    def fits(self, array: HostOrDeviceArray) -> bool:
        """Whether an array has the rank, the sizes and the dtype of this input or output."""
        same_rank = array.ndim == len(self.shape)
        same_sizes = all(isinstance(axis, str) or axis == n for axis, n in zip(self.shape, array.shape, strict=False))
        return same_rank and same_sizes and array.dtype == self.array_dtype


class Runner(Protocol):
    """One loaded graph. Leaving the `with` block frees it."""

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> Mapping[str, HostOrDeviceArray]:
        """Returns all outputs by name. The VAE's caches may stay on the device; they are passed back as inputs.

        Raises BackendError where the inputs do not match the graph.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunnerLoader(Protocol):
    """Loads a graph of a bundle by name, such as "transformer-9s"."""

    def __call__(self, graph: str) -> Runner: ...

    def environment(self) -> dict[str, str]:
        """What runs the graphs, for the sidecar: `engine`, packages with their versions, provider or GPU.

        Complete as soon as the loader exists, so that it cannot fail after hours of rendering.
        """
        ...


def check_inputs(graph: str, specs: tuple[TensorSpec, ...], inputs: Mapping[str, HostOrDeviceArray]) -> None:
    """Raises BackendError unless `inputs` match `specs` exactly. Dynamic axes of one name must have one size."""
    expected = {spec.name for spec in specs}
    if expected != set(inputs):
        raise BackendError(f"{graph}: inputs are {sorted(inputs)}; must be {sorted(expected)}")
    free: dict[str, int] = {}
    for spec in specs:
        array = inputs[spec.name]
        if not spec.fits(array):
            raise BackendError(f"{graph}: input {spec.name} is {array.dtype}{list(array.shape)}; must be {spec}")
        for axis, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and free.setdefault(axis, size) != size:
                raise BackendError(f"{graph}: input {spec.name} has {size} for {axis}, others have {free[axis]}")
