"""Runs the functions of a Gluon kernel on a CPU: their own code, with torch in place of Gluon.

Triton's interpreter does not run Gluon. Here a tensor is a torch tensor, shared memory a torch tensor that is written
in place, and a layout is nothing: what threads hold, and whether they wait for each other, is not checked. An
asynchronous copy destroys its target at once and writes it when it is waited for: a read without a wait gives NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language.core import constexpr


class Int(int):
    """A program's index."""

    def to(self, dtype: torch.dtype) -> int:
        return int(self)


class Pointer:
    """An address, or a tensor of addresses, in a contiguous tensor."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def read(self) -> Tensor:
        return self.memory[self.offset]


class Shared:
    """A descriptor of shared memory: a view of a tensor."""

    def __init__(self, view: Tensor) -> None:
        self.view = view

    def index(self, index: int) -> "Shared":
        return Shared(self.view[index])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.view.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.view.permute(*order))

    def load(self, layout: object) -> Tensor:
        return self.view.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.view.shape and value.dtype == self.view.dtype
        self.view.copy_(value)


class AsyncCopies:
    """Groups of copies that have not been waited for, oldest first."""

    def __init__(self) -> None:
        self._open: list[tuple[Shared, Tensor]] = []
        self._groups: list[list[tuple[Shared, Tensor]]] = []

    def async_load(self, target: Shared, source: Pointer) -> None:
        self._open.append((target, source.read().to(target.view.dtype)))
        target.view.fill_(float("nan"))

    def commit_group(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self._groups) > outstanding:
            for target, value in self._groups.pop(0):
                target.store(value)


def emulate(kernel: Any, programs: int, arguments: Mapping[str, Any], *, rounds: bool) -> None:
    """Runs `programs` programs of a kernel, which writes into the tensors of `arguments`.

    Without `rounds`, what the kernel rounds to bfloat16 stays float32: then it must equal the scan.
    """
    half = torch.bfloat16 if rounds else torch.float32
    values = list(arguments.items())
    for program in range(programs):
        namespace = _gluon(program, half)
        called = {name: Pointer(value.view(-1)) if isinstance(value, Tensor) else value for name, value in values}
        _bind(kernel.fn, namespace)(**called)


def _gluon(program: int, half: torch.dtype) -> dict[str, Any]:
    """The names that a kernel takes from Gluon."""

    def multiply(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        assert a.dtype == b.dtype == half
        return total + a.float() @ b.float()

    def reduce(values: Sequence[Tensor], axis: int, combine: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        columns = [value.unbind(axis) for value in values]
        total = tuple(column[0] for column in columns)
        for i in range(1, len(columns[0])):
            total = combine(*total, *(column[i] for column in columns))
        return total

    def store(target: Pointer, value: Tensor) -> None:
        target.memory[target.offset] = value

    gl = SimpleNamespace(
        float32=torch.float32,
        int64=torch.int64,
        bfloat16=half,
        constexpr=None,
        program_id=lambda axis: Int(program),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        SliceLayout=lambda axis, parent: None,
        convert_layout=lambda value, layout: value,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, float("nan"), dtype=dtype)),
        load=lambda source: source.read(),
        store=store,
        sum=lambda value, axis: value.sum(axis),
        reduce=reduce,
        rsqrt=torch.rsqrt,
        where=lambda condition, yes, no: yes if condition else no,
        static_range=range,
    )
    return {
        "gl": gl,
        "mma_v2": multiply,
        "async_copy": AsyncCopies(),
        "tanh": torch.tanh,  # instructions of the GPU
        "pack": lambda value: value.to(half),
    }


def _bind(kernel: FunctionType, namespace: Mapping[str, Any]) -> Callable[..., Any]:
    """The kernel and the functions of its module, with `namespace` in place of Gluon."""
    names: dict[str, Any] = {}

    def rebound(function: FunctionType) -> Callable[..., Any]:
        return FunctionType(function.__code__, names, function.__name__, function.__defaults__)

    for name, value in kernel.__globals__.items():
        if isinstance(value, GluonJITFunction):
            names[name] = rebound(value.fn)
        else:
            names[name] = value.value if isinstance(value, constexpr) else value
    names |= namespace
    return rebound(kernel)
