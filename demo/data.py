"""Batches of training, each a function of its seed and number alone. Shapes: B clips, S scenes, N tokens, T latents."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from demo.captions import captions
from demo.config import MODEL
from demo.encoder import LinearEncoder
from demo.scenes import render
from demo.story import Script, random_script
from demo.text import Ids, storyboard, token_ids
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH

PROMPT_DROPOUT = 0.1
HELD_OUT_SEED = 1_000_003
_CLIPS_PER_STEP = 64
"""More than any batch holds: clip numbers of different steps never meet."""


@dataclass(frozen=True, eq=False)
class Batch:
    """latents [B, T, 16, 8, 12] float32 and token ids [B, S, N] int64."""

    latents: Tensor
    ids: Tensor


def text_length(num_scenes: int) -> int:
    """N of a clip of so many scenes."""
    length = next(name for name, count in SCENES_PER_LENGTH.items() if count == num_scenes)
    return MODEL.text_lengths[length]


def make_batch(seed: int, step: int, size: int, num_scenes: int) -> Batch:
    """The clips of one step. Some lose their text: the network learns the unconditional velocity from them."""
    latents, ids = [], []
    for number in range(step * _CLIPS_PER_STEP, step * _CLIPS_PER_STEP + size):
        script = random_script(seed, number, num_scenes)
        positive, negative = prompt_ids(script, number)
        dropped = np.random.default_rng([seed, number]).random() < PROMPT_DROPOUT
        latents.append(torch.from_numpy(_encoder().encode(render(script))))
        ids.append(torch.from_numpy(negative if dropped else positive))
    return Batch(torch.stack(latents), torch.stack(ids))


def prompt_ids(script: Script, number: int) -> tuple[Ids, Ids]:
    """Ids [S, N] of a script's captions, drawn with `number`, and of empty ones."""
    return token_ids(storyboard(script, captions(script, number)), text_length(len(script)))


@cache
def _encoder() -> LinearEncoder:
    return LinearEncoder.load()
