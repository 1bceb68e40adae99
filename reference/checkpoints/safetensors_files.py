"""Reads safetensors files. The header describes all tensors; each tensor is read by opening the file again."""

from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ttt_video_engine.reference.checkpoints.damage import reading
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.runtime.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Supported dtypes: those with one value per element. F4 and F6, which pack several values per byte, are refused."""


def is_safetensors(path: Path) -> bool:
    """Whether a regular file starts like safetensors: 8 bytes for the length of the header, then its JSON."""
    with reading(path), path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def open_safetensors(path: Path) -> LazyStateDict:
    """The tensors of one file. Raises CheckpointError for a damaged file or an unsupported dtype."""
    with reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    for name, (_, dtype) in described.items():
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {dtype}, which is not supported; give weights in F32, F16 or BF16"
            )
    return {
        name: LazyTensor(shape, _DTYPES[dtype], partial(_read, path, name))
        for name, (shape, dtype) in described.items()
    }


def _read(path: Path, name: str) -> Tensor:
    with reading(path), safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
