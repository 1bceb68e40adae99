"""Prompts of real prose for the parity gate. Random token ids have other statistics than language."""

from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from ttt_video_engine.export.sources.tokenizer import tiny_prose
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.storyboard import Scene, Storyboard
from ttt_video_engine.runtime.tokenizer import SceneTokenizer


def real_prompts(tokenizer: Path, model: ModelConfig, length: str) -> Tensor:
    """Token ids [2, S, N] of a storyboard with transitions: prompts first, then negative prompts."""
    size = model.clip_size(length)
    paragraphs = cycle(paragraph for paragraph in tiny_prose().split("\n\n") if paragraph.strip())
    scenes = tuple(
        Scene(text=text, requires_scene_transition=True, neg_text="blurred, distorted")
        for text in islice(paragraphs, size.num_scenes)
    )
    storyboard = Storyboard(name="parity", scenes=scenes, source="prose.txt")
    prompts = SceneTokenizer.from_file(tokenizer).encode(storyboard, size.text_length)
    return torch.stack([torch.from_numpy(prompts.positive), torch.from_numpy(prompts.negative)])
