"""Where a model's weights come from: a seed, or a folder of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tokenizers import Tokenizer
from torch import nn

from ttt_video_engine.export.tokenizer import load_t5_tokenizer, tiny_prose, train_tokenizer
from ttt_video_engine.reference.checkpoint import (
    is_ttt,
    load_strictly,
    text_encoder_weights,
    transformer_weights,
    vae_weights,
)
from ttt_video_engine.reference.hugging_face import is_cogvideox_transformer
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.stored import StoredState, open_state
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import CheckpointError, ConfigError

M = TypeVar("M", bound=nn.Module)


class ModelSource(Protocol):
    """Makes each component when it is its turn, in float32 and ready for inference."""

    @property
    def model(self) -> ModelConfig: ...

    def tokenizer(self) -> Tokenizer: ...

    def text_encoder(self) -> TextEncoder: ...

    def transformer(self) -> DiffusionTransformer: ...

    def vae_decoder(self) -> VaeDecoder: ...


@dataclass(frozen=True)
class SeededSource:
    """Random weights, and a tokenizer trained on the prose of the package. For presets with a small vocabulary."""

    model: ModelConfig
    seed: int

    def __post_init__(self) -> None:
        if self.model.name == "5B":
            raise ConfigError("preset is '5B': has no weights of its own; give --checkpoint as well")

    def tokenizer(self) -> Tokenizer:
        return train_tokenizer(tiny_prose(), self.model.text_encoder.vocab_size)

    def text_encoder(self) -> TextEncoder:
        return seeded(lambda: TextEncoder(self.model.text_encoder), self.seed)

    def transformer(self) -> DiffusionTransformer:
        return seeded(lambda: DiffusionTransformer(self.model.transformer), self.seed)

    def vae_decoder(self) -> VaeDecoder:
        return seeded(lambda: VaeDecoder(self.model.vae), self.seed)


@dataclass(frozen=True)
class CheckpointSource:
    """A folder laid out as on the Hugging Face hub: transformer/, vae/, text_encoder/ and tokenizer/.

    `transformer` holds weights under the public code's names, or those of CogVideoX under Hugging Face's: then TTT
    layers are fresh, from `seed`, and `report` is told. `vae` is the original 3d-vae.pt or Hugging Face's,
    `text_encoder` and `tokenizer` are those of T5 v1.1. See `reference/stored.py` for the kinds of files.
    """

    model: ModelConfig
    folder: Path
    seed: int = 0
    report: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: is no folder; give one that holds transformer/, vae/, text_encoder/ and tokenizer/"
            )

    def tokenizer(self) -> Tokenizer:
        return load_t5_tokenizer(self.folder / "tokenizer", self.model.text_encoder.vocab_size)

    def text_encoder(self) -> TextEncoder:
        config, path = self.model.text_encoder, self.folder / "text_encoder"
        weights = text_encoder_weights(open_state(path), vocab_size=config.vocab_size)
        return _loaded(lambda: TextEncoder(config), weights, path)

    def transformer(self) -> DiffusionTransformer:
        path = self.folder / "transformer"
        state = open_state(path)
        weights = transformer_weights(state)
        if not is_cogvideox_transformer(state):
            return _loaded(lambda: DiffusionTransformer(self.model.transformer), weights, path)
        self.report(f"{path}: has no TTT layers; they are made fresh, untrained, from seed {self.seed}")
        module = seeded(lambda: DiffusionTransformer(self.model.transformer), self.seed)
        load_strictly(module, weights, path, fresh=is_ttt)
        return module

    def vae_decoder(self) -> VaeDecoder:
        config, path = self.model.vae, self.folder / "vae"
        return _loaded(lambda: VaeDecoder(config), vae_weights(open_state(path), config), path)


def _loaded(build: Callable[[], M], weights: StoredState, path: Path) -> M:
    module = build().eval().requires_grad_(False)
    load_strictly(module, weights, path)
    return module
