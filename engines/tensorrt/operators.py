"""The versions of the TTT operator as plugins see them: shapes and dtypes of inputs, workspace, and launches.

Version 1 is one launch of the scan. Versions 2 and 3 work through their tokens in chunks: their kernels and the shapes
of a chunk are in `engines/kernels/ttt_chunk.py`. Shapes as in `runtime/ttt_op.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

from ttt_video_engine.engines.kernels.cubin import KernelPart
from ttt_video_engine.runtime import ttt_op
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, DType
from ttt_video_engine.runtime.errors import BackendError

CHUNK_TOKENS = 4096
"""Tokens of a chunk, at most: 108 MB of workspace for each of a batch, at the width of the 5B model in bfloat16."""
ALIGNMENT = 256
"""Bytes: of each tensor in the workspace."""

Shapes = Sequence[Sequence[int]]
OwnDType = Literal["float32", "int32"]
"""Of an input that does not have the dtype of XQ."""


@dataclass(frozen=True)
class Call:
    """What TensorRT passes to a plugin to run: dtype of XQ, shapes of the inputs, addresses.

    `left` are the outputs behind the first.
    """

    dtype: DType
    shapes: Shapes
    inputs: Sequence[int]
    output: int
    workspace: int
    left: Sequence[int] = ()


@dataclass(frozen=True)
class Launch:
    """A kernel with the number of its blocks and its arguments: addresses, then integers."""

    part: KernelPart
    blocks: int
    pointers: tuple[int, ...]
    integers: tuple[int, ...]


class Operator(Protocol):
    """A version of the operator, of one kind. Its first output has the shape and dtype of its first input."""

    @property
    def op(self) -> TTTKind: ...

    @property
    def version(self) -> ttt_op.OpVersion: ...

    def dtypes(self) -> Sequence[OwnDType | None]:
        """Of each input; None for that of XQ."""

    def carried(self) -> Sequence[int]:
        """For each further output, the input of which it has shape and dtype."""

    def check(self, layer: str, shapes: Shapes) -> None:
        """Raises BackendError that names the operator, the layer and the first input with a wrong shape.

        A negative size is unknown and matches any size.
        """

    def scan_size(self, shapes: Shapes) -> tuple[int, int]:
        """Tokens of a mini-batch, and head dimension."""

    def workspace(self, dtype: DType, shapes: Shapes) -> int:
        """Bytes."""

    def launches(self, call: Call) -> Iterator[Launch]:
        """In their order."""


@dataclass(frozen=True)
class ScanOperator:
    """Version 1."""

    op: TTTKind
    version: ttt_op.OpVersion = ttt_op.VERSION

    def dtypes(self) -> Sequence[OwnDType | None]:
        return ["float32" if name == "eta" else None for name in ttt_op.INPUTS[self.op]]

    def carried(self) -> Sequence[int]:
        return ()

    def check(self, layer: str, shapes: Shapes) -> None:
        names = ttt_op.INPUTS[self.op]
        where = _check_count(self.op, layer, names, shapes)
        if len(shapes[0]) != 5:
            raise BackendError(f"{where}: XQ is {list(shapes[0])}; must be [B, H, NC, CS, F]")
        clip, (_, heads, _, _, head_dim) = shapes[0], shapes[0]
        _check_each(where, names, shapes, [clip, clip, clip, clip[:4], *_weights(self.op, heads, head_dim)])

    def scan_size(self, shapes: Shapes) -> tuple[int, int]:
        _, _, _, mini_batch_size, head_dim = shapes[0]
        return mini_batch_size, head_dim

    def workspace(self, dtype: DType, shapes: Shapes) -> int:
        return 0

    def launches(self, call: Call) -> Iterator[Launch]:
        batch, heads, num_mini_batches, _, _ = call.shapes[0]
        yield Launch("scan", batch * heads, (*call.inputs, call.output), (heads, num_mini_batches))


@dataclass(frozen=True)
class ProjectionsOperator:
    """Version 2."""

    op: TTTKind
    version: ttt_op.OpVersion = ttt_op.PROJECTIONS_VERSION

    def dtypes(self) -> Sequence[OwnDType | None]:
        own: dict[str, OwnDType] = {"rate_scale": "float32", "cos": "float32", "sin": "float32"}
        own |= {"tokens": "int32", "rate_tokens": "int32"}
        return [own.get(name) for name in ttt_op.PROJECTIONS_INPUTS[self.op]]

    def carried(self) -> Sequence[int]:
        return ()

    def check(self, layer: str, shapes: Shapes) -> None:
        names = ttt_op.PROJECTIONS_INPUTS[self.op]
        where = _check_count(self.op, layer, names, shapes)
        named = dict(zip(names, shapes, strict=True))
        for name, axes in (("XQ", ["B", "L", "D"]), ("tokens", ["NC", "CS"]), ("norm_weight", ["H", "F"])):
            if len(named[name]) != len(axes):
                raise BackendError(f"{where}: {name} is {list(named[name])}; must be [{', '.join(axes)}]")
        batch, order, (heads, head_dim) = named["XQ"][0], named["tokens"], named["norm_weight"]
        tokens = prod(order) if min(order) >= 0 else -1
        clip, angles = (batch, tokens, heads * head_dim), (*order, head_dim // 2)
        tables = [(), angles, angles, order, order]
        weights = self._inner(batch, _weights(self.op, heads, head_dim))
        expected = [clip, clip, clip, (batch, tokens, heads), *tables, *weights]
        _check_each(where, names, shapes, expected)

    def _inner(self, batch: int, shapes: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Shapes of the norm and the inner weights, of those without a batch axis."""
        return shapes

    def scan_size(self, shapes: Shapes) -> tuple[int, int]:
        sizes = self._sizes(shapes)
        return sizes.mini_batch_size, sizes.head_dim

    def workspace(self, dtype: DType, shapes: Shapes) -> int:
        sizes = self._sizes(shapes)
        return sum(map(_aligned, (*sizes.chunk_bytes(dtype), *sizes.state_bytes())))

    def launches(self, call: Call) -> Iterator[Launch]:
        sizes = self._sizes(call.shapes)
        states = list(_places(call.workspace, (*sizes.chunk_bytes(call.dtype), *sizes.state_bytes())))[5:]
        weights = call.inputs[len(call.inputs) - len(sizes.weights) :]
        for weight, state, count in zip(weights, states, sizes.weights, strict=True):
            yield Launch("start", sizes.batch * sizes.heads, (weight, state), (sizes.heads, count))
        yield from self._chunks(call, sizes, states)

    def _chunks(self, call: Call, sizes: "_Sizes", states: Sequence[int]) -> Iterator[Launch]:
        """The scan, from the states at these addresses, which it changes."""
        programs, prepared = sizes.batch * sizes.heads, call.inputs[: len(call.inputs) - len(states)]
        tokens = call.inputs[ttt_op.PROJECTIONS_INPUTS[self.op].index("tokens")]
        q, k, v, out, eta = _places(call.workspace, sizes.chunk_bytes(call.dtype))
        for before in range(0, sizes.num_mini_batches, sizes.chunk):
            count = min(sizes.chunk, sizes.num_mini_batches - before)
            around = (sizes.heads, sizes.num_mini_batches * sizes.mini_batch_size, before, count)
            yield Launch("prepare", programs * count, (*prepared, q, k, v, eta), around)
            yield Launch("resume", programs, (q, k, v, eta, *prepared[-2:], *states, out), (sizes.heads, count))
            yield Launch("finish", programs * count, (out, tokens, call.output), around)

    def _sizes(self, shapes: Shapes) -> "_Sizes":
        named = dict(zip(ttt_op.PROJECTIONS_INPUTS[self.op], shapes, strict=True))
        heads, head_dim = named["norm_weight"]
        weights = tuple(prod(shape[1:]) for shape in _weights(self.op, heads, head_dim)[2:])
        num_mini_batches, mini_batch_size = named["tokens"]
        return _Sizes(named["XQ"][0], num_mini_batches, mini_batch_size, heads, head_dim, weights)


