"""Rotary position embedding over time, height and width (arXiv 2104.09864, in the 3D form of CogVideoX)."""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of L tokens, [L, d/2] each."""


def rotary_angles(num_frames: int, height: int, width: int, head_dim: int, theta: float) -> Tensor:
    """Angles [T·height·width, head_dim/2] of the patches of a clip in (t, y, x) order; positions count from 0.

    Of the d channels of a head, d/4 encode time, 3d/8 height and 3d/8 width. Within an axis of m channels, the angle of
    pair j is position·theta^(−2j/m).
    """
    time_dim, space_dim = head_dim // 4, head_dim // 8 * 3
    shape = (num_frames, height, width)
    t = _axis_angles(num_frames, time_dim, theta)[:, None, None, :].expand(*shape, -1)
    y = _axis_angles(height, space_dim, theta)[None, :, None, :].expand(*shape, -1)
    x = _axis_angles(width, space_dim, theta)[None, None, :, :].expand(*shape, -1)
    return torch.cat([t, y, x], dim=-1).flatten(0, 2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates each pair of neighbouring channels of x [..., L, d]: (a, b) → (a·cos − b·sin, b·cos + a·sin)."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _axis_angles(length: int, dim: int, theta: float) -> Tensor:
    frequencies = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return torch.arange(length, dtype=torch.float32)[:, None] * frequencies
