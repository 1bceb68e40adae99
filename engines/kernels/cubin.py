"""Compiled kernels (cubins), each with a JSON file that describes how to launch it."""

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError, export_for_gpu

KernelPart = Literal["scan", "start", "carry", "prepare", "resume", "finish"]
"""`scan` is version 1 of the operator. The others are versions 2 and 3, which work through a clip in chunks
(`ttt_chunk.py`): the inner weights become a state, or the state that another part of the clip left is copied; a chunk
is brought into the order of the scan; the scan goes on from the state; its output is brought back into the order of the
tokens."""
CHUNK_PARTS: tuple[KernelPart, ...] = ("start", "prepare", "resume", "finish")
"""Of version 2."""
CARRIED_PARTS: tuple[KernelPart, ...] = ("carry", "prepare", "resume", "finish")
"""Of version 3."""


class Cubin(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kernel for one architecture, dtype and size: a part of an operator.

    `parameters` are the names of the kernel's parameters in order. `shared_memory` is in bytes per block; `registers`
    and `spills` (bytes of stack) are per thread.
    """

    op: TTTKind
    gpu: str
    dtype: DType
    mini_batch_size: int
    head_dim: int
    entry: str
    num_warps: int
    shared_memory: int
    registers: int
    spills: int
    parameters: tuple[str, ...]
    file: str
    sha256: str
    source_sha256: str
    triton: str
    part: KernelPart = "scan"


def cubin_name(
    op: TTTKind, gpu: str, dtype: DType, mini_batch_size: int, head_dim: int, part: KernelPart = "scan"
) -> str:
    """Name of a kernel, and of its files without their suffixes."""
    kernel = f"ttt_{op}" if part == "scan" else f"ttt_{op}_{part}"
    return f"{kernel}-c{mini_batch_size}-f{head_dim}-{dtype}-{gpu}"


def read_cubin(folder: Path, name: str) -> tuple[Cubin, bytes]:
    """A kernel's description and code. Raises BackendError where a file is missing, damaged or of another kernel."""
    gpu = name.rpartition("-")[2]
    cure = export_for_gpu(gpu)
    description, code = folder / f"{name}.json", folder / f"{name}.cubin"
    for path in (description, code):
        if not path.is_file():
            raise BackendError(f"{path}: is missing; {cure}")
    try:
        cubin = msgspec.json.decode(description.read_bytes(), type=Cubin)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BackendError(f"{description}: {error}; {cure}") from error
    content = code.read_bytes()
    sizes = (cubin.mini_batch_size, cubin.head_dim)
    same_kernel = name == cubin_name(cubin.op, cubin.gpu, cubin.dtype, *sizes, cubin.part)
    if not same_kernel or hashlib.sha256(content).hexdigest() != cubin.sha256:
        raise BackendError(f"{code}: has changed since it was compiled; {cure}")
    return cubin, content
