"""One data file of weights that all graphs of a component share, written a tensor at a time."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ttt_video_engine.export.graphs.journal import Journal
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor, lazy_state
from ttt_video_engine.runtime.bundle import FileEntry
from ttt_video_engine.runtime.dtypes import WEIGHT_ALIGNMENT, DType
from ttt_video_engine.runtime.errors import CheckpointError, OutputError
from ttt_video_engine.runtime.files import sha256_of

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_TIED = {"t5.encoder.embed_tokens.weight": "t5.shared.weight"}
"""Second name of a tensor → first, at the end of its name in a graph: only T5's embedding has two."""

NOTE_EVERY = 256 << 20
"""Bytes; what a kill or a power cut can lose of a file."""

ByteRange = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True)
class WeightFile:
    """Where each weight lies in a data file, by its name in the module."""

    path: Path
    places: Mapping[str, ByteRange]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((offset + length for offset, length in self.places.values()), default=0)

    def attach(self, model: ir.Model) -> None:
        """Makes the initializers of `model` that are weights refer to this file, which lies beside the graph."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if name in self.places and tensor is not None:
                offset, length = self.places[name]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]  # weights have no free axes
                    name=name,
                    base_dir=self.path.parent,
                )


def lay_out(weights: LazyStateDict, path: Path, dtype: torch.dtype) -> WeightFile:
    """Gives every tensor a place, in the order given; tied names share one. Depends on names and shapes alone."""
    places: dict[str, ByteRange] = {}
    end = 0
    for name, stored in weights.items():
        first = _first_name(name)
        if first not in places:
            offset = end + -end % WEIGHT_ALIGNMENT
            places[first] = offset, torch.Size(stored.shape).numel() * dtype.itemsize
            end = sum(places[first])
        places[name] = places[first]
    return WeightFile(path, {name: places[name] for name in weights})


def write_weights(
    weights: LazyStateDict,
    file: WeightFile,
    dtype: torch.dtype,
    key: Mapping[str, str],
    progress: Callable[[int], None] = lambda written: None,
) -> FileEntry:
    """Writes the weights in `dtype` to their places, with no more than two of them in memory.

    A file that was begun from the same `key` is gone on with: a journal beside it says how much of it is on the disk.
    When it is whole it is read back. `progress` is told the bytes that are written. Raises CheckpointError for a weight
    that `dtype` cannot hold, and OutputError where the disk does not give back what was written.
    """
    journal = Journal(file.path, dict(key))
    # Hashing takes as long as writing, and neither holds the interpreter's lock: it has a thread of its own.
    with file.path.open("r+b" if file.path.exists() else "w+b") as out, ThreadPoolExecutor(1) as hasher:
        digest, end = journal.resume(out)
        progress(end)
        noted, hashed = end, hasher.submit(_add, digest, ())
        for name, stored, (offset, length) in _in_order(weights, file):
            if offset < noted:
                continue
            content = b"\0" * (offset - end), _bytes(name, stored, dtype)
            out.writelines(content)
            hashed.result()
            hashed = hasher.submit(_add, digest, content)
            end = offset + length
            progress(end)
            if end - noted >= NOTE_EVERY or end == file.size:
                hashed.result()
                journal.note(out, end, digest.hexdigest())
                noted = end
    entry = FileEntry(digest.hexdigest(), file.size)
    if sha256_of(file.path) != entry.sha256:
        raise OutputError(f"{file.path}: does not hold what was written to it; check the disk")
    journal.path.unlink(missing_ok=True)
    return entry


def write_module(module: nn.Module, path: Path) -> WeightFile:
    """The weights of a module that is in memory, in the dtype that they have."""
    weights = lazy_state(module.state_dict())
    (dtype,) = {stored.dtype for stored in weights.values()} or {torch.float32}
    file = lay_out(weights, path, dtype)
    write_weights(weights, file, dtype, {})
    return file


def _first_name(name: str) -> str:
    for second, first in _TIED.items():
        if name.endswith(second):
            return name.removesuffix(second) + first
    return name


def _in_order(weights: LazyStateDict, file: WeightFile) -> Iterator[tuple[str, LazyTensor, ByteRange]]:
    """Every tensor once, as they lie in the file."""
    seen: set[ByteRange] = set()
    for name, stored in weights.items():
        place = file.places[name]
        if place not in seen:
            seen.add(place)
            yield name, stored, place


def _bytes(name: str, stored: LazyTensor, dtype: torch.dtype) -> memoryview:
    value = stored.read().detach()
    converted = value.to(dtype).contiguous()
    if not _is_finite(converted):
        found = f"has values that {dtype} cannot hold" if _is_finite(value) else "has values that are no numbers"
        raise CheckpointError(f"{name}: {found}; fetch the checkpoint again, or export with another --dtype")
    return converted.flatten().view(torch.uint8).numpy().data


def _is_finite(value: Tensor) -> bool:
    extremes = torch.stack(torch.aminmax(value))  # NaN wherever there is one; ten times as fast as to ask each value
    return bool(torch.isfinite(extremes).all())


def _add(digest: "hashlib._Hash", content: Iterable[bytes | memoryview]) -> None:
    for part in content:
        digest.update(part)
