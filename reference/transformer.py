"""The diffusion transformer of TTT-Video: CogVideoX-5B with TTT layers (arXiv 2504.05298), or without.

Parameter names are those of the public code's checkpoints, without their `dit.` prefix.
Shape suffixes: B batch, T latent frames, S scenes, L tokens of the clip, D model dimension.
"""

import math

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.runtime.config import TransformerConfig


class DiffusionTransformer(nn.Module):
    """velocity = f(video, text, timestep).

    video [B, T, channels, height, width], text [B, S, tokens, text_dim], timestep [B] → velocity like video.
    T must be attn_length·S + prefix_temporal_length, and the tokens of the clip a multiple of mini_batch_size.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_dim, config.time_embed_dim),
            nn.SiLU(),
            nn.Linear(config.time_embed_dim, config.time_embed_dim),
        )
        self.patch_embedding = PatchEmbedding(config)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.transformer_norm = nn.LayerNorm(config.model_dim, eps=config.layer_norm_eps)
        self.final_layer = FinalLayer(config)

    def forward(self, video: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        layout = token_layout(self.config, video, text)
        t_emb = self.time_embed(timestep_embedding(timestep, self.config.model_dim).to(video.dtype))
        x_BLD = self.patch_embedding(video, text)
        for layer in self.layers:
            x_BLD = layer(x_BLD, t_emb, layout)
        x_BLD = self.transformer_norm(x_BLD)
        return self.final_layer(x_BLD[:, layout.num_text_tokens :], t_emb, layout)


def token_layout(config: TransformerConfig, video: Tensor, text: Tensor) -> TokenLayout:
    """The token order of a clip with these inputs. Raises ValueError for sizes that the model cannot take."""
    (_, num_frames, _, height, width), (_, num_scenes, text_length, _) = video.shape, text.shape
    if num_frames != config.attn_length * num_scenes + config.prefix_temporal_length:
        raise ValueError(f"{num_frames} latent frames do not make {num_scenes} segments of {config.attn_length}")
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(f"latent of {height}x{width} does not divide into patches of {config.patch_size}")
    layout = TokenLayout(
        config=config,
        num_scenes=num_scenes,
        text_length=text_length,
        num_frames=num_frames,
        height=height // config.patch_size,
        width=width // config.patch_size,
    )
    if layout.num_tokens % config.mini_batch_size:
        raise ValueError(f"{layout.num_tokens} tokens are no multiple of mini_batch_size {config.mini_batch_size}")
    return layout


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids [B, dim] of timestep [B], cosines first: frequency i is 10000^(−i/(dim/2)). In float32."""
    half = dim // 2
    # The exponent is a float32 as in the public code. Its exp is rounded from float64: vector units disagree on the
    # last bit of a float32 exp, and a timestep of 999 magnifies that to 1e-5 of velocity.
    exponents = -math.log(10000.0) * numpy.arange(half, dtype=numpy.float32) / half
    frequencies = torch.tensor(numpy.exp(exponents.astype(numpy.float64)).tolist(), dtype=torch.float32)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbedding(nn.Module):
    """Text and video as one sequence [B, L, D]: text of all scenes, then patches in (t, y, x) order."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.vid_proj = nn.Conv2d(
            config.in_channels, config.model_dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_proj = nn.Linear(config.text_dim, config.model_dim)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        patches = self.vid_proj(video.flatten(0, 1)).flatten(2).transpose(1, 2)  # [B·T, patches, D]
        video_BLD = patches.unflatten(0, (-1, video.shape[1])).flatten(1, 2)
        text_BLD = self.text_proj(text).flatten(1, 2)
        return torch.cat([text_BLD, video_BLD], dim=1)


class TransformerLayer(nn.Module):
    """Sequence modelling and an MLP, each with a residual. The timestep modulates and gates text and video separately
    (adaLN of CogVideoX, arXiv 2408.06072, section 2.2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.pre_seq_layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.pre_seq_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_embed_dim, 6 * dim))
        self.seq_modeling_block = SeqModelingBlock(config)
        self.pre_mlp_layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.pre_mlp_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_embed_dim, 6 * dim))
        self.mlp = MLP(dim)

    def forward(self, x_BLD: Tensor, t_emb: Tensor, layout: TokenLayout) -> Tensor:
        modulation = Modulation(self.pre_seq_adaLN_modulation(t_emb), layout.num_text_tokens)
        normed = modulation.shift_and_scale(self.pre_seq_layernorm(x_BLD))
        x_BLD = x_BLD + modulation.gate(self.seq_modeling_block(normed, layout))

        modulation = Modulation(self.pre_mlp_adaLN_modulation(t_emb), layout.num_text_tokens)
        normed = modulation.shift_and_scale(self.pre_mlp_layernorm(x_BLD))
        return x_BLD + modulation.gate(self.mlp(normed))


class Modulation:
    """Shift, scale and gate of one block, [B, 1, D] each. `parameters` [B, 6D] holds video's three, then text's."""

    def __init__(self, parameters: Tensor, num_text_tokens: int) -> None:
        self.num_text_tokens = num_text_tokens
        (
            self.video_shift,
            self.video_scale,
            self.video_gate,
            self.text_shift,
            self.text_scale,
            self.text_gate,
        ) = parameters.unsqueeze(1).chunk(6, dim=-1)

    def shift_and_scale(self, x_BLD: Tensor) -> Tensor:
        text, video = self._split(x_BLD)
        return torch.cat(
            [text * (1 + self.text_scale) + self.text_shift, video * (1 + self.video_scale) + self.video_shift], dim=1
        )

    def gate(self, x_BLD: Tensor) -> Tensor:
        text, video = self._split(x_BLD)
        return torch.cat([text * self.text_gate, video * self.video_gate], dim=1)

    def _split(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        return x_BLD[:, : self.num_text_tokens], x_BLD[:, self.num_text_tokens :]


class MLP(nn.Module):
    """Linear D → 4D, GELU (tanh form), linear 4D → D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(dim, 4 * dim)
        self.layer2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(functional.gelu(self.layer1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Video tokens [B, T·patches, D] → velocity [B, T, channels, height, width]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.model_dim, eps=config.layer_norm_eps)
        self.linear = nn.Linear(config.model_dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_embed_dim, 2 * config.model_dim))

    def forward(self, x_BLD: Tensor, t_emb: Tensor, layout: TokenLayout) -> Tensor:
        return self.unpatchify(self.patches(x_BLD, t_emb), layout)

    def patches(self, x_BLD: Tensor, t_emb: Tensor) -> Tensor:
        """The velocity of each token's patch, [B, L, channels·patch²]."""
        shift, scale = self.adaLN_modulation(t_emb).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm(x_BLD) * (1 + scale) + shift)

    def unpatchify(self, patches: Tensor, layout: TokenLayout) -> Tensor:
        """Patches [B, T·patches, channels·patch²] of all video tokens → velocity."""
        channels, patch = self.config.out_channels, self.config.patch_size
        # [B, T, y, x, channels, patch_y, patch_x] → [B, T, channels, y, patch_y, x, patch_x] → rows and columns joined
        grid = patches.view(-1, layout.num_frames, layout.height, layout.width, channels, patch, patch)
        return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
