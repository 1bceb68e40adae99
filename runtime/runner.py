"""What the pipeline asks of an engine: a loaded graph that takes and gives named arrays."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.errors import BackendError

Array = NDArray[np.generic]


class AnyArray(Protocol):
    """An array of numpy's, or one that lies elsewhere and that `np.asarray` brings to the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __array__(self) -> NDArray[Any]: ...


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Name, dtype and shape of one input or output; an axis with a name instead of a size is free."""

    name: str
    dtype: TensorDType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @property
    def array_dtype(self) -> str:
        """The dtype of its arrays. numpy has no bfloat16: its bits travel as uint16, and no one but an engine reads
        them."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    def fits(self, array: AnyArray) -> bool:
        """Whether an array may be fed to (or come out of) this place."""
        same_rank = array.ndim == len(self.shape)
        same_sizes = all(isinstance(want, str) or want == n for want, n in zip(self.shape, array.shape, strict=False))
        return same_rank and same_sizes and array.dtype == self.array_dtype


class Runner(Protocol):
    """One graph, loaded. Leaving the `with` block frees what it holds."""

    def run(self, inputs: Mapping[str, AnyArray]) -> Mapping[str, AnyArray]:
        """All outputs by name; the VAE's caches may stay where the engine works, to be fed back as they are.

        Raises BackendError where the inputs are not those of the graph.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RunnerLoader(Protocol):
    """Loads a graph of a bundle by name, such as "transformer-9s"."""

    def __call__(self, graph: str) -> Runner: ...

    def check(self, graphs: Iterable[str]) -> None:
        """Raises BundleError or BackendError unless each of these graphs can be loaded, as far as is known."""
        ...

    def environment(self) -> dict[str, str]:
        """What runs the graphs, for the record: `engine`, packages with their versions, provider or GPU.

        Complete as soon as the loader exists, so that asking for it cannot fail after hours of work.
        """
        ...


def check_inputs(graph: str, specs: tuple[TensorSpec, ...], inputs: Mapping[str, AnyArray]) -> None:
    """Raises BackendError unless `inputs` are exactly what the graph takes; free axes of one name must agree."""
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
