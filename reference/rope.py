"""Rotary position embedding over time, height and width (arXiv 2104.09864, in the 3D form of CogVideoX)."""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of L tokens, [L, d/2] each."""


def rotary_angles(
    num_frames: int, height: int, width: int, head_dim: int, theta: float, grid: tuple[int, int] | None = None
) -> Tensor:
    """Angles [T·height·width, head_dim/2] of the patches of a clip in (t, y, x) order; positions count from 0.

    Of the d channels of a head, d/4 encode time, 3d/8 height and 3d/8 width. Within an axis of m channels, the angle of
    pair j is position·theta^(−2j/m). With a `grid`, the positions of height and width are resized to it.
    """
    time_dim, space_dim = head_dim // 4, head_dim // 8 * 3
    shape = (num_frames, height, width)
    rows, columns = (_count(height), _count(width)) if grid is None else _resized(height, width, grid)
    t = _axis_angles(_count(num_frames), time_dim, theta)[:, None, None, :].expand(*shape, -1)
    y = _axis_angles(rows, space_dim, theta)[None, :, None, :].expand(*shape, -1)
    x = _axis_angles(columns, space_dim, theta)[None, None, :, :].expand(*shape, -1)
    return torch.cat([t, y, x], dim=-1).flatten(0, 2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates each pair of neighbouring channels of x [..., L, d]: (a, b) → (a·cos − b·sin, b·cos + a·sin)."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _count(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)


def _resized(height: int, width: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Positions of rows and columns of a frame that is scaled to fit into the grid, aspect kept, and centred in it.

    These are CogVideoX's for a frame of another size than in training. Size and margin of the scaled frame are rounded;
    the n positions of an axis go evenly from margin to (margin + size)·(n − 1)/n.
    """
    base_height, base_width = grid
    tall = height / width > base_height / base_width
    scaled_height = base_height if tall else round(base_width / width * height)
    scaled_width = round(base_height / height * width) if tall else base_width
    return (
        _evenly(round((base_height - scaled_height) / 2), scaled_height, height),
        _evenly(round((base_width - scaled_width) / 2), scaled_width, width),
    )


def _evenly(margin: int, size: int, count: int) -> Tensor:
    return torch.linspace(margin, (margin + size) * (count - 1) / count, count, dtype=torch.float32)


def _axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    frequencies = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return positions[:, None] * frequencies
