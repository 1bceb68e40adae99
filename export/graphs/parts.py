"""The layers of a transformer in parts, one after the other, so that an engine needs less scratch memory.

Attention has groups of scenes. The MLP, with all between it and TTT, has the text and parts of the video. TensorRT
would join equal steps of parts that do not depend on each other, and then hold what all parts need at the same time.
So each part is made to depend on the one before (`order.py`). A part computes what the reference computes for its
tokens.

Shape suffixes as in `reference/attention.py`, with G scenes of a group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ttt_video_engine.export.graphs.order import after
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.transformer import Modulation, TransformerLayer

PARTS = 7
"""Groups of scenes, at most, and parts of the video. At 63 s, 7 instead of 3 lower the peak by a twentieth."""


@contextmanager
def layers_in_parts(module: nn.Module) -> Iterator[None]:
    """Within the block, each transformer layer of `module` in half precision is traced in parts.

    Those in float32 are for CPUs, whose runtime keeps no more than it needs for one operator after the other.
    """
    groups: dict[int, TokenLayout] = {}
    layers = [part for part in module.modules() if isinstance(part, TransformerLayer)]
    layers = [layer for layer in layers if layer.mlp.layer1.weight.dtype != torch.float32]
    for layer in layers:
        layer.forward = partial(_forward, layer, groups)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # restores the method of the class


def _forward(
    layer: TransformerLayer, groups: dict[int, TokenLayout], x_BLD: Tensor, t_emb: Tensor, layout: TokenLayout
) -> Tensor:
    """As `TransformerLayer.forward`. `groups` has the layout of each number of scenes, which all layers share."""
    block = layer.seq_modeling_block
    before = Modulation(layer.pre_seq_adaLN_modulation(t_emb), layout.num_text_tokens)
    behind = Modulation(layer.pre_mlp_adaLN_modulation(t_emb), layout.num_text_tokens)
    mixed = _attended(layer, groups, x_BLD, before, layout)
    if block.config.ttt_kind:
        mixed = block._test_time_training(mixed, layout)
    outputs: list[Tensor] = []
    for start, end in _token_ranges(layout):
        is_text = end <= layout.num_text_tokens
        gate = before.text_gate if is_text else before.video_gate
        x = x_BLD[:, start:end] + after(gate, outputs[-1] if outputs else None) * mixed[:, start:end]
        normed = _modulated(layer.pre_mlp_layernorm(x), behind, is_text=is_text)
        outputs.append(x + (behind.text_gate if is_text else behind.video_gate) * layer.mlp(normed))
    return torch.cat(outputs, dim=1)


def _modulated(normed: Tensor, modulation: Modulation, *, is_text: bool) -> Tensor:
    """As `Modulation.shift_and_scale`, of tokens of one kind."""
    if is_text:
        return normed * (1 + modulation.text_scale) + modulation.text_shift
    return normed * (1 + modulation.video_scale) + modulation.video_shift


def _token_ranges(layout: TokenLayout) -> list[tuple[int, int]]:
    """The text, and the video in parts."""
    first, last = layout.num_text_tokens, layout.num_tokens
    size = -(-(last - first) // PARTS)
    return [(0, first), *((start, min(start + size, last)) for start in range(first, last, size))]


def _attended(
    layer: TransformerLayer, groups: dict[int, TokenLayout], x_BLD: Tensor, modulation: Modulation, layout: TokenLayout
) -> Tensor:
    """The local attention of normalised and modulated tokens, [B, L, D], group by group.

    The last frames of a group are the first of the next, and averaged, as within a group.
    """
    block, patches = layer.seq_modeling_block, layout.tokens_per_frame
    shared = block.config.prefix_temporal_length * patches
    text, video = block._split(x_BLD, layout)
    texts: list[Tensor] = []
    videos: list[Tensor] = []
    outputs: list[Tensor] = []
    size = -(-layout.num_scenes // PARTS)
    for first in range(0, layout.num_scenes, size):
        count = min(size, layout.num_scenes - first)
        group = groups.setdefault(count, replace(layout, num_scenes=count, num_frames=_num_frames(block, count)))
        start = first * block.config.attn_length * patches
        own_text = text[:, first * group.text_length :][:, : group.num_text_tokens]
        own_video = video[:, start : start + group.num_frames * patches]
        before = outputs[-1] if outputs else None
        own_text, own_video = (
            # Before the norm: TensorRT would keep the centred tokens of all groups, in float32.
            _modulated(layer.pre_seq_layernorm(after(tokens, before)), modulation, is_text=is_text)
            for tokens, is_text in ((own_text, True), (own_video, False))
        )
        outputs.append(block._local_attention(torch.cat([own_text, own_video], dim=1), group))
        own_text, own_video = block._split(outputs[-1], group)
        texts.append(own_text)
        if videos:
            videos.append((videos.pop() + own_video[:, :shared]) / 2)
            own_video = own_video[:, shared:]
        videos += own_video.split([own_video.shape[1] - shared, shared], dim=1)
    return torch.cat([*texts, *videos], dim=1)


def _num_frames(block: SeqModelingBlock, num_scenes: int) -> int:
    return block.config.attn_length * num_scenes + block.config.prefix_temporal_length
