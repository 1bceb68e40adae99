"""Where a model's weights come from: a seed, or a folder of checkpoints. None are read before they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tokenizers import Tokenizer
from torch import nn

from ttt_video_engine.export.sources.tokenizer import load_t5_tokenizer, tiny_prose, train_tokenizer
from ttt_video_engine.reference.checkpoints.cogvideox import is_cogvideox_transformer
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, fingerprint, lazy_state, open_state
from ttt_video_engine.reference.checkpoints.upstream import (
    check_fit,
    is_ttt,
    text_encoder_weights,
    transformer_weights,
    ttt_kind,
    vae_weights,
)
from ttt_video_engine.reference.initialise import init_ttt_weights, on_meta_device, seeded
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import CheckpointError, ConfigError

M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class Component(Generic[M_co]):
    """A component that need not be in memory: how its module is built, and the weights to fill it with, by name.

    `origin` changes whenever the weights may have.
    """

    build: Callable[[], M_co]
    weights: LazyStateDict
    origin: str

    def load(self) -> M_co:
        """The module in float32, ready for inference."""
        module = self.build().eval().requires_grad_(False)
        for name, value in module.state_dict().items():
            value.copy_(self.weights[name].read())
        return module


class ModelSource(Protocol):
    """Describes each component when it is its turn."""

    @property
    def model(self) -> ModelConfig: ...

    def tokenizer(self) -> Tokenizer: ...

    def text_encoder(self) -> Component[TextEncoder]: ...

    def transformer(self) -> Component[DiffusionTransformer]: ...

    def vae_decoder(self) -> Component[VaeDecoder]: ...


def components_of(source: ModelSource) -> dict[str, Component[nn.Module]]:
    """All components by the names of their folders in a bundle."""
    return {
        "text_encoder": source.text_encoder(),
        "transformer": source.transformer(),
        "vae_decoder": source.vae_decoder(),
    }


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

    def text_encoder(self) -> Component[TextEncoder]:
        return self._seeded(lambda: TextEncoder(self.model.text_encoder))

    def transformer(self) -> Component[DiffusionTransformer]:
        return self._seeded(lambda: DiffusionTransformer(self.model.transformer))

    def vae_decoder(self) -> Component[VaeDecoder]:
        return self._seeded(lambda: VaeDecoder(self.model.vae))

    def _seeded(self, build: Callable[[], M]) -> Component[M]:
        return Component(build, lazy_state(seeded(build, self.seed).state_dict()), f"seed {self.seed}")


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

    def text_encoder(self) -> Component[TextEncoder]:
        config, path = self.model.text_encoder, self.folder / "text_encoder"
        weights = text_encoder_weights(open_state(path), vocab_size=config.vocab_size)
        return _fitted(lambda: TextEncoder(config), weights, path, fingerprint(path))

    def transformer(self) -> Component[DiffusionTransformer]:
        path, origin = self.folder / "transformer", fingerprint(self.folder / "transformer")

        def build() -> DiffusionTransformer:
            return DiffusionTransformer(self.model.transformer)

        state = open_state(path)
        weights = transformer_weights(state)
        if is_cogvideox_transformer(state):
            self.report(f"{path}: has no TTT layers; they are made fresh, untrained, from seed {self.seed}")
            shapes = {name: value.shape for name, value in on_meta_device(build).state_dict().items() if is_ttt(name)}
            weights, origin = {**weights, **init_ttt_weights(shapes, self.seed)}, f"{origin}, TTT from seed {self.seed}"
        kind, asked = ttt_kind(weights), self.model.transformer.ttt
        if kind is not None and kind != asked:
            raise CheckpointError(f"{path}: has TTT layers of kind {kind}, not {asked}; use --ttt {kind}")
        return _fitted(build, weights, path, origin)

    def vae_decoder(self) -> Component[VaeDecoder]:
        config, path = self.model.vae, self.folder / "vae"
        weights = vae_weights(open_state(path), config)
        return _fitted(lambda: VaeDecoder(config), weights, path, fingerprint(path))


def _fitted(build: Callable[[], M], weights: LazyStateDict, path: Path, origin: str) -> Component[M]:
    check_fit(weights, on_meta_device(build), path)
    return Component(build, weights, origin)
