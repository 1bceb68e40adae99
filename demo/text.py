"""From captions to token ids, with a tokenizer trained once on the captions themselves."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo.captions import captions
from demo.config import MODEL
from demo.story import Script, random_script
from ttt_video_engine.export.sources.tokenizer import load_t5_tokenizer, train_tokenizer
from ttt_video_engine.runtime.storyboard import Scene, Storyboard
from ttt_video_engine.runtime.tokenizer import SCENE_END_TOKEN, SCENE_START_TOKEN, SceneTokenizer

FOLDER = Path(__file__).with_name("tokenizer")
"""Holds tokenizer.json as T5's are published: the scene tokens are added when it is read."""
_PROSE_SEED, _PROSE_CLIPS = 1, 3000

Ids = NDArray[np.int64]


def storyboard(script: Script, sentences: list[str]) -> Storyboard:
    """What a user would write to see this script."""
    scenes = tuple(Scene(text, scene.cut) for text, scene in zip(sentences, script, strict=True))
    return Storyboard("demo", scenes, "demo")


def token_ids(story: Storyboard, text_length: int) -> tuple[Ids, Ids]:
    """Ids [S, N] of the captions, and of the empty prompts that guidance starts from."""
    encoded = _tokenizer().encode(story, text_length)
    return encoded.positive, encoded.negative


def num_lost(story: Storyboard, text_length: int) -> int:
    """How many captions of a storyboard are too long."""
    return len(_tokenizer().encode(story, text_length).truncations)


@cache
def _tokenizer() -> SceneTokenizer:
    return SceneTokenizer(load_t5_tokenizer(FOLDER, MODEL.text_encoder.vocab_size))


def _prose() -> str:
    clips = ((random_script(_PROSE_SEED, index, 3), index) for index in range(_PROSE_CLIPS))
    return "\n".join(sentence for script, seed in clips for sentence in captions(script, seed))


def train() -> str:
    """The content of tokenizer.json."""
    content = json.loads(train_tokenizer(_prose(), MODEL.text_encoder.vocab_size).to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["content"] not in (SCENE_END_TOKEN, SCENE_START_TOKEN)]
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    (FOLDER / "tokenizer.json").write_text(train(), encoding="utf-8")
