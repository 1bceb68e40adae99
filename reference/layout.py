"""The order of a clip's tokens: text scene by scene, then video patches in (t, y, x) order."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ttt_video_engine.reference.rope import Rotation, rotary_angles
from ttt_video_engine.runtime.config import TransformerConfig


@dataclass(frozen=True)
class TokenLayout:
    """Sizes and index tables of one clip; `height` and `width` count patches.

    A table [L] maps each position of a new order to a token of the standard order: `x.index_select(1, table)` reorders
    x. Tables are computed once and shared by all layers.
    """

    config: TransformerConfig
    num_scenes: int
    text_length: int
    num_frames: int
    height: int
    width: int

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def num_text_tokens(self) -> int:
        return self.num_scenes * self.text_length

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_frames * self.tokens_per_frame

    @cached_property
    def segment_frames(self) -> Tensor:
        """[S, frames of a segment]: the latent frames of each segment; neighbours share the prefix frames."""
        starts = torch.arange(self.num_scenes) * self.config.attn_length
        return starts[:, None] + torch.arange(self.config.attn_length + self.config.prefix_temporal_length)

    @cached_property
    def segment_rotation(self) -> Rotation:
        """Rotary embedding of one attention segment; text tokens are not rotated."""
        num_frames = self.config.attn_length + self.config.prefix_temporal_length
        return self._rotation(self.text_length, num_frames)

    @cached_property
    def clip_rotation(self) -> Rotation:
        """Rotary embedding of the whole clip; text tokens are not rotated."""
        return self._rotation(self.num_text_tokens, self.num_frames)

    @cached_property
    def reversed_order(self) -> Tensor:
        """[L]: text scenes in reverse order, the tokens of each forwards; video tokens in reverse order.

        The table is its own inverse.
        """
        text = torch.arange(self.num_text_tokens).view(self.num_scenes, self.text_length).flip(0).flatten()
        video = torch.arange(self.num_text_tokens, self.num_tokens).flip(0)
        return torch.cat([text, video])

    @cached_property
    def interleaved_order(self) -> Tensor:
        """[L]: text of scene 0, its video, text of scene 1, its video, … The first video has the prefix frames."""
        text, prefix, rest = self._scenes(torch.arange(self.num_tokens))
        later_scenes = torch.cat([text[1:], rest[1:]], dim=1).flatten()
        return torch.cat([text[0], prefix, rest[0], later_scenes])

    @cached_property
    def standard_order(self) -> Tensor:
        """[L]: the inverse of `interleaved_order`."""
        first = self.text_length + self._num_prefix_tokens + self._num_scene_tokens
        places = torch.arange(self.num_tokens)
        text, prefix, rest = places[:first].split([self.text_length, self._num_prefix_tokens, self._num_scene_tokens])
        later_scenes = places[first:].view(self.num_scenes - 1, self.text_length + self._num_scene_tokens)
        later_text, later_rest = later_scenes.split([self.text_length, self._num_scene_tokens], dim=1)
        return torch.cat([text, later_text.flatten(), prefix, rest, later_rest.flatten()])

    @property
    def _num_prefix_tokens(self) -> int:
        return self.config.prefix_temporal_length * self.tokens_per_frame

    @property
    def _num_scene_tokens(self) -> int:
        return self.config.attn_length * self.tokens_per_frame

    def _scenes(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits [L] in standard order: text [S, ·], the prefix frames [·], the other video tokens [S, ·]."""
        sizes = [self.num_text_tokens, self._num_prefix_tokens, self.num_scenes * self._num_scene_tokens]
        text, prefix, rest = tokens.split(sizes)
        return text.view(self.num_scenes, -1), prefix, rest.view(self.num_scenes, -1)

    def _rotation(self, num_text_tokens: int, num_frames: int) -> Rotation:
        config = self.config
        grid = config.rope_grid or None
        video = rotary_angles(num_frames, self.height, self.width, config.head_dim, config.rope_theta, grid)
        angles = torch.cat([torch.zeros(num_text_tokens, config.head_dim // 2), video])
        return angles.cos(), angles.sin()
