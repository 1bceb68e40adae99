"""Reads torch.save files: zip archives, which are memory-mapped, and the format before torch 1.6, which is read whole.

Both contain a pickle. torch's restricted unpickler reads it and runs no code from the file.
"""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_video_engine.reference.checkpoints.damage import FETCH_AGAIN, one_line, reading
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, in_memory
from ttt_video_engine.runtime.errors import CheckpointError

WRAPPERS = ("state_dict", "model")
"""Keys under which a file may hold its state dict."""


def open_torch_file(path: Path) -> LazyStateDict:
    """The tensors of a state dict. Values that are not tensors are skipped.

    Raises CheckpointError for a damaged file, a pickle that holds anything but tensors and plain values, and a tensor
    that is not dense or has no values.
    """
    content = load_torch(path, path)
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; must be a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: has a tensor under a key of type {type(name).__name__}; must be a name")
        check_dense(value, path, name)
    return {name: in_memory(value) for name, value in tensors.items()}


def load_torch(source: Path | io.BytesIO, path: Path) -> Any:
    """The object that torch.save wrote to `source`, which is `path` or a part of that file.

    Raises CheckpointError that names `path`.
    """
    with reading(path):
        zipped = zipfile.is_zipfile(source)
        if zipped:
            _check_archive(source)
        if isinstance(source, io.BytesIO):
            source.seek(0)
    try:
        # Only a zip archive in a file can be memory-mapped.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and isinstance(source, Path))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)}); {FETCH_AGAIN}") from error
    except Exception as error:  # a damaged pickle raises almost any class
        raise CheckpointError(f"{path}: is not a plain file of weights ({one_line(error)})") from error


def check_dense(tensor: Tensor, path: Path, name: str) -> None:
    """Raises CheckpointError, which names `path` and the tensor, unless it is a plain dense tensor with values."""
    kind = _unsupported_kind(tensor)
    if kind:
        raise CheckpointError(f"{path}: tensor {name!r} is {kind}; give dense weights in float32, float16 or bfloat16")


def _unsupported_kind(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.device.type != "cpu":
        return f"without values (on the {tensor.device.type} device)"
    return ""


def _check_archive(source: Path | io.BytesIO) -> None:
    """Raises ValueError if the archive unpacks to more bytes than it has: torch.save never compresses."""
    size = len(source.getbuffer()) if isinstance(source, io.BytesIO) else os.path.getsize(source)
    with zipfile.ZipFile(source) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > size:
        raise ValueError(f"{unpacked:,} bytes in an archive of {size:,}")