@dataclass(frozen=True)
class PartOperator(ProjectionsOperator):
    """Version 3. Its outputs are where the scan keeps the state."""

    version: ttt_op.OpVersion = ttt_op.PART_VERSION

    def dtypes(self) -> Sequence[OwnDType | None]:
        shared = super().dtypes()
        carried = self.carried()
        return ["float32" if place in carried else own for place, own in enumerate(shared)]

    def carried(self) -> Sequence[int]:
        names = ttt_op.PROJECTIONS_INPUTS[self.op]
        return range(names.index("W1"), len(names))

    def _inner(self, batch: int, shapes: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        return [*shapes[:2], *((batch, *shape) for shape in shapes[2:])]

    def workspace(self, dtype: DType, shapes: Shapes) -> int:
        return sum(map(_aligned, self._sizes(shapes).chunk_bytes(dtype)))

    def launches(self, call: Call) -> Iterator[Launch]:
        sizes = self._sizes(call.shapes)
        programs = sizes.batch * sizes.heads
        for place, state, count in zip(self.carried(), call.left, sizes.weights, strict=True):
            yield Launch("carry", programs, (call.inputs[place], state), (programs, count))
        yield from self._chunks(call, sizes, call.left)


@dataclass(frozen=True)
class _Sizes:
    """Of a call of version 2 or 3. `weights` are the values of each inner weight for one head."""

    batch: int
    num_mini_batches: int
    mini_batch_size: int
    heads: int
    head_dim: int
    weights: tuple[int, ...]

    @property
    def chunk(self) -> int:
        """Mini-batches of a chunk."""
        return min(self.num_mini_batches, max(1, CHUNK_TOKENS // self.mini_batch_size))

    def chunk_bytes(self, dtype: DType) -> tuple[int, ...]:
        """Of q, k, targets, output and learning rates of a chunk."""
        rates = self.batch * self.heads * self.chunk * self.mini_batch_size
        return (*[rates * self.head_dim * ITEM_BYTES[dtype]] * 4, rates * ITEM_BYTES["float32"])

    def state_bytes(self) -> tuple[int, ...]:
        return tuple(self.batch * self.heads * count * ITEM_BYTES["float32"] for count in self.weights)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(start: int, sizes: Sequence[int]) -> Iterator[int]:
    """Addresses of tensors of these bytes, one after the other from `start` on."""
    for size in sizes:
        yield start
        start += _aligned(size)


def _weights(op: TTTKind, heads: int, head_dim: int) -> list[tuple[int, ...]]:
    """Shapes of the norm's weight and bias, then of the inner weights."""
    hidden, norm = 4 * head_dim, (heads, head_dim)
    inner: dict[TTTKind, list[tuple[int, ...]]] = {
        "linear": [(heads, head_dim, head_dim), (heads, 1, head_dim)],
        "mlp": [(heads, head_dim, hidden), (heads, 1, hidden), (heads, hidden, head_dim), (heads, 1, head_dim)],
    }
    return [norm, norm, *inner[op]]


def _check_count(op: TTTKind, layer: str, names: Sequence[str], shapes: Shapes) -> str:
    """Returns how errors name the operator and the layer."""
    where = f"{ttt_op.DOMAIN}::{ttt_op.OP_TYPES[op]} {layer}"
    if len(shapes) != len(names):
        raise BackendError(f"{where}: has {len(shapes)} inputs; must have {', '.join(names)}")
    return where


def _check_each(where: str, names: Sequence[str], shapes: Shapes, expected: Shapes) -> None:
    for name, shape, required in zip(names, shapes, expected, strict=True):
        same_sizes = (a == b or min(a, b) < 0 for a, b in zip(shape, required, strict=False))
        fits = len(shape) == len(required) and all(same_sizes)
        if not fits:
            raise BackendError(f"{where}: {name} is {list(shape)}; must be {list(required)}")
