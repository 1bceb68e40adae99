"""Turns a storyboard into the token ids that the text encoder reads. Shapes: S scenes, N tokens kept per scene."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BundleError, printable
from ttt_video_engine.runtime.storyboard import Storyboard
from ttt_video_engine.runtime.tokenizer_file import read_tokenizer

PAD_TOKEN = "<pad>"
END_TOKEN = "</s>"
SCENE_END_TOKEN = "<end_scene>"
SCENE_START_TOKEN = "<start_scene>"
_CONTROL_TOKENS = (PAD_TOKEN, END_TOKEN, SCENE_END_TOKEN, SCENE_START_TOKEN)


@dataclass(frozen=True)
class Truncation:
    """A prompt that is too long: `num_tokens` with its scene tokens and `</s>`, of which `limit` fit.

    `scene` counts from 1, `field` is "text" or "neg_text", `cut_text` is the part of the prompt that is cut.
    """

    scene: int
    field: str
    num_tokens: int
    limit: int
    cut_text: str

    @property
    def message(self) -> str:
        """One line, with the start of the text that is cut."""
        cut = printable(textwrap.shorten(self.cut_text, 100, placeholder=" …"))
        return f'scene {self.scene}, {self.field}: {self.num_tokens} tokens, {self.limit} fit; cut: "{cut}"'


@dataclass(frozen=True)
class EncodedPrompts:
    """Token ids of a storyboard, int64 [S, N] each, and the prompts that were cut."""

    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    truncations: tuple[Truncation, ...]


class SceneTokenizer:
    """T5's tokenizer with the two scene tokens. Make it with `from_file`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        missing = [token for token in _CONTROL_TOKENS if token not in vocab]
        if missing:
            raise BundleError(f"the tokenizer lacks {', '.join(missing)}; {EXPORT_AGAIN}")
        self._pad, self._end, self._scene_end, self._scene_start = (vocab[token] for token in _CONTROL_TOKENS)
        # The file's truncation, padding and post-processing would run before the scene tokens are added.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None

    @classmethod
    def from_file(cls, path: Path) -> "SceneTokenizer":
        """Reads a `tokenizer.json`. Raises BundleError if it is unreadable or lacks a token this class needs."""
        try:
            tokenizer = read_tokenizer(path)
        # The library raises plain Exception.
        except Exception as error:
            cause = " ".join(str(error).split())
            raise BundleError(f"{path}: cannot be read ({cause}); {EXPORT_AGAIN}") from error
        try:
            return cls(tokenizer)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    def encode(self, storyboard: Storyboard, text_length: int) -> EncodedPrompts:
        """Ids of every scene's text and neg_text, cut or padded to N = `text_length` (at least 3).

        A scene with a transition starts with the scene-start token and the one before it ends with the scene-end token;
        no scene precedes the first. Only positive prompts have these tokens.
        """
        scenes = storyboard.scenes
        positive = np.full((len(scenes), text_length), self._pad, dtype=np.int64)
        negative = positive.copy()
        starts = [False, *(scene.requires_scene_transition for scene in scenes[1:])]
        ends = [*starts[1:], False]
        truncations: list[Truncation | None] = []
        for index, scene in enumerate(scenes):
            head = [self._scene_start] if starts[index] else []
            tail = [self._scene_end, self._end] if ends[index] else [self._end]
            number = index + 1
            truncations.append(self._fill(positive[index], scene.text, head, tail, number, "text"))
            truncations.append(self._fill(negative[index], scene.neg_text, [], [self._end], number, "neg_text"))
        return EncodedPrompts(positive, negative, tuple(cut for cut in truncations if cut is not None))

    def num_tokens(self, row: NDArray[np.int64]) -> int:
        """Tokens of a row [N] before its padding."""
        return int(np.count_nonzero(row != self._pad))

    def _fill(
        self, row: NDArray[np.int64], text: str, head: list[int], tail: list[int], scene: int, field: str
    ) -> Truncation | None:
        """Writes head, text and tail into a row [N] of padding; the text is cut where they do not fit."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        control = (self._pad, self._end, self._scene_end, self._scene_start)
        # Control tokens that are part of the text are dropped.
        kept = [(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if i not in control]
        room = len(row) - len(head) - len(tail)
        ids = [*head, *(token_id for token_id, _ in kept[:room]), *tail]
        row[: len(ids)] = ids
        if len(kept) <= room:
            return None
        cut_text = " ".join(text[kept[room][1] :].split())
        return Truncation(scene, field, len(head) + len(kept) + len(tail), len(row), cut_text)
