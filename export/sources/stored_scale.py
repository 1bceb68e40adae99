"""The VAE scale factor that a checkpoint of Hugging Face states."""

from math import isfinite
from pathlib import Path

import msgspec

from ttt_video_engine.reference.checkpoints.damage import reading, regular_size
from ttt_video_engine.runtime.errors import CheckpointError

_MOST_BYTES = 1 << 20


class _VaeFile(msgspec.Struct):
    scaling_factor: float | None = None


def stored_scale_factor(folder: Path) -> float | None:
    """The `scaling_factor` of `config.json` in a VAE's folder: 0.7 for CogVideoX-5B, 1.15258426 for 2B.

    None where there is no such file, as beside the original 3d-vae.pt, or it states none. Raises CheckpointError for
    anything but a regular JSON file of at most 1 MiB with an object, and for a factor that is not positive and finite.
    """
    path = folder / "config.json"
    with reading(path):
        exists = path.exists()
    if not exists:
        return None
    regular_size(path, at_most=_MOST_BYTES)
    with reading(path):
        factor = msgspec.json.decode(path.read_bytes(), type=_VaeFile).scaling_factor
    if factor is not None and not (isfinite(factor) and factor > 0):
        raise CheckpointError(f"{path}: scaling_factor is {factor}: must be a positive number; fetch the file again")
    return factor
