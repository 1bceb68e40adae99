"""Reads the table of a torch distributed checkpoint: which byte ranges of which files hold each tensor.

The table is a pickle, which torch loads without restrictions. This reader admits only the classes that such a table
consists of, and checks all values before they are used.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ttt_video_engine.reference.checkpoints.damage import one_line, reading, regular_size
from ttt_video_engine.runtime.errors import CheckpointError

_MAX_BYTES = 256 << 20
"""A table has about 150 bytes per chunk."""

_ALLOWED: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Module → the names that a table may use. Torch's dtypes are allowed as well."""


@dataclass(frozen=True)
class Location:
    """A byte range of a file in the folder. Raises ValueError for values of a wrong type or sign."""

    file: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if type(self.file) is not str or not _are_sizes((self.offset, self.length)):
            raise ValueError(f"a chunk has offset {self.offset!r} and {self.length!r} bytes")


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: its first index `start`, its `shape`, and the location of its torch.save data."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    location: Location


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and its chunks, except those without a location."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Table:
    """All tensors by name, and the locations of all stored values, including those that are not tensors."""

    tensors: dict[str, StoredTensor]
    locations: tuple[Location, ...]


def read_table(path: Path) -> Table:
    """Reads `.metadata`. Raises CheckpointError that names it unless it is a table with valid values.

    Does not check that the chunks of a tensor are complete.
    """
    regular_size(path, at_most=_MAX_BYTES)
    with reading(path):
        try:
            metadata = _TableUnpickler(io.BytesIO(path.read_bytes())).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: is not the table of a checkpoint ({one_line(error)})") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}; must be the table of a checkpoint")
        return _checked(metadata)


def _checked(metadata: Metadata) -> Table:
    """Raises ValueError for values of a wrong type or sign, AttributeError or TypeError for missing ones."""
    locations: dict[str, dict[tuple[int, ...] | None, Location]] = {}
    for index, stored in metadata.storage_data.items():
        if getattr(stored, "transform_descriptors", None):
            raise ValueError(f"{index.fqn!r} is stored with {stored.transform_descriptors}, which is not supported")
        offset = None if index.offset is None else tuple(index.offset)
        locations.setdefault(index.fqn, {})[offset] = Location(stored.relative_path, stored.offset, stored.length)
    tensors = {
        name: _tensor(name, entry, locations.get(name, {}))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return Table(tensors, tuple(location for of_tensor in locations.values() for location in of_tensor.values()))


def _tensor(name: str, entry: TensorStorageMetadata, locations: dict[tuple[int, ...] | None, Location]) -> StoredTensor:
    if type(name) is not str:
        raise ValueError(f"a tensor under a key of type {type(name).__name__}")
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or not _are_sizes(shape):
        raise ValueError(f"{name!r} has shape {shape} and dtype {dtype!r}")
    chunks = []
    for described in entry.chunks:
        start, sizes = tuple(described.offsets), tuple(described.sizes)
        if not _are_sizes(start + sizes) or not len(start) == len(sizes) == len(shape):
            raise ValueError(f"a chunk of {name!r} starts at {start} and has shape {sizes}")
        if any(first + size > end for first, size, end in zip(start, sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {name!r} at {start} with shape {sizes} is outside {shape}")
        location = locations.get(start, None if any(start) else locations.get(None))
        if location is not None:
            chunks.append(Chunk(start, sizes, location))
    return StoredTensor(shape, dtype, tuple(chunks))


def _are_sizes(values: tuple[object, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _set_attributes(unpickler: Any) -> None:
    """Sets attributes of an object that the table created, never of an allowed class or function."""
    target = type(unpickler.stack[-2])
    if target.__name__ not in _ALLOWED.get(target.__module__, set()):
        raise pickle.UnpicklingError(f"it modifies a {target.__name__}")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


class _TableUnpickler(pickle._Unpickler):
    """The unpickler written in Python. The one in C allocates as much memory as a damaged stream requests."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in _ALLOWED.get(module, set()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    # BYTEARRAY8 allocates the size that its header states before it reads the data. A table has no bytearrays.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]},
        pickle.BUILD[0]: _set_attributes,
    }
