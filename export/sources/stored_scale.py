"""Reads the VAE scale factor from a Hugging Face checkpoint."""

from math import isfinite
from pathlib import Path

import msgspec

from ttt_video_engine.reference.checkpoints.damage import reading, regular_size
from ttt_video_engine.runtime.errors import CheckpointError

_MAX_BYTES = 1 << 20


class _VaeFile(msgspec.Struct):
    scaling_factor: float | None = None


def stored_scale_factor(folder: Path) -> float | None:
    """The `scaling_factor` of `config.json` in a VAE's folder: 0.7 for CogVideoX-5B, 1.15258426 for 2B.

    None if the file is missing, as with the original 3d-vae.pt, or has no factor. Raises CheckpointError unless it
    is a regular JSON file of at most 1 MiB that holds an object, and the factor is positive and finite.
    """
    path = folder / "config.json"
    with reading(path):
        exists = path.exists()
    if not exists:
        return None
    regular_size(path, at_most=_MAX_BYTES)
    with reading(path):
        factor = msgspec.json.decode(path.read_bytes(), type=_VaeFile).scaling_factor
    if factor is not None and not (isfinite(factor) and factor > 0):
        raise CheckpointError(f"{path}: scaling_factor is {factor}: must be a positive number; fetch the file again")
    return factor
