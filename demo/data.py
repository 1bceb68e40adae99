"""Batches of training, each a function of its seed and number alone. Shapes: B clips, S scenes, N tokens, T latents."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo.captions import captions
from demo.config import MODEL
from demo.encoder import BLOCK, LinearEncoder
from demo.scenes import Frames, background_frames, render
from demo.story import Script, random_script
from demo.text import Ids, storyboard, token_ids
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH

PROMPT_DROPOUT = 0.1
HELD_OUT_SEED = 1_000_003
_CLIPS_PER_STEP = 64
"""More than any batch holds: clip numbers of different steps never meet."""


@dataclass(frozen=True, eq=False)
class Batch:
    """latents [B, T, 16, 8, 12] float32, token ids [B, S, N] int64, and where figures are, [B, T, 1, 8, 12] bool."""

    latents: Tensor
    ids: Tensor
    figures: Tensor


def text_length(num_scenes: int) -> int:
    """N of a clip of so many scenes."""
    length = next(name for name, count in SCENES_PER_LENGTH.items() if count == num_scenes)
    return MODEL.text_lengths[length]


def make_batch(seed: int, step: int, size: int, num_scenes: int) -> Batch:
    """The clips of one step. Some lose their text: the network learns the unconditional velocity from them."""
    latents, ids, figures = [], [], []
    for number in range(step * _CLIPS_PER_STEP, step * _CLIPS_PER_STEP + size):
        script = random_script(seed, number, num_scenes)
        positive, negative = prompt_ids(script, number)
        dropped = np.random.default_rng([seed, number]).random() < PROMPT_DROPOUT
        frames = render(script)
        latents.append(torch.from_numpy(_encoder().encode(frames)))
        ids.append(torch.from_numpy(negative if dropped else positive))
        figures.append(torch.from_numpy(figure_cells(script, frames)))
    return Batch(torch.stack(latents), torch.stack(ids), torch.stack(figures))


def figure_cells(script: Script, frames: Frames) -> NDArray[np.bool_]:
    """[T, 1, 8, 12]: whether a figure covers a part of a latent's block; `frames` are the clip of the script."""
    covered = np.not_equal(frames, background_frames(script)).max(axis=-1)
    time, height, width = BLOCK
    padded = np.concatenate([covered[:1].repeat(time - 1, axis=0), covered])
    count, rows, columns = padded.shape
    blocks = padded.reshape(count // time, time, rows // height, height, columns // width, width)
    return np.expand_dims(blocks.any(axis=(1, 3, 5)), 1)


def prompt_ids(script: Script, number: int) -> tuple[Ids, Ids]:
    """Ids [S, N] of a script's captions, drawn with `number`, and of empty ones."""
    return token_ids(storyboard(script, captions(script, number)), text_length(len(script)))


@cache
def _encoder() -> LinearEncoder:
    return LinearEncoder.load()
