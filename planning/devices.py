"""What one video over several devices needs: bytes between them, memory of each, time of a step.

The exchanges are those of `export/graphs/shard.py`; tests compare their bytes with those that processes count.
"""

from ttt_video_engine.runtime.config import ClipSize, TransformerConfig
from ttt_video_engine.runtime.dtypes import ITEM_BYTES, DType

FLOAT32 = 4


def bytes_sent(config: TransformerConfig, size: ClipSize, devices: int, dtype: DType) -> int:
    """What each device sends to the others in one pass of one clip.

    Per layer and token of its own: q, k and v of attention and its output; in each direction of TTT, q, k, v, the
    logits of the learning rates, and the output. Of these, (N − 1)/N are for others. At last, all get the velocity of
    its tokens, in float32.
    """
    tokens = size.num_tokens(config.patch_size) // devices
    values = 4 * config.model_dim
    if config.ttt_kind is not None:
        values += 2 * (4 * config.model_dim + config.num_heads)
    layers = tokens * config.num_layers * values * ITEM_BYTES[dtype] // devices
    velocity = tokens * config.out_channels * config.patch_size**2 * FLOAT32
    return (devices - 1) * (layers + velocity)
