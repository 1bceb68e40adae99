"""Counts floating-point operations (FLOPs) of matrix products and convolutions: two per multiply-add.

Norms, activations, softmax and rotary embeddings are not counted: they are bound by memory bandwidth.
Tests compare these counts with PyTorch's FLOP counter on the reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ttt_video_engine.runtime.config import ClipSize, ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig

GUIDANCE_BRANCHES = 2
"""Each denoising step runs the transformer on the negative and on the positive prompt."""

_INNER_PRODUCTS = {"linear": 3, "mlp": 7 * 4}
"""Products of a token with an [F, F] weight in one step of the scan. Linear: forward, weight gradient, output. MLP: two
layers forward, one backward (the first layer needs no input gradient), two weight gradients, two for the output; each
is four times as wide."""


@dataclass(frozen=True)
class VideoFlops:
    """FLOPs of one video."""

    text_encoder: int
    transformer_step: int
    vae_decoder: int
    num_steps: int

    @property
    def total(self) -> int:
        return self.text_encoder + self.num_steps * self.transformer_step + self.vae_decoder


def video_flops(model: ModelConfig, length: str, num_steps: int) -> VideoFlops:
    """FLOPs of a video: both branches of guidance, `num_steps` denoising steps, all windows of the decoder."""
    size = model.clip_size(length)
    window = model.vae.temporal_window
    later_windows = (size.num_frames - 1) // window - 1
    first = vae_window_flops(model.vae, window + 1, size.height, size.width)
    following = vae_window_flops(model.vae, window, size.height, size.width)
    return VideoFlops(
        text_encoder=GUIDANCE_BRANCHES * size.num_scenes * text_encoder_flops(model.text_encoder, size.text_length),
        transformer_step=GUIDANCE_BRANCHES * transformer_flops(model.transformer, size),
        vae_decoder=first + later_windows * following,
        num_steps=num_steps,
    )


def text_encoder_flops(config: TextEncoderConfig, num_tokens: int) -> int:
    """FLOPs of one scene: projections, attention scores and values, and the gated MLP."""
    inner = config.num_heads * config.d_kv
    per_token = 4 * config.d_model * inner + 2 * num_tokens * inner + 3 * config.d_model * config.d_ff
    return 2 * config.num_layers * num_tokens * per_token


def transformer_flops(config: TransformerConfig, size: ClipSize) -> int:
    """FLOPs of one forward pass of one clip: one branch of guidance in one step."""
    dim, time_dim, text_tokens = config.model_dim, config.time_embed_dim, size.num_scenes * size.text_length
    patch = config.patch_size**2
    tokens = size.num_tokens(config.patch_size)
    video_tokens = tokens - text_tokens
    embedding = dim * time_dim + time_dim**2 + text_tokens * config.text_dim * dim
    embedding += video_tokens * config.in_channels * patch * dim
    modulation = 2 * 6 * dim * time_dim
    mlp = tokens * 8 * dim**2
    layer = modulation + _attention(config, size) + 2 * _ttt_pass(config, tokens) + mlp
    final = 2 * dim * time_dim + video_tokens * dim * config.out_channels * patch
    return 2 * (embedding + config.num_layers * layer + final)


def segment_tokens(config: TransformerConfig, size: ClipSize) -> int:
    """Number of tokens that attend to each other: the text and the frames of one scene, shared frames included."""
    frames = config.attn_length + config.prefix_temporal_length
    return size.text_length + frames * (size.height // config.patch_size) * (size.width // config.patch_size)


def _attention(config: TransformerConfig, size: ClipSize) -> int:
    """Multiply-adds of the projections q, k, v and o, and of the scores and values of all segments."""
    segment = segment_tokens(config, size)
    return size.num_scenes * segment * (4 * config.model_dim**2 + 2 * segment * config.model_dim)


def _ttt_pass(config: TransformerConfig, tokens: int) -> int:
    """Multiply-adds of one direction: the projections q, k, v and o, the learning rates, and the scan."""
    dim = config.model_dim
    if config.ttt_kind is None:
        return 0
    return tokens * (4 * dim**2 + dim * config.num_heads + _INNER_PRODUCTS[config.ttt_kind] * dim * config.head_dim)


@dataclass(frozen=True)
class Convolution:
    """One convolution of a window. `frames`, `height` and `width` are the sizes of its output."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    frames: int
    height: int
    width: int

    @property
    def causal(self) -> bool:
        return self.kernel == _CAUSAL

    @property
    def flops(self) -> int:
        positions = self.frames * self.height * self.width
        return 2 * positions * self.in_channels * self.out_channels * prod(self.kernel)


_CAUSAL, _PER_FRAME, _POINTWISE = (3, 3, 3), (3, 3), (1, 1, 1)


def vae_window_flops(config: VaeConfig, frames: int, height: int, width: int) -> int:
    """FLOPs of one window of `frames` latent frames. `height` and `width` are in latent positions."""
    return sum(convolution.flops for convolution in vae_convolutions(config, frames, height, width))


def vae_convolutions(config: VaeConfig, frames: int, height: int, width: int) -> Iterator[Convolution]:
    """Yields all convolutions of one window in the order in which `reference/vae.py` runs them."""
    latent = (frames, height, width)
    z, deepest = config.z_channels, len(config.ch_mult) - 1
    channels = config.ch * config.ch_mult[deepest]
    yield Convolution(z, channels, _CAUSAL, *latent)
    for _ in range(2):
        yield from _block(channels, channels, z, latent, latent)
    at = latent
    for level in range(deepest, -1, -1):
        out = config.ch * config.ch_mult[level]
        for _ in range(config.num_res_blocks + 1):
            yield from _block(channels, out, z, latent, at)
            channels = out
        if level > 0:
            doubles_time = level > deepest - config.temporal_levels
            at = (2 * at[0] - at[0] % 2 if doubles_time else at[0], 2 * at[1], 2 * at[2])
            yield Convolution(channels, channels, _PER_FRAME, *at)
    yield from _norm(channels, z, latent)
    yield Convolution(channels, config.out_ch, _CAUSAL, *at)


def _block(
    channels: int, out: int, z: int, latent: tuple[int, int, int], at: tuple[int, int, int]
) -> Iterator[Convolution]:
    yield from _norm(channels, z, latent)
    yield Convolution(channels, out, _CAUSAL, *at)
    yield from _norm(out, z, latent)
    yield Convolution(out, out, _CAUSAL, *at)
    if channels != out:
        yield Convolution(channels, out, _POINTWISE, *at)


def _norm(channels: int, z: int, latent: tuple[int, int, int]) -> Iterator[Convolution]:
    """The convolutions for scale and shift of a spatial norm, at the resolution of the latents."""
    for _ in range(2):
        yield Convolution(z, channels, _POINTWISE, *latent)
