"""A process of its own in which Triton interprets: it decides when it is imported, so a test cannot change its mind.

Run as `interpret_kernels.py IN OUT`. A line of standard input is an operator's name, its version, and the number of
tokens of a chunk, which version 1 ignores. For each line, it runs the launches of the plugin on the tensors of IN,
writes the outputs to OUT, and answers with a line.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton.runtime.interpreter import ReduceOps

from ttt_video_engine.engines.kernels.cubin import KernelPart
from ttt_video_engine.engines.kernels.ttt_chunk import ttt_finish, ttt_prepare, ttt_start
from ttt_video_engine.engines.kernels.ttt_linear import ttt_linear
from ttt_video_engine.engines.kernels.ttt_mlp import ttt_mlp
from ttt_video_engine.engines.tensorrt import operators
from ttt_video_engine.engines.tensorrt.operators import Call, Operator, PartOperator, ProjectionsOperator, ScanOperator
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import INPUTS, PROJECTIONS_INPUTS

SCANS: dict[str, Any] = {"linear": ttt_linear, "mlp": ttt_mlp}
AROUND: dict[KernelPart, Any] = {"start": ttt_start, "carry": ttt_start, "prepare": ttt_prepare, "finish": ttt_finish}
DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
OPERATORS: dict[str, Callable[[TTTKind], Operator]] = {
    "1": ScanOperator,
    "2": ProjectionsOperator,
    "3": PartOperator,
}
FLOAT32 = ("eta", "state")
STATE = ("W1", "b1", "W2", "b2")


def run(operator: Operator, inputs: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = [inputs[name].contiguous() for name in names]
    out = torch.full_like(tensors[0], float("nan"))
    dtype, shapes = DTYPES[out.dtype], [tuple(tensor.shape) for tensor in tensors]
    workspace = torch.full((operator.workspace(dtype, shapes),), 0xFF, dtype=torch.uint8)  # NaN in each dtype
    left = {names[place]: torch.full_like(tensors[place], float("nan")) for place in operator.carried()}
    known = {tensor.data_ptr(): tensor for tensor in (*tensors, out, *left.values())}
    addresses = [[tensor.data_ptr() for tensor in group] for group in (tensors, left.values())]
    call = Call(dtype, shapes, addresses[0], out.data_ptr(), workspace.data_ptr(), addresses[1])

    def at(pointer: int, kind: torch.dtype) -> Tensor:
        if pointer in known:
            return known[pointer]
        return workspace[pointer - workspace.data_ptr() :].view(kind)

    size: dict[str, object] = dict(zip(("C", "F"), operator.scan_size(shapes), strict=True))
    for launch in operator.launches(call):
        if launch.part in ("scan", "resume"):
            # The interpreter silently computes wrong products of anything but float32.
            kernel, values = SCANS[operator.op], {**size, "PRECISION": "ieee", "RESUMED": launch.part == "resume"}
        else:
            kernel, values = AROUND[launch.part], {"SIZE": 64} if launch.part in ("start", "carry") else size
        float32 = {"resume": (*FLOAT32, *STATE), "carry": (*FLOAT32, "weights")}.get(launch.part, FLOAT32)
        kinds = (torch.float32 if name in float32 else out.dtype for name in kernel.arg_names)
        pointers = [at(pointer, kind) for pointer, kind in zip(launch.pointers, kinds, strict=False)]
        kernel[(launch.blocks,)](*pointers, *launch.integers, **values)
    return {"XQW": out, **left}


def reduce_by_slices(ops: Any, values: tuple[Any, ...]) -> list[Any]:
    """Like the interpreter's own, which combines single numbers: the same order and bits in a tenth of the time."""
    slices = [np.moveaxis(value.handle.data, ops.axis, 0) for value in values]

    def at(index: int) -> list[Any]:
        return [ops.to_tensor(rows[index], value.dtype.scalar) for rows, value in zip(slices, values, strict=True)]

    total = at(0)
    for index in range(1, len(slices[0])):
        total = ops.combine_fn.fn(*total, *at(index))
    if ops.keep_dims:
        total = [ops.to_tensor(np.expand_dims(one.handle.data, ops.axis), one.dtype.scalar) for one in total]
    return list(total)


def main(source: str, target: str) -> None:
    for line in sys.stdin:
        name, version, chunk = line.split()
        op = cast(TTTKind, name)
        operators.CHUNK_TOKENS = int(chunk)
        operator = OPERATORS[version](op)
        save_file(run(operator, load_file(source), (INPUTS if version == "1" else PROJECTIONS_INPUTS)[op]), target)
        print("done", flush=True)


if __name__ == "__main__":
    ReduceOps.generic_reduce = reduce_by_slices
    main(*sys.argv[1:])
