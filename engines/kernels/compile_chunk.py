"""Compiles the kernels of each version of the TTT operator; versions 2 and 3 work through a clip in chunks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ttt_video_engine.engines.kernels import ttt_chunk
from ttt_video_engine.engines.kernels.compile import (
    KERNELS,
    argument_types,
    assemble,
    compile_kernel,
    constants,
    num_warps,
    source_digest,
    write_cubin,
)
from ttt_video_engine.engines.kernels.cubin import CARRIED_PARTS, CHUNK_PARTS, Cubin, KernelPart, cubin_name
from ttt_video_engine.engines.kernels.sizes import check_size
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.ttt_op import OpVersion

STATE = ("W1", "b1", "W2", "b2")
START_SIZE = 1024
"""Values that a program of `ttt_start` copies at a time."""
WARPS = 4
"""Of the kernels around the scan, which only read and write."""


def compile_chunk_kernels(
    op: TTTKind,
    *,
    gpu: str,
    dtype: DType,
    mini_batch_size: int,
    head_dim: int,
    folder: Path,
    parts: tuple[KernelPart, ...] = CHUNK_PARTS,
) -> tuple[Cubin, ...]:
    """Like `compile_kernel`, for the parts of version 2 or 3, in their order."""
    check_size(op, gpu, mini_batch_size, head_dim)
    sizes = {"op": op, "gpu": gpu, "dtype": dtype, "mini_batch_size": mini_batch_size, "head_dim": head_dim}
    cubins = []
    for part in parts:
        kernel, values = _kernel(op, part, dtype, mini_batch_size, head_dim)
        types = argument_types(kernel, values, dtype)
        if part == "resume":
            types |= {name: "*fp32" for name in STATE if name in types}
        if part == "carry":
            types |= {"weights": "*fp32"}
        warps = num_warps(op, head_dim) if part == "resume" else WARPS
        compiled = assemble(kernel, types, values, gpu=gpu, num_warps=warps)
        name = cubin_name(op, gpu, dtype, mini_batch_size, head_dim, part)
        source = source_digest(op, None if part == "resume" else "ttt_chunk.py")
        cubins.append(write_cubin(compiled, folder, name, tuple(types), source, {**sizes, "part": part}))
    return tuple(cubins)


def _kernel(
    op: TTTKind, part: KernelPart, dtype: DType, mini_batch_size: int, head_dim: int
) -> tuple[Any, dict[str, Any]]:
    """A part's kernel and its compile-time arguments."""
    if part == "resume":
        return KERNELS[op], {**constants(op, dtype, mini_batch_size, head_dim), "RESUMED": True}
    if part in ("start", "carry"):
        return ttt_chunk.ttt_start, {"SIZE": START_SIZE}
    kernel = ttt_chunk.ttt_prepare if part == "prepare" else ttt_chunk.ttt_finish
    return kernel, {"C": mini_batch_size, "F": head_dim}


def _compile_scan(
    op: TTTKind, *, gpu: str, dtype: DType, mini_batch_size: int, head_dim: int, folder: Path
) -> tuple[Cubin, ...]:
    sizes = {"mini_batch_size": mini_batch_size, "head_dim": head_dim}
    return (compile_kernel(op, gpu=gpu, dtype=dtype, folder=folder, **sizes),)


KERNELS_OF_VERSION: dict[OpVersion, Callable[..., tuple[Cubin, ...]]] = {
    1: _compile_scan,
    2: compile_chunk_kernels,
    3: partial(compile_chunk_kernels, parts=CARRIED_PARTS),
}
"""What compiles all kernels of a version."""
