"""The table of a torch distributed checkpoint: which parts of which files make up each tensor.

It is a pickle, which torch itself would run. Here it may name nothing but the classes that such a table is made of,
and what it says is checked before it is used.
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

_MOST_BYTES = 256 << 20
"""A table takes about 150 bytes for each chunk."""


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
"""Module → what a table may name of it. Dtypes of torch are allowed as well."""


@dataclass(frozen=True)
class Place:
    """Bytes of a file in the folder: `length` of them from `offset` on."""

    file: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if type(self.file) is not str or not _are_sizes((self.offset, self.length)):
            raise ValueError(f"a chunk lies at {self.offset!r} and has {self.length!r} bytes")


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: `shape` values from index `start` on, as one torch.save at `place`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and those of its chunks that have a place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Table:
    """All tensors by name, and the places of all that is stored, other values included."""

    tensors: dict[str, StoredTensor]
    places: tuple[Place, ...]


def read_table(path: Path) -> Table:
    """Reads `.metadata`. Raises CheckpointError, which names it, for anything but a table whose values make sense.

    Whether the chunks of a tensor are complete is not checked here.
    """
    regular_size(path, at_most=_MOST_BYTES)
    with reading(path):
        try:
            metadata = _TableUnpickler(io.BytesIO(path.read_bytes())).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: is not the table of a checkpoint ({one_line(error)})") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}; must be the table of a checkpoint")
        return _checked(metadata)


def _checked(metadata: Metadata) -> Table:
    """Raises ValueError for values of a wrong type or sign, and AttributeError or TypeError where some are missing."""
    places: dict[str, dict[tuple[int, ...] | None, Place]] = {}
    for index, stored in metadata.storage_data.items():
        if getattr(stored, "transform_descriptors", None):
            raise ValueError(f"{index.fqn!r} is stored with {stored.transform_descriptors}, which is not supported")
        offset = None if index.offset is None else tuple(index.offset)
        places.setdefault(index.fqn, {})[offset] = Place(stored.relative_path, stored.offset, stored.length)
    tensors = {
        name: _tensor(name, entry, places.get(name, {}))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return Table(tensors, tuple(place for of_one in places.values() for place in of_one.values()))


def _tensor(name: str, entry: TensorStorageMetadata, places: dict[tuple[int, ...] | None, Place]) -> StoredTensor:
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
            raise ValueError(f"a chunk of {name!r} from {start} on, of shape {sizes}, lies outside of {shape}")
        place = places.get(start, None if any(start) else places.get(None))
        if place is not None:
            chunks.append(Chunk(start, sizes, place))
    return StoredTensor(shape, dtype, tuple(chunks))


def _are_sizes(values: tuple[object, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _set_attributes(unpickler: Any) -> None:
    """Sets attributes of an object that the table has made, never of an allowed class or function."""
    target = type(unpickler.stack[-2])
    if target.__name__ not in _ALLOWED.get(target.__module__, set()):
        raise pickle.UnpicklingError(f"it changes a {target.__name__}")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


class _TableUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python: the one in C allocates as much as a damaged stream asks for."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in _ALLOWED.get(module, set()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    # A bytearray takes the memory that its header states before its data is there; a table has none.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]},
        pickle.BUILD[0]: _set_attributes,
    }
