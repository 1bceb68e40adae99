"""Tensors in files: described without being read, read one at a time, and without running code that the files hold."""

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ttt_video_engine.runtime.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".bin")
INDICES = ("*.safetensors.index.json", "*.bin.index.json")
"""Of shards; where a folder has both kinds they are the same weights twice."""
DISTRIBUTED = ".metadata"
_WRAPPERS = ("state_dict", "model")
_CURE = "fetch the file again"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. `read` gives it, anew with every call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


LazyStateDict = dict[str, LazyTensor]


def open_state(path: Path) -> LazyStateDict:
    """The tensors of a checkpoint by name. What `path` is, is told by its content:

    - a torch distributed checkpoint, a folder with .metadata;
    - shards of safetensors, or of torch.save, a folder with an index;
    - a file of safetensors, or of torch.save (.pt, .bin); or a folder with one such file.

    A state dict may lie at the top or under `state_dict` or `model`. Raises CheckpointError for what is missing, cut
    off or of another kind, and for a pickle that holds anything but tensors and plain values.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: is missing; a checkpoint has transformer/, vae/, text_encoder/ and tokenizer/")
    if not path.is_dir():
        return _open_file(path)
    if (path / DISTRIBUTED).is_file():
        return _open_distributed(path)
    indices = next(filter(None, (sorted(path.glob(pattern)) for pattern in INDICES)), None)
    found = indices or sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"{path}: must hold one {' or '.join(SUFFIXES)} file, or shards with one {INDICES[0]}; has {names}"
        )
    return _open_shards(found[0]) if indices else _open_file(found[0])


def fingerprint(path: Path) -> str:
    """Tells files that may have changed from those that have not, by names, sizes and times: nothing is read."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def lazy_state(tensors: Mapping[str, Tensor]) -> LazyStateDict:
    """Tensors that are in memory already."""
    return {name: LazyTensor(tuple(value.shape), value.dtype, partial(_same, value)) for name, value in tensors.items()}


def _open_file(path: Path) -> LazyStateDict:
    with _reading(path):
        start = path.open("rb").read(9)
        if len(start) == 9 and start[8:] == b"{":  # the length of the header, then its JSON
            return _open_safetensors(path)
    return _open_pickled(path)


def _open_safetensors(path: Path) -> LazyStateDict:
    def read(name: str) -> Tensor:
        with _reading(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        return {
            name: LazyTensor(tuple(part.get_shape()), _SAFETENSORS_DTYPES[part.get_dtype()], partial(read, name))
            for name, part in slices.items()
        }


def _open_shards(index: Path) -> LazyStateDict:
    with _reading(index):
        places = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to files; {_CURE}")
    shards = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} leads out of the folder; {_CURE}")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file}: is missing, {index.name} names it; {_CURE}")
        shards[file] = _open_file(index.parent / file)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file}: has no {name}, {index.name} says it does; {_CURE}")
    return {name: shards[file][name] for name, file in places.items()}


def _open_pickled(path: Path) -> LazyStateDict:
    try:
        # Files from before torch 1.6 are no zip archives, and only those can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); {_CURE}") from error
    except Exception as error:  # pickle's own class is UnpicklingError, but a damaged stream raises almost anything
        raise CheckpointError(f"{path}: is not a plain file of weights ({_first_line(error)})") from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; must be a state dict")
    return {
        name: LazyTensor(tuple(value.shape), value.dtype, partial(_same, value))
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _open_distributed(folder: Path) -> LazyStateDict:
    """Every tensor lies in chunks, each a torch.save of its own somewhere in a file of the folder."""
    metadata = _read_metadata(folder / DISTRIBUTED)
    places: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, place in metadata.storage_data.items():
        places.setdefault(index.fqn, []).append((tuple(index.offset or ()), place))
        if Path(place.relative_path).name != str(place.relative_path):
            raise CheckpointError(f"{folder / DISTRIBUTED}: {place.relative_path!r} leads out of the folder; {_CURE}")
        file = folder / place.relative_path
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, {DISTRIBUTED} names it; {_CURE}")
        if file.stat().st_size < place.offset + place.length:
            raise CheckpointError(f"{file}: is cut off at {file.stat().st_size:,} bytes; {_CURE}")
    tensors = {
        name: LazyTensor(
            tuple(entry.size), entry.properties.dtype, partial(_read_chunks, folder, entry, places.get(name, []))
        )
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for key in _WRAPPERS:
        wrapped = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name.startswith(f"{key}.")}
        tensors = wrapped or tensors
    return tensors


def _read_chunks(folder: Path, entry: TensorStorageMetadata, places: list[tuple[tuple[int, ...], Any]]) -> Tensor:
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    filled = 0
    for offsets, place in places:
        path = folder / place.relative_path
        with _reading(path), path.open("rb") as file:
            file.seek(place.offset)
            chunk = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        region = tuple(slice(start, start + size) for start, size in zip(offsets, chunk.shape, strict=True))
        whole[region] = chunk
        filled += chunk.numel()
    if filled != whole.numel():
        raise CheckpointError(f"{folder}: has {filled:,} of the {whole.numel():,} values of a tensor; {_CURE}")
    return whole


def _read_metadata(path: Path) -> Metadata:
    """The table of a distributed checkpoint. It is a pickle, which torch itself would run: here it may name nothing
    but the classes that such a table is made of."""
    with _reading(path), path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: is not the table of a checkpoint ({_first_line(error)})") from error
        except (AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); {_CURE}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: holds a {type(metadata).__name__}; must be the table of a checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED: ClassVar[dict[str, set[str]]] = {
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
        "torch": {"Size"},  # and dtypes
        "pathlib": {"Path", "PosixPath", "PurePosixPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in self._ALLOWED.get(module, set()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); {_CURE}") from error


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
