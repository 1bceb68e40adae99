"""Opens checkpoints of any supported format as tensors by name, read one at a time. No code in them is run."""

import hashlib
from pathlib import Path

from ttt_video_engine.reference.checkpoints.damage import check_printable, reading
from ttt_video_engine.reference.checkpoints.distributed import TABLE, open_distributed
from ttt_video_engine.reference.checkpoints.shards import open_file, open_shards
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor, lazy_state
from ttt_video_engine.runtime.errors import CheckpointError

__all__ = ["LazyStateDict", "LazyTensor", "fingerprint", "lazy_state", "open_state"]

SUFFIXES = (".safetensors", ".pt", ".bin")
INDICES = ("*.safetensors.index.json", "*.bin.index.json")
"""Patterns of shard indices. A folder that matches both has the same weights twice; the first pattern is used."""


def open_state(path: Path) -> LazyStateDict:
    """The tensors of a checkpoint by name. The format is detected from the content:

    - a torch distributed checkpoint, a folder with .metadata;
    - shards of safetensors or of torch.save, a folder with an index;
    - one file of safetensors or of torch.save (.pt, .bin), or a folder with one such file.

    A state dict may be at the top level, or under `state_dict` or `model`. Raises CheckpointError that names the file
    if a file is missing, damaged, not regular or of another format, or if a pickle holds anything but tensors and plain
    values.
    """
    state = _open(path)
    check_printable(state, path)
    return state


def fingerprint(path: Path) -> str:
    """SHA-256 of the names, sizes and modification times of the files. No file is opened."""
    with reading(path):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _open(path: Path) -> LazyStateDict:
    with reading(path):
        exists, is_folder, has_table = path.exists(), path.is_dir(), (path / TABLE).exists()
    if not exists:
        raise CheckpointError(
            f"{path}: is missing; a checkpoint must have transformer/, vae/, text_encoder/ and tokenizer/"
        )
    if not is_folder:
        return open_file(path)
    if has_table:
        return open_distributed(path)
    with reading(path):
        indices = next(filter(None, (sorted(path.glob(pattern)) for pattern in INDICES)), None)
        found = indices or sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"{path}: must hold one {' or '.join(SUFFIXES)} file, or shards with one {INDICES[0]}; has {names}"
        )
    return open_shards(found[0]) if indices else open_file(found[0])
