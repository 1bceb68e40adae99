"""Opens a single file of weights, or shards with an index that maps each tensor to its file."""

from pathlib import Path

import msgspec

from ttt_video_engine.reference.checkpoints.damage import FETCH_AGAIN, check_printable, reading, regular_size
from ttt_video_engine.reference.checkpoints.safetensors_files import is_safetensors, open_safetensors
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict
from ttt_video_engine.reference.checkpoints.torch_files import open_torch_file
from ttt_video_engine.runtime.errors import CheckpointError

_MAX_INDEX_BYTES = 16 << 20
"""A hundred times the size of the largest text encoder's index."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_file(path: Path) -> LazyStateDict:
    """The tensors of one safetensors or torch.save file. Raises CheckpointError if it is damaged or not regular."""
    regular_size(path)
    return open_safetensors(path) if is_safetensors(path) else open_torch_file(path)


def open_shards(index: Path) -> LazyStateDict:
    """The tensors that an index lists, from the files beside it.

    Raises CheckpointError for a damaged index, and if a file or one of its tensors is missing.
    """
    file_names = _read_index(index)
    shards = {}
    for file in sorted(set(file_names.values())):
        path = index.parent / file
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} leads out of the folder; {FETCH_AGAIN}")
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, but {index.name} lists it; {FETCH_AGAIN}")
        shards[file] = open_file(path)
    for name, file in file_names.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file}: has no {name}, but {index.name} lists it; {FETCH_AGAIN}")
    return {name: shards[file][name] for name, file in file_names.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Tensor → file name."""
    regular_size(index, at_most=_MAX_INDEX_BYTES)
    with reading(index):
        content = index.read_bytes()
        try:
            file_names = msgspec.json.decode(content, type=_Index).weight_map
        except msgspec.ValidationError as error:
            raise CheckpointError(
                f"{index}: has no weight_map from tensor names to file names; {FETCH_AGAIN}"
            ) from error
    check_printable([*file_names, *file_names.values()], index)
    return file_names
