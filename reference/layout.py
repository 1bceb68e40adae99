"""Where the tokens of a clip stand: text scene by scene, then video patches in (t, y, x) order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_video_engine.reference.rope import rotary_angles
from ttt_video_engine.runtime.config import TransformerConfig


@dataclass(frozen=True)
class TokenLayout:
    """Sizes and static index tables of one clip; `height` and `width` count patches.

    Index tables say for each place of a new order which token of the standard order stands there.
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

    def segment_frames(self) -> Tensor:
        """[S, frames of a segment]: the latent frames each scene attends to; neighbours share the prefix frames."""
        starts = torch.arange(self.num_scenes) * self.config.attn_length
        return starts[:, None] + torch.arange(self.config.attn_length + self.config.prefix_temporal_length)

    def segment_angles(self) -> Tensor:
        """Rotary angles of one attention segment, zero (no rotation) for its text: [tokens of a segment, d/2]."""
        num_frames = self.config.attn_length + self.config.prefix_temporal_length
        return self._angles(self.text_length, num_frames)

    def clip_angles(self) -> Tensor:
        """Rotary angles of the whole clip, zero for its text: [L, d/2]."""
        return self._angles(self.num_text_tokens, self.num_frames)

    def reversed_order(self) -> Tensor:
        """[L]: scenes of text back to front, each still read forwards; video tokens back to front one by one."""
        text = torch.arange(self.num_text_tokens).view(self.num_scenes, self.text_length).flip(0).flatten()
        video = torch.arange(self.num_text_tokens, self.num_tokens).flip(0)
        return torch.cat([text, video])

    def interleaved_order(self) -> Tensor:
        """[L]: text of scene 0, its video, text of scene 1, its video, … The first scene also has the prefix frames."""
        prefix = self.config.prefix_temporal_length * self.tokens_per_frame
        text = torch.arange(self.num_text_tokens).view(self.num_scenes, self.text_length)
        video = torch.arange(self.num_text_tokens, self.num_tokens)
        rest = video[prefix:].view(self.num_scenes, -1)
        first = torch.cat([text[0], video[:prefix], rest[0]])
        return torch.cat([first, torch.cat([text, rest], dim=1)[1:].flatten()])

    def _angles(self, num_text_tokens: int, num_frames: int) -> Tensor:
        config = self.config
        video = rotary_angles(num_frames, self.height, self.width, config.head_dim, config.rope_theta)
        return torch.cat([torch.zeros(num_text_tokens, config.head_dim // 2), video])
