"""Reads torch distributed checkpoints: a folder with a table, `.metadata`, and chunk files written by torch.save."""

import io
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ttt_video_engine.reference.checkpoints.damage import FETCH_AGAIN, check_printable, reading, regular_size
from ttt_video_engine.reference.checkpoints.distributed_table import Chunk, Location, StoredTensor, read_table
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.reference.checkpoints.torch_files import WRAPPERS, check_dense, load_torch
from ttt_video_engine.runtime.errors import CheckpointError

TABLE = ".metadata"


def open_distributed(folder: Path) -> LazyStateDict:
    """The tensors in the table of `folder`. Values that are not tensors are skipped.

    Raises CheckpointError for a damaged table, and if files that it names are missing or too short. Reading a tensor
    raises it for damaged chunks.
    """
    table = read_table(folder / TABLE)
    _check_files(folder, table.locations)
    tensors = {
        name: LazyTensor(stored.shape, stored.dtype, partial(_read, folder, name, stored))
        for name, stored in table.tensors.items()
    }
    for key in WRAPPERS:
        wrapped = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name.startswith(f"{key}.")}
        tensors = wrapped or tensors
    return tensors


def _check_files(folder: Path, locations: tuple[Location, ...]) -> None:
    """Raises CheckpointError unless every file in the table exists in the folder and is long enough."""
    needed: dict[str, int] = {}
    for location in locations:
        needed[location.file] = max(needed.get(location.file, 0), location.offset + location.length)
    check_printable(needed, folder / TABLE)
    for name, end in needed.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / TABLE}: {name!r} leads out of the folder; {FETCH_AGAIN}")
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, but {TABLE} lists it; {FETCH_AGAIN}")
        size = regular_size(path)
        if size < end:
            raise CheckpointError(f"{path}: is cut off at {size:,} bytes; {FETCH_AGAIN}")


def _read(folder: Path, name: str, stored: StoredTensor) -> Tensor:
    """Assembles a tensor from its chunks. Checks that all of them are there before it allocates memory."""
    chunks = [chunk for chunk in stored.chunks if prod(chunk.shape)]
    _check_complete(folder, name, stored, chunks)
    with reading(folder / TABLE):
        whole = torch.empty(stored.shape, dtype=stored.dtype)
    for chunk in chunks:
        region = tuple(slice(start, start + size) for start, size in zip(chunk.start, chunk.shape, strict=True))
        whole[region] = _read_chunk(folder, name, stored, chunk)
    return whole


def _check_complete(folder: Path, name: str, stored: StoredTensor, chunks: list[Chunk]) -> None:
    """Raises CheckpointError unless each value is in exactly one chunk, and each chunk has enough bytes."""
    filled, values = sum(prod(chunk.shape) for chunk in chunks), prod(stored.shape)
    if filled != values:
        raise CheckpointError(f"{folder}: has {filled:,} of the {values:,} values of a tensor, {name!r}; {FETCH_AGAIN}")
    for chunk in chunks:
        size = prod(chunk.shape) * stored.dtype.itemsize
        if chunk.location.length < size:
            found = f"has {chunk.location.length:,} bytes for a chunk of {name!r}; must have {size:,}"
            raise CheckpointError(f"{folder / chunk.location.file}: {found}; {FETCH_AGAIN}")
    if _overlap(chunks):
        raise CheckpointError(f"{folder / TABLE}: two chunks of {name!r} hold the same values; {FETCH_AGAIN}")


def _overlap(chunks: list[Chunk]) -> bool:
    """Whether two of these non-empty chunks overlap.

    Sweeps along the axis with the most distinct starts, so that each chunk is compared with its neighbours only.
    """
    axes = range(len(chunks[0].shape)) if chunks else range(0)
    axis = max(axes, key=lambda axis: len({chunk.start[axis] for chunk in chunks}), default=None)
    if axis is None:
        return len(chunks) > 1
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start[axis]):
        active = [other for other in active if other.start[axis] + other.shape[axis] > chunk.start[axis]]
        if any(all(_intersect(other, chunk, each) for each in axes) for other in active):
            return True
        active.append(chunk)
    return False


def _intersect(one: Chunk, two: Chunk, axis: int) -> bool:
    return max(one.start[axis], two.start[axis]) < min(
        one.start[axis] + one.shape[axis], two.start[axis] + two.shape[axis]
    )


def _read_chunk(folder: Path, name: str, stored: StoredTensor, chunk: Chunk) -> Tensor:
    """The values of one chunk. Raises CheckpointError unless it has the chunk's shape and the tensor's dtype."""
    path = folder / chunk.location.file
    with reading(path), path.open("rb") as file:
        file.seek(chunk.location.offset)
        content = io.BytesIO(file.read(chunk.location.length))
    found = load_torch(content, path)
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{path}: has a {type(found).__name__} for a chunk of {name!r}; {FETCH_AGAIN}")
    check_dense(found, path, name)
    if found.shape != chunk.shape or found.dtype != stored.dtype:
        described = (
            f"shape {list(found.shape)} and {found.dtype}; {TABLE} states {list(chunk.shape)} and {stored.dtype}"
        )
        raise CheckpointError(f"{path}: a chunk of {name!r} has {described}; {FETCH_AGAIN}")
    return found.detach()
