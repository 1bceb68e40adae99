"""Weight files: one external data file for all graphs of a component, written one tensor at a time."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ttt_video_engine.export.graphs.journal import Journal
from ttt_video_engine.export.graphs.quantize import quantize_weights
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor, lazy_state
from ttt_video_engine.runtime.bundle import FileEntry
from ttt_video_engine.runtime.dtypes import WEIGHT_ALIGNMENT, DType
from ttt_video_engine.runtime.errors import CheckpointError, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.quantization import Quantization

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_TIED = {"t5.encoder.embed_tokens.weight": "t5.shared.weight"}
"""Suffix of a tied weight's second name → suffix of its first. Only T5's embedding is tied."""

JOURNAL_INTERVAL = 256 << 20
"""Bytes between two records of the journal: the most that a kill or a power cut loses."""

ByteRange = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True)
class WeightFile:
    """The layout of a weight file: the byte range of each weight, by its name in the module."""

    path: Path
    ranges: Mapping[str, ByteRange]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return max((offset + length for offset, length in self.ranges.values()), default=0)

    def attach(self, model: ir.Model) -> None:
        """Makes the weights among the initializers of `model` external data in this file."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if name in self.ranges and tensor is not None:
                offset, length = self.ranges[name]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]  # weights have no dynamic axes
                    name=name,
                    base_dir=self.path.parent,
                )


def lay_out(weights: LazyStateDict, path: Path, dtype: torch.dtype) -> WeightFile:
    """Assigns every weight an aligned byte range, in the given order. Tied weights share one.

    The layout depends only on names, shapes and dtypes: `dtype`, and their own for weights that are integers.
    """
    ranges: dict[str, ByteRange] = {}
    end = 0
    for name, stored in weights.items():
        first = _first_name(name)
        if first not in ranges:
            offset = end + -end % WEIGHT_ALIGNMENT
            ranges[first] = offset, torch.Size(stored.shape).numel() * _stored_dtype(stored, dtype).itemsize
            end = sum(ranges[first])
        ranges[name] = ranges[first]
    return WeightFile(path, {name: ranges[name] for name in weights})


def write_weights(
    weights: LazyStateDict,
    file: WeightFile,
    dtype: torch.dtype,
    key: Mapping[str, str],
    progress: Callable[[int], None] = lambda written: None,
) -> FileEntry:
    """Writes the weights in `dtype`, integers in their own, to their byte ranges, with at most two in memory.

    A partial file of the same `key` is resumed: a journal beside it records how much of it is on the disk. The complete
    file is read back and verified. `progress` receives the number of bytes written. Raises CheckpointError for a weight
    that `dtype` cannot represent, OutputError if the file does not read back as written.
    """
    journal = Journal(file.path, dict(key))
    # Hashing takes as long as writing, and neither holds the GIL, so hashing runs in a thread of its own.
    with file.path.open("r+b" if file.path.exists() else "w+b") as out, ThreadPoolExecutor(1) as hasher:
        digest, end = journal.resume(out)
        progress(end)
        recorded, hashed = end, hasher.submit(_update, digest, ())
        for name, stored, (offset, length) in _in_file_order(weights, file):
            if offset < recorded:
                continue
            content = b"\0" * (offset - end), _bytes(name, stored, dtype)
            out.writelines(content)
            hashed.result()
            hashed = hasher.submit(_update, digest, content)
            end = offset + length
            progress(end)
            if end - recorded >= JOURNAL_INTERVAL or end == file.size:
                hashed.result()
                journal.record(out, end, digest.hexdigest())
                recorded = end
    entry = FileEntry(digest.hexdigest(), file.size)
    if sha256_of(file.path) != entry.sha256:
        raise OutputError(f"{file.path}: reads back other bytes than were written; check the disk")
    journal.path.unlink(missing_ok=True)
    return entry


def write_module(module: nn.Module, path: Path, *, quantize: Quantization = "none") -> WeightFile:
    """Writes the weights of a module in memory, which have one dtype, to `path`. Returns the layout."""
    weights = lazy_state(module.state_dict())
    (dtype,) = {stored.dtype for stored in weights.values()} or {torch.float32}
    if quantize == "int8":
        weights = quantize_weights(weights)
    file = lay_out(weights, path, dtype)
    write_weights(weights, file, dtype, {})
    return file


def _stored_dtype(stored: LazyTensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.dtype.is_floating_point else stored.dtype


def _first_name(name: str) -> str:
    for second, first in _TIED.items():
        if name.endswith(second):
            return name.removesuffix(second) + first
    return name


def _in_file_order(weights: LazyStateDict, file: WeightFile) -> Iterator[tuple[str, LazyTensor, ByteRange]]:
    """(name, weight, byte range) of every distinct weight, in the order of the file."""
    seen: set[ByteRange] = set()
    for name, stored in weights.items():
        byte_range = file.ranges[name]
        if byte_range not in seen:
            seen.add(byte_range)
            yield name, stored, byte_range


def _bytes(name: str, stored: LazyTensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a weight in `dtype`. Raises CheckpointError if it has values that are not finite there."""
    value = stored.read().detach()
    converted = value.to(_stored_dtype(stored, dtype)).contiguous()
    if not _is_finite(converted):
        found = f"has values that {dtype} cannot represent" if _is_finite(value) else "has NaN or infinite values"
        raise CheckpointError(f"{name}: {found}; fetch the checkpoint again, or export with another --dtype")
    return converted.flatten().view(torch.uint8).numpy().data


def _is_finite(value: Tensor) -> bool:
    extremes = torch.stack(torch.aminmax(value))  # NaN if any value is; ten times faster than isfinite on all values
    return bool(torch.isfinite(extremes).all())


def _update(digest: "hashlib._Hash", content: Iterable[bytes | memoryview]) -> None:
    for part in content:
        digest.update(part)
