"""Attention and its rotary embedding as operators of opset 23: `Attention` and `RotaryEmbedding`.

TensorRT makes one kernel of each `Attention`, or fails. It has no such kernel for float32, so float32 attention is
written as matrix products and a softmax, which any runtime takes.

Shape suffixes: B batch and scenes as one axis, H heads, M tokens of a segment, F head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel

from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.rope import Rotation


@contextmanager
def attention_as_operators(module: nn.Module) -> Iterator[None]:
    """Within the block, the attention of the transformer or of the text encoder in `module` is traced as stated above.

    The text encoder has no rotary embedding. Its bias is the mask of `Attention`.
    """
    blocks = [part for part in module.modules() if isinstance(part, SeqModelingBlock)]
    encoders = [part for part in module.modules() if isinstance(part, T5EncoderModel) and part.dtype == torch.float32]
    before = [encoder.config._attn_implementation for encoder in encoders]
    for block in blocks:
        block._rotated_attention = partial(_rotated_attention, block)  # type: ignore[method-assign]
    for encoder in encoders:
        encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        for block in blocks:
            del block._rotated_attention  # restores the method of the class
        for encoder, implementation in zip(encoders, before, strict=True):
            encoder.set_attn_implementation(implementation)


def _rotated_attention(
    block: SeqModelingBlock, q_BHMF: Tensor, k_BHMF: Tensor, v_BHMF: Tensor, rotation: Rotation
) -> Tensor:
    """As `SeqModelingBlock._rotated_attention`."""
    q, k = (_rotate(x, rotation) for x in (q_BHMF, k_BHMF))
    if q.dtype != torch.float32:
        return functional.scaled_dot_product_attention(q, k, v_BHMF)  # traced as `Attention`
    scale = block.config.head_dim**-0.25  # of each factor, so that neither product grows large
    weights = torch.softmax((q * scale) @ (k * scale).transpose(-1, -2), dim=-1)
    return weights @ v_BHMF


def _rotate(x_BHMF: Tensor, rotation: Rotation) -> Tensor:
    """As `rope.rotate`. Batch and heads are one axis, so that one table is enough for all clips of a batch."""
    cos, sin = (table.to(x_BHMF.dtype)[None] for table in rotation)
    rotated: Tensor = torch.onnx.ops.rotary_embedding(x_BHMF.flatten(0, 1)[None], cos, sin, interleaved=True)
    result: Tensor = rotated[0].unflatten(0, (-1, x_BHMF.shape[1]))
    return result
