"""The transformer over N devices: each has a part of the tokens, and of the heads while the scan and attention run.

All but these work token by token. So a device keeps L/N tokens of the interleaved order, in which every scan reads the
clip, and exchanges them for its heads of all tokens and back: all-to-all, as DeepSpeed-Ulysses (arXiv 2309.14509). A
frame that two segments share needs no care then. Weights are whole on each device. All devices run one graph, which
takes the number of the device as an input.

Shape suffixes: B batch, L tokens of the clip, l those of a device, D model dimension, c channels of a device's heads, S
scenes, M tokens of a segment, H heads of a device, F head dimension, N devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.export.graphs.projections_op import projections, scan_node, scan_order
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.transformer import (
    DiffusionTransformer,
    Modulation,
    TransformerLayer,
    timestep_embedding,
    token_layout,
)
from ttt_video_engine.reference.ttt_layer import TTTLayer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import COLLECTIVE, DOMAIN, PROJECTIONS_VERSION


class ShardedTransformerGraph(nn.Module):
    """As `TransformerGraph`, on one of N devices: rank [1] int64, from 0. Each gives the whole velocity."""

    def __init__(self, transformer: DiffusionTransformer, devices: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.devices = devices

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, rank: Tensor) -> Tensor:
        model = self.transformer
        dtype = model.transformer_norm.weight.dtype
        shard = Shard(token_layout(model.config, latents, text), self.devices, rank)
        t_emb = model.time_embed(timestep_embedding(timestep, model.config.model_dim).to(dtype))
        x_BlD = _embedded(model, latents.to(dtype), text.to(dtype), shard)
        for layer in model.layers:
            x_BlD = layer(x_BlD, t_emb, shard)
        patches = model.final_layer.patches(model.transformer_norm(x_BlD), t_emb).float()
        return model.final_layer.unpatchify(shard.gathered_video(patches), shard.layout)


@dataclass(frozen=True)
class Shard:
    """The tokens and heads of one device. Tensors are computed once and shared by all layers."""

    layout: TokenLayout
    devices: int
    rank: Tensor

    @cached_property
    def tokens(self) -> Tensor:
        """[l]: the device's tokens, as numbers of the standard order."""
        size = self.layout.num_tokens // self.devices
        return self.layout.interleaved_order.index_select(0, self.rank * size + torch.arange(size))

    @cached_property
    def heads(self) -> Tensor:
        """[H]: the device's heads."""
        size = self.layout.config.num_heads // self.devices
        return self.rank * size + torch.arange(size)

    @cached_property
    def is_text(self) -> Tensor:
        """[l, 1]"""
        return (self.tokens < self.layout.num_text_tokens)[:, None]

    @cached_property
    def places(self) -> Tensor:
        """[L]: the place in the interleaved order of each token of the standard order."""
        return self.layout.standard_order

    @cached_property
    def segments(self) -> Tensor:
        """[S, M]: the places of the tokens of each segment, text first."""
        layout = self.layout
        text = torch.arange(layout.num_text_tokens).view(layout.num_scenes, -1)
        patches = torch.arange(layout.tokens_per_frame)
        video = layout.num_text_tokens + layout.segment_frames[..., None] * layout.tokens_per_frame + patches
        return self.places[torch.cat([text, video.flatten(1)], dim=1)]

    @cached_property
    def occurrences(self) -> tuple[Tensor, Tensor]:
        """[L] each: where the tokens are, first and last, among those of all segments, one after the other."""
        layout, config = self.layout, self.layout.config
        text = torch.arange(layout.num_scenes)[:, None] * self.segments.shape[1] + torch.arange(layout.text_length)
        frames, patches = torch.arange(layout.num_frames), torch.arange(layout.tokens_per_frame)

        def listed(segments: Tensor) -> Tensor:
            in_segment = frames - segments * config.attn_length
            starts = segments * self.segments.shape[1] + layout.text_length + in_segment * layout.tokens_per_frame
            return torch.cat([text.flatten(), (starts[:, None] + patches).flatten()])[layout.interleaved_order]

        first = ((frames - config.prefix_temporal_length) // config.attn_length).clamp(min=0)
        return listed(first), listed((frames // config.attn_length).clamp(max=layout.num_scenes - 1))

    def pick(self, video: Tensor, text: Tensor) -> Tensor:
        """For each of the device's tokens, that of its kind: [B, 1, D] or [B, l, D] → [B, l, D]."""
        return torch.where(self.is_text, text, video)

    def to_heads(self, x_BlD: Tensor) -> Tensor:
        """All channels of the device's tokens → the channels of its heads of all tokens, [B, L, c]."""
        blocks = x_BlD.unflatten(-1, (self.devices, -1)).permute(2, 0, 1, 3)
        return _all_to_all(blocks, self.devices).transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x_BLc: Tensor) -> Tensor:
        """The inverse of `to_heads`, [B, l, D]."""
        blocks = x_BLc.unflatten(1, (self.devices, -1)).transpose(0, 1)
        return _all_to_all(blocks, self.devices).permute(1, 2, 0, 3).flatten(2)

    def gathered_video(self, x_BlC: Tensor) -> Tensor:
        """What all devices have of the video, in the standard order, [B, video tokens, C]."""
        blocks = x_BlC.expand(self.devices, *x_BlC.shape)
        x_BLC = _all_to_all(blocks, self.devices).transpose(0, 1).flatten(1, 2)
        return x_BLC.index_select(1, self.places[self.layout.num_text_tokens :])


@contextmanager
def sharded_layers(module: nn.Module, kind: TTTKind | None) -> Iterator[None]:
    """Within the block, the layers of `module` take a `Shard` in place of a `TokenLayout`."""
    layers = [part for part in module.modules() if isinstance(part, TransformerLayer)]
    for layer in layers:
        layer.forward = partial(_forward, layer, kind)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # restores the method of the class


def _embedded(model: DiffusionTransformer, latents: Tensor, text: Tensor, shard: Shard) -> Tensor:
    """As `PatchEmbedding`, of the device's tokens alone, [B, l, D]."""
    embedding, layout, size = model.patch_embedding, shard.layout, model.config.patch_size
    grid = latents.unflatten(4, (layout.width, size)).unflatten(
        3, (layout.height, size)
    )  # [B, T, channels, y, ·, x, ·]
    patches = grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
    own = patches.index_select(1, (shard.tokens - layout.num_text_tokens).clamp(min=0))
    video = functional.linear(own, embedding.vid_proj.weight.flatten(1), embedding.vid_proj.bias)
    all_text = embedding.text_proj(text).flatten(1, 2)
    return shard.pick(video, all_text.index_select(1, shard.tokens.clamp(max=layout.num_text_tokens - 1)))


def _forward(layer: TransformerLayer, kind: TTTKind | None, x_BlD: Tensor, t_emb: Tensor, shard: Shard) -> Tensor:
    """As `TransformerLayer.forward`."""
    block, texts = layer.seq_modeling_block, shard.layout.num_text_tokens
    modulation = Modulation(layer.pre_seq_adaLN_modulation(t_emb), texts)
    mixed = _attention(block, _modulated(layer.pre_seq_layernorm(x_BlD), modulation, shard), shard)
    if kind is not None:
        mixed = _test_time_training(block, kind, mixed, shard)
    x_BlD = x_BlD + shard.pick(modulation.video_gate, modulation.text_gate) * mixed

    modulation = Modulation(layer.pre_mlp_adaLN_modulation(t_emb), texts)
    hidden = layer.mlp(_modulated(layer.pre_mlp_layernorm(x_BlD), modulation, shard))
    result: Tensor = x_BlD + shard.pick(modulation.video_gate, modulation.text_gate) * hidden
    return result


def _modulated(normed: Tensor, modulation: Modulation, shard: Shard) -> Tensor:
    scale = shard.pick(1 + modulation.video_scale, 1 + modulation.text_scale)
    return normed * scale + shard.pick(modulation.video_shift, modulation.text_shift)


def _attention(block: SeqModelingBlock, x_BlD: Tensor, shard: Shard) -> Tensor:
    """As `SeqModelingBlock._local_attention`, by heads. Frames that two segments share are averaged before `o`."""
    scenes, head_dim = shard.layout.num_scenes, block.config.head_dim

    def in_segments(x_BLc: Tensor) -> Tensor:
        x_BSMc = x_BLc.index_select(1, shard.segments.flatten()).unflatten(1, shard.segments.shape)
        x_SMHF: Tensor = x_BSMc.flatten(0, 1).unflatten(-1, (-1, head_dim))  # batch and scenes as one axis
        return x_SMHF.transpose(1, 2)

    q, k, v = (in_segments(shard.to_heads(project(x_BlD))) for project in (block.q, block.k, block.v))
    out = block._rotated_attention(block.q_norm(q), block.k_norm(k), v, shard.layout.segment_rotation)
    listed = out.transpose(1, 2).flatten(2).unflatten(0, (-1, scenes)).flatten(1, 2)  # [B, S·M, c]
    first, last = (listed.index_select(1, table) for table in shard.occurrences)
    result: Tensor = block.o(shard.to_tokens((first + last) / 2))
    return result


def _test_time_training(block: SeqModelingBlock, kind: TTTKind, attended: Tensor, shard: Shard) -> Tensor:
    """As `SeqModelingBlock._test_time_training`, each scan by heads."""
    layer: TTTLayer = block.ssm.ttt
    out = attended
    weights = [weight.index_select(0, shard.heads) for weight in (*layer.norms(), *layer.inner_weights())]
    for backward in (False, True):
        order = scan_order(shard.layout, block.config.mini_batch_size, backward=backward)
        order = replace(order, tokens=_at(shard.places, order.tokens), rate_tokens=_at(shard.places, order.rate_tokens))
        projected = [shard.to_heads(x_BlD) for x_BlD in projections(layer, out)]
        result = layer.wo(layer.post_norm(shard.to_tokens(scan_node(kind, layer.config, projected, order, weights))))
        gate_text = block.backward_ssm_gating_text if backward else block.forward_ssm_gating_text
        gate_video = block.backward_ssm_gating_video if backward else block.forward_ssm_gating_video
        # Not the product of the picked gate: TensorRT-RTX 1.7 crashes when it builds that.
        out = out + shard.pick(gate_video(result), gate_text(result))
    return out


def _at(places: Tensor, tokens: Tensor) -> Tensor:
    return places[tokens.long()].int()


def _all_to_all(blocks: Tensor, devices: int) -> Tensor:
    """Block i of the first axis goes to device i; block i of the result came from it."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{COLLECTIVE}",
        (blocks,),
        {
            "collective_operation": "all_to_all",
            "reduce_op": "none",
            "root": -1,
            "nb_rank": devices,
            "group_size": 0,
        },
        dtype=blocks.dtype,
        shape=blocks.shape,
        version=PROJECTIONS_VERSION,
    )
    return result
