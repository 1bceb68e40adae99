"""Torch distributed checkpoints: a folder with a table, `.metadata`, and files of chunks, one torch.save each."""

import io
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ttt_video_engine.reference.checkpoints.damage import CURE, check_printable, reading, regular_size
from ttt_video_engine.reference.checkpoints.distributed_table import Chunk, Place, StoredTensor, read_table
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.reference.checkpoints.torch_files import WRAPPERS, check_dense, load_torch
from ttt_video_engine.runtime.errors import CheckpointError

TABLE = ".metadata"


def open_distributed(folder: Path) -> LazyStateDict:
    """The tensors that the table of `folder` names; other values are skipped.

    Raises CheckpointError, as reading a tensor does, for a damaged table and for files that lack what it names.
    """
    table = read_table(folder / TABLE)
    _check_files(folder, table.places)
    tensors = {
        name: LazyTensor(stored.shape, stored.dtype, partial(_read, folder, name, stored))
        for name, stored in table.tensors.items()
    }
    for key in WRAPPERS:
        wrapped = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name.startswith(f"{key}.")}
        tensors = wrapped or tensors
    return tensors


def _check_files(folder: Path, places: tuple[Place, ...]) -> None:
    """Raises CheckpointError unless the files that the table names are in the folder, and long enough."""
    needed: dict[str, int] = {}
    for place in places:
        needed[place.file] = max(needed.get(place.file, 0), place.offset + place.length)
    check_printable(needed, folder / TABLE)
    for name, end in needed.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / TABLE}: {name!r} leads out of the folder; {CURE}")
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, {TABLE} names it; {CURE}")
        size = regular_size(path)
        if size < end:
            raise CheckpointError(f"{path}: is cut off at {size:,} bytes; {CURE}")


def _read(folder: Path, name: str, stored: StoredTensor) -> Tensor:
    """The tensor, put together from its chunks. No memory is taken for it before all of them are known to be there."""
    chunks = [chunk for chunk in stored.chunks if prod(chunk.shape)]
    _check_complete(folder, name, stored, chunks)
    with reading(folder / TABLE):
        whole = torch.empty(stored.shape, dtype=stored.dtype)
    for chunk in chunks:
        region = tuple(slice(start, start + size) for start, size in zip(chunk.start, chunk.shape, strict=True))
        whole[region] = _read_chunk(folder, name, stored, chunk)
    return whole


def _check_complete(folder: Path, name: str, stored: StoredTensor, chunks: list[Chunk]) -> None:
    """Raises CheckpointError unless every value lies in one chunk, and every chunk has the bytes for its values."""
    filled, values = sum(prod(chunk.shape) for chunk in chunks), prod(stored.shape)
    if filled != values:
        raise CheckpointError(f"{folder}: has {filled:,} of the {values:,} values of a tensor, {name!r}; {CURE}")
    for chunk in chunks:
        size = prod(chunk.shape) * stored.dtype.itemsize
        if chunk.place.length < size:
            found = f"has {chunk.place.length:,} bytes for a chunk of {name!r} that takes {size:,}"
            raise CheckpointError(f"{folder / chunk.place.file}: {found}; {CURE}")
    if _overlap(chunks):
        raise CheckpointError(f"{folder / TABLE}: two chunks of {name!r} hold the same values; {CURE}")


def _overlap(chunks: list[Chunk]) -> bool:
    """Whether two of these chunks, none empty, share a value.

    A sweep along the axis that most of them are cut at. So rows of many ranks are compared with their neighbours only.
    """
    axes = range(len(chunks[0].shape)) if chunks else range(0)
    axis = max(axes, key=lambda axis: len({chunk.start[axis] for chunk in chunks}), default=None)
    if axis is None:
        return len(chunks) > 1
    open_ones: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start[axis]):
        open_ones = [one for one in open_ones if one.start[axis] + one.shape[axis] > chunk.start[axis]]
        if any(all(_meet(one, chunk, other) for other in axes) for one in open_ones):
            return True
        open_ones.append(chunk)
    return False


def _meet(one: Chunk, two: Chunk, axis: int) -> bool:
    return max(one.start[axis], two.start[axis]) < min(
        one.start[axis] + one.shape[axis], two.start[axis] + two.shape[axis]
    )


def _read_chunk(folder: Path, name: str, stored: StoredTensor, chunk: Chunk) -> Tensor:
    """The values of one chunk, of its shape and the tensor's dtype."""
    path = folder / chunk.place.file
    with reading(path), path.open("rb") as file:
        file.seek(chunk.place.offset)
        content = io.BytesIO(file.read(chunk.place.length))
    found = load_torch(content, path)
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{path}: has a {type(found).__name__} for a chunk of {name!r}; {CURE}")
    check_dense(found, path, name)
    if found.shape != chunk.shape or found.dtype != stored.dtype:
        described = f"shape {list(found.shape)} and {found.dtype}; {TABLE} says {list(chunk.shape)} and {stored.dtype}"
        raise CheckpointError(f"{path}: a chunk of {name!r} has {described}; {CURE}")
    return found.detach()
