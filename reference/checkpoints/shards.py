"""Weight files by their content, one alone or several with an index that says which tensor is in which."""

from pathlib import Path

import msgspec

from ttt_video_engine.reference.checkpoints.damage import CURE, check_printable, reading, regular_size
from ttt_video_engine.reference.checkpoints.safetensors_files import is_safetensors, open_safetensors
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict
from ttt_video_engine.reference.checkpoints.torch_files import open_torch_file
from ttt_video_engine.runtime.errors import CheckpointError

_MOST_INDEX_BYTES = 16 << 20
"""A hundred times the index of the largest text encoder."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_file(path: Path) -> LazyStateDict:
    """The tensors of one file, of safetensors or of torch.save. Raises CheckpointError as both readers do."""
    regular_size(path)
    return open_safetensors(path) if is_safetensors(path) else open_torch_file(path)


def open_shards(index: Path) -> LazyStateDict:
    """The tensors that an index names, from the files beside it.

    Raises CheckpointError for a damaged index, and where a file or one of its tensors is missing.
    """
    places = _read_index(index)
    shards = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} leads out of the folder; {CURE}")
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, {index.name} names it; {CURE}")
        shards[file] = open_file(path)
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file}: has no {name}, {index.name} says it does; {CURE}")
    return {name: shards[file][name] for name, file in places.items()}


def _read_index(index: Path) -> dict[str, str]:
    """Tensor → file name."""
    regular_size(index, at_most=_MOST_INDEX_BYTES)
    with reading(index):
        content = index.read_bytes()
        try:
            places = msgspec.json.decode(content, type=_Index).weight_map
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{index}: has no weight_map of names to files; {CURE}") from error
    check_printable([*places, *places.values()], index)
    return places
