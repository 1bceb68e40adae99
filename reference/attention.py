"""Sequence modelling: attention within each segment, then TTT, where there is any, over the clip in both directions.

Shape suffixes: B batch, S scenes, N text tokens of a scene, M tokens of a segment, L tokens of the clip, D model
dimension, H heads, F head dimension, T frames, P patches of a frame.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.rope import Rotation, rotate
from ttt_video_engine.reference.ttt_layer import SSMGating, TTTWrapper
from ttt_video_engine.runtime.config import TransformerConfig


class SeqModelingBlock(nn.Module):
    """Tokens [B, L, D] → [B, L, D] in the order of `layout` (arXiv 2504.05298, section 3).

    a = attention(x); y = a + gate · TTT(a); result y + gate · reversed(TTT(reversed(y))). Both directions share one TTT
    layer; each has its gates, one for text and one for video. Without TTT, the result is a.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(config.head_dim, eps=config.head_norm_eps) for _ in range(2))
        if config.ttt_kind:
            self.ssm = TTTWrapper(config.ttt_kind, config)
            self.forward_ssm_gating_text, self.forward_ssm_gating_video = SSMGating(dim), SSMGating(dim)
            self.backward_ssm_gating_text, self.backward_ssm_gating_video = SSMGating(dim), SSMGating(dim)

    def forward(self, x_BLD: Tensor, layout: TokenLayout) -> Tensor:
        attended = self._local_attention(x_BLD, layout)
        return self._test_time_training(attended, layout) if self.config.ttt_kind else attended

    def _test_time_training(self, attended: Tensor, layout: TokenLayout) -> Tensor:
        """Both directions of TTT over the clip, each gated and added to what it read."""
        text, video = self._split(self.ssm(attended, layout), layout)
        out = attended + torch.cat([self.forward_ssm_gating_text(text), self.forward_ssm_gating_video(video)], dim=1)

        order = layout.reversed_order  # its own inverse
        backward = self.ssm(out.index_select(1, order), layout).index_select(1, order)
        text, video = self._split(backward, layout)
        return out + torch.cat([self.backward_ssm_gating_text(text), self.backward_ssm_gating_video(video)], dim=1)

    def _local_attention(self, x_BLD: Tensor, layout: TokenLayout) -> Tensor:
        """Full attention within each scene's text and frames; frames that two segments share are averaged."""
        text, video = self._split(x_BLD, layout)
        text_BSND = text.unflatten(1, (layout.num_scenes, layout.text_length))
        video_BTPD = video.unflatten(1, (layout.num_frames, layout.tokens_per_frame))
        frames = layout.segment_frames  # [S, T of a segment]
        segments_BSTPD = video_BTPD.index_select(1, frames.flatten()).unflatten(1, frames.shape)
        out_BSMD = self._attention(torch.cat([text_BSND, segments_BSTPD.flatten(2, 3)], dim=2), layout)

        text = out_BSMD[:, :, : layout.text_length].flatten(1, 2)  # [B, S·N, D]
        segments_BSTPD = out_BSMD[:, :, layout.text_length :].unflatten(2, (-1, layout.tokens_per_frame))
        return torch.cat([text, self._merge_segments(segments_BSTPD)], dim=1)

    def _attention(self, x_BSMD: Tensor, layout: TokenLayout) -> Tensor:
        """Softmax attention over M within each segment; rotary positions restart in each."""
        x_SMD = x_BSMD.flatten(0, 1)  # batch and scenes as one axis, [B·S, M, D]
        q, k, v = (
            project(x_SMD).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)  # [B·S, H, M, F]
            for project in (self.q, self.k, self.v)
        )
        out = self._rotated_attention(self.q_norm(q), self.k_norm(k), v, layout.segment_rotation)
        # Heads behind tokens again, merged into D; then the scenes become an axis of their own.
        return self.o(out.transpose(1, 2).flatten(2)).unflatten(0, (-1, layout.num_scenes))

    def _rotated_attention(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Softmax attention [B·S, H, M, F] of queries and keys that are not rotated yet."""
        return functional.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)

    def _merge_segments(self, segments_BSTPD: Tensor) -> Tensor:
        """Joins the segments into frames [B, T·P, D]; frames that two segments share are averaged."""
        prefix = self.config.prefix_temporal_length
        head, body = segments_BSTPD[:, :, :prefix], segments_BSTPD[:, :, prefix : self.config.attn_length]
        tail = segments_BSTPD[:, :, self.config.attn_length :]
        shared = (head[:, 1:] + tail[:, :-1]) / 2
        frames = torch.cat([torch.cat([head[:, :1], shared], dim=1), body], dim=2).flatten(1, 2)
        return torch.cat([frames, tail[:, -1]], dim=1).flatten(1, 2)

    def _split(self, x_BLD: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Text [B, S·N, D] and video [B, T·P, D]."""
        return x_BLD[:, : layout.num_text_tokens], x_BLD[:, layout.num_text_tokens :]
