"""Sizes of a checkpoint. Reads the shapes and dtypes of its tensors, not their values."""

from math import prod
from pathlib import Path

from ttt_video_engine.planning.fit import Stored
from ttt_video_engine.reference.checkpoints.lazy import open_state

_FOLDERS = {"text_encoder": "text_encoder", "transformer": "transformer", "vae_decoder": "vae"}


def stored_sizes(folder: Path) -> dict[str, Stored]:
    """Component → parameters and bytes in its folder, including weights that an export skips (the VAE's encoder).

    Raises CheckpointError for a component that is missing or damaged.
    """
    sizes = {}
    for component, name in _FOLDERS.items():
        counts = [(prod(tensor.shape), tensor.dtype.itemsize) for tensor in open_state(folder / name).values()]
        sizes[component] = Stored(sum(n for n, _ in counts), sum(n * size for n, size in counts))
    return sizes
