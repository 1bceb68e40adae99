"""The decoder of CogVideoX's causal 3D VAE (arXiv 2408.06072, section 2.1). It decodes one temporal window at a time.

Parameter names are those of the original checkpoint (`3d-vae.pt`) under `decoder.`.
Tensors are [B, channels, T frames, H, W].
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.runtime.config import VaeConfig

NORM_GROUPS = 32
NORM_EPS = 1e-6
CACHED_FRAMES = 2
"""Frames that a causal convolution of kernel 3 needs from before its window."""


class ConvCache:
    """The last input frames of every causal convolution, carried from one window to the next.

    Pass one cache through a whole clip; `frames` maps the name of a convolution to [B, channels, 2, H, W] and is empty
    before the first window.
    """

    def __init__(self, frames: dict[str, Tensor] | None = None) -> None:
        self.frames = dict(frames or {})

    def prepend(self, name: str, x: Tensor) -> Tensor:
        """Returns x with the two frames before it and keeps its last two for the next window.

        At the start of a clip the first frame is repeated.
        """
        before = self.frames[name] if name in self.frames else x[:, :, :1].expand(-1, -1, CACHED_FRAMES, -1, -1)
        padded = torch.cat([before, x], dim=2)
        self.frames[name] = padded[:, :, -CACHED_FRAMES:]
        return padded


class VaeDecoder(nn.Module):
    """Latents [B, 16, T, H, W] → frames [B, 3, T', 8H, 8W], nominally in [−1, 1], not clamped."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        deepest = len(config.ch_mult) - 1
        channels = config.ch * config.ch_mult[deepest]
        self.conv_in = CausalConv3d(config.z_channels, channels)
        self.mid = nn.ModuleDict(
            {name: ResnetBlock(channels, channels, config.z_channels) for name in ("block_1", "block_2")}
        )
        levels = []
        for level in range(deepest, -1, -1):
            out_channels = config.ch * config.ch_mult[level]
            doubles_time = level > deepest - config.temporal_levels
            levels.append(UpLevel(config, channels, out_channels, upsamples=level > 0, doubles_time=doubles_time))
            channels = out_channels
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = SpatialNorm(channels, config.z_channels)
        self.conv_out = CausalConv3d(channels, config.out_ch)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv3d):
                module.name = name

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yields the frames of each window, in order. `latents` are unscaled, as the transformer gives them."""
        cache = ConvCache()
        for window in windows(latents.shape[2], self.config.temporal_window):
            yield self(latents[:, :, window] / self.config.scale_factor, cache)

    def forward(self, z: Tensor, cache: ConvCache) -> Tensor:
        """Decodes one window of scaled latents; `cache` is read and updated."""
        x = self.conv_in(z, cache)
        x = self.mid["block_1"](x, z, cache)
        x = self.mid["block_2"](x, z, cache)
        for level in reversed(self.up):
            x = level(x, z, cache)
        return self.conv_out(functional.silu(self.norm_out(x, z)), cache)


def windows(num_frames: int, size: int) -> Iterator[slice]:
    """Cuts a clip of latent frames for decoding: the first window has one frame more than the others."""
    if num_frames < 1 + size or (num_frames - 1) % size:
        raise ValueError(f"{num_frames} latent frames are not one more than a multiple of {size}")
    yield slice(0, 1 + size)
    for start in range(1 + size, num_frames, size):
        yield slice(start, start + size)


class CausalConv3d(nn.Module):
    """3x3x3 convolution that reads the current frame and the two before it; space is padded with zeros."""

    name: str

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        return self.conv(cache.prepend(self.name, x))


class PointwiseConv3d(nn.Module):
    """1x1x1 convolution; the checkpoint calls its weights `conv`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are 1x1x1 convolutions of the latents, resized to the features."""

    def __init__(self, channels: int, z_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)
        self.conv_y = PointwiseConv3d(z_channels, channels)
        self.conv_b = PointwiseConv3d(z_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        # A pointwise convolution commutes with a nearest resize, and before it there is less to convolve.
        frames, height, width = x.shape[2:]
        size = (frames, height, width)
        scale, shift = resize_nearest(self.conv_y(z), size), resize_nearest(self.conv_b(z), size)
        return self.norm_layer(x) * scale + shift


def resize_nearest(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """x [B, channels, T, H, W] resized to `size` (frames, height, width) by nearest neighbour.

    Every axis grows by a whole factor, except that the first of an odd number of frames is resized on its own.
    """
    frames = size[0]
    if frames > 1 and frames % 2:
        first, rest = _repeat(x[:, :, :1], (1, *size[1:])), _repeat(x[:, :, 1:], (frames - 1, *size[1:]))
        return torch.cat([first, rest], dim=2)
    return _repeat(x, size)


def _repeat(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    # functional.interpolate exports as Resize, which is about forty times slower in ONNX Runtime on a CPU.
    for dim, target in reversed(list(enumerate(size, start=2))):
        if target != x.shape[dim]:
            x = x.repeat_interleave(target // x.shape[dim], dim=dim)
    return x


class ResnetBlock(nn.Module):
    """Norm, swish and convolution, twice, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, z_channels: int) -> None:
        super().__init__()
        self.norm1 = SpatialNorm(in_channels, z_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = SpatialNorm(out_channels, z_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor, cache: ConvCache) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x, z)), cache)
        h = self.conv2(functional.silu(self.norm2(h, z)), cache)
        return self.nin_shortcut(x) + h


class UpLevel(nn.Module):
    """The residual blocks of one resolution, then upsampling to the next."""

    def __init__(
        self, config: VaeConfig, in_channels: int, out_channels: int, *, upsamples: bool, doubles_time: bool
    ) -> None:
        super().__init__()
        sizes = [in_channels, *[out_channels] * config.num_res_blocks]
        self.block = nn.ModuleList(ResnetBlock(size, out_channels, config.z_channels) for size in sizes)
        self.upsample = Upsample(out_channels, doubles_time) if upsamples else None

    def forward(self, x: Tensor, z: Tensor, cache: ConvCache) -> Tensor:
        for block in self.block:
            x = block(x, z, cache)
        return x if self.upsample is None else self.upsample(x)


class Upsample(nn.Module):
    """Doubles height and width, and time where asked; then a 3x3 convolution of each frame."""

    def __init__(self, channels: int, doubles_time: bool) -> None:
        super().__init__()
        self.doubles_time = doubles_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        if self.doubles_time:
            frames = 2 * frames - frames % 2  # the first frame of a clip is not doubled
        x = resize_nearest(x, (frames, 2 * height, 2 * width))
        per_frame = self.conv(x.transpose(1, 2).flatten(0, 1))  # [B·T, channels, H, W]
        return per_frame.unflatten(0, (-1, frames)).transpose(1, 2)
