"""A process of its own in which Triton interprets: it decides when it is imported, so a test cannot change its mind.

Run as `interpret_kernels.py IN OUT`. A line of standard input is an operator's name, and for version 2 the number of
tokens of a chunk. For each line, it runs the launches of the plugin on the tensors of IN, writes OUT, and answers with
a line.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttt_video_engine.engines.kernels.cubin import KernelPart
from ttt_video_engine.engines.kernels.ttt_chunk import ttt_finish, ttt_prepare, ttt_start
from ttt_video_engine.engines.kernels.ttt_linear import ttt_linear
from ttt_video_engine.engines.kernels.ttt_mlp import ttt_mlp
from ttt_video_engine.engines.tensorrt import operators
from ttt_video_engine.engines.tensorrt.operators import Call, Operator, ProjectionsOperator, ScanOperator
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import INPUTS, PROJECTIONS_INPUTS

SCANS: dict[str, Any] = {"linear": ttt_linear, "mlp": ttt_mlp}
AROUND: dict[KernelPart, Any] = {"start": ttt_start, "prepare": ttt_prepare, "finish": ttt_finish}
DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FLOAT32 = ("eta", "state")
STATE = ("W1", "b1", "W2", "b2")


def run(operator: Operator, inputs: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    tensors = [inputs[name].contiguous() for name in names]
    out = torch.full_like(tensors[0], float("nan"))
    dtype, shapes = DTYPES[out.dtype], [tuple(tensor.shape) for tensor in tensors]
    workspace = torch.full((operator.workspace(dtype, shapes),), 0xFF, dtype=torch.uint8)  # NaN in each dtype
    known = {tensor.data_ptr(): tensor for tensor in (*tensors, out)}
    call = Call(dtype, shapes, [tensor.data_ptr() for tensor in tensors], out.data_ptr(), workspace.data_ptr())

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
            kernel, values = AROUND[launch.part], {"SIZE": 64} if launch.part == "start" else size
        float32 = (*FLOAT32, *STATE) if launch.part == "resume" else FLOAT32
        kinds = (torch.float32 if name in float32 else out.dtype for name in kernel.arg_names)
        pointers = [at(pointer, kind) for pointer, kind in zip(launch.pointers, kinds, strict=False)]
        kernel[(launch.blocks,)](*pointers, *launch.integers, **values)
    return out


def main(source: str, target: str) -> None:
    for line in sys.stdin:
        name, *chunk = line.split()
        op = cast(TTTKind, name)
        if chunk:
            operators.CHUNK_TOKENS = int(chunk[0])
            out = run(ProjectionsOperator(op), load_file(source), PROJECTIONS_INPUTS[op])
        else:
            out = run(ScanOperator(op), load_file(source), INPUTS[op])
        save_file({"XQW": out}, target)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
