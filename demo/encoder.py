"""The encoder: a fixed linear map from blocks of 4 frames of 8x8 pixels to 16 numbers, by principal components.

Latents are [T, 16, 8, 12] for 1 + 4·(T − 1) frames: the first latent frame stands for the first frame alone, as if it
had been there four times, and each other one for four frames.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from demo.scenes import Frames, render
from demo.story import random_script

BLOCK = (4, 8, 8)
"""Frames, height and width of a block."""
CHANNELS = 16
FILE = Path(__file__).with_name("encoder.safetensors")
_FIT_SEED, _FIT_CLIPS = 7, 400
_WHITENING = 0.5
"""0 keeps the variances of the components as they are, 1 makes all of them 1. Between the two, coarse components stand
out of more noise than fine ones, and a denoiser settles them first."""

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LinearEncoder:
    """latent = (block − mean) · weight; pixels run from −1 to 1."""

    mean: Array
    """[768], a block flattened as (frame, y, x, colour)."""
    weight: Array
    """[768, 16]."""
    inverse: Array
    """[16, 768]: the linear decoder, block ≈ latent · inverse + mean."""

    @classmethod
    def load(cls, path: Path = FILE) -> "LinearEncoder":
        return cls(**load_file(path))

    def save(self, path: Path = FILE) -> None:
        save_file({"mean": self.mean, "weight": self.weight, "inverse": self.inverse}, path)

    def encode(self, frames: Frames) -> Array:
        """[1 + 4·(T − 1), H, W, 3] → [T, 16, H/8, W/8]."""
        latents = (_blocks(frames) - self.mean) @ self.weight
        return latents.transpose(0, 3, 1, 2).astype(np.float32, copy=False)

    def decode(self, latents: Array) -> Frames:
        """The linear inverse, [T, 16, H/8, W/8] → frames: what the latents hold at least."""
        blocks = latents.transpose(0, 2, 3, 1) @ self.inverse + self.mean
        count, height, width, _ = blocks.shape
        pixels = blocks.reshape(count, height, width, *BLOCK, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        frames = pixels.reshape(count * BLOCK[0], height * BLOCK[1], width * BLOCK[2], 3)[BLOCK[0] - 1 :]
        return ((frames + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def fit() -> LinearEncoder:
    """Principal components of the blocks of some clips, scaled so that the mean variance of a channel is 1."""
    blocks = np.concatenate([_blocks(render(random_script(_FIT_SEED, index, 1))) for index in range(_FIT_CLIPS)])
    rows = blocks.reshape(-1, blocks.shape[-1]).astype(np.float64)
    mean = rows.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    variances, vectors = variances[: -CHANNELS - 1 : -1], vectors[:, : -CHANNELS - 1 : -1]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), range(CHANNELS)])
    scale = variances ** (-_WHITENING / 2)
    scale /= np.sqrt((variances * scale**2).mean())
    weight, inverse = vectors * scale, (vectors / scale).T
    return LinearEncoder(*(np.ascontiguousarray(part, dtype=np.float32) for part in (mean, weight, inverse)))


def _blocks(frames: Frames) -> Array:
    """[T, H/8, W/8, 768] in −1 … 1."""
    pixels = np.concatenate([frames[:1].repeat(BLOCK[0] - 1, axis=0), frames]).astype(np.float32) / 127.5 - 1
    count, height, width, _ = pixels.shape
    split = pixels.reshape(count // BLOCK[0], BLOCK[0], height // BLOCK[1], BLOCK[1], width // BLOCK[2], BLOCK[2], 3)
    blocks: Array = split.transpose(0, 2, 4, 1, 3, 5, 6).reshape(
        count // BLOCK[0], height // BLOCK[1], width // BLOCK[2], -1
    )
    return blocks


if __name__ == "__main__":
    fit().save()
