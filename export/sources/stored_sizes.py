"""What a checkpoint holds, from its metadata: no weight is read."""

from math import prod
from pathlib import Path

from ttt_video_engine.planning.fit import Stored
from ttt_video_engine.reference.checkpoints.lazy import open_state

_FOLDERS = {"text_encoder": "text_encoder", "transformer": "transformer", "vae_decoder": "vae"}


def stored_sizes(folder: Path) -> dict[str, Stored]:
    """Component → all that is stored for it, more than its own part included (such as the VAE's encoder).

    Raises CheckpointError for what is missing or cannot be read.
    """
    sizes = {}
    for component, name in _FOLDERS.items():
        counts = [(prod(tensor.shape), tensor.dtype.itemsize) for tensor in open_state(folder / name).values()]
        sizes[component] = Stored(sum(n for n, _ in counts), sum(n * size for n, size in counts))
    return sizes
