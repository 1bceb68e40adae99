"""Sources of a model's weights: a seed or a folder of checkpoints. Weights are read or generated one at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from msgspec import structs
from tokenizers import Tokenizer
from torch import nn

from ttt_video_engine.export.sources.stored_scale import stored_scale_factor
from ttt_video_engine.export.sources.tokenizer import load_t5_tokenizer, tiny_prose, train_tokenizer
from ttt_video_engine.planning.shapes import MOST_SEEDED_TOKENS, can_be_seeded
from ttt_video_engine.reference.checkpoints.cogvideox import is_cogvideox_transformer
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, fingerprint, open_state
from ttt_video_engine.reference.checkpoints.upstream import (
    check_fit,
    is_ttt,
    text_encoder_weights,
    transformer_weights,
    ttt_kind,
    vae_weights,
)
from ttt_video_engine.reference.initialise import SeededWeights, init_ttt_weights, on_meta_device
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import CheckpointError, ConfigError
from ttt_video_engine.runtime.presets import PRESETS

M = TypeVar("M", bound=nn.Module)
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class Component(Generic[M_co]):
    """A component of a model, not in memory: a function that builds its module, and its weights by name.

    `origin` identifies the weights: it changes whenever they may have changed.
    """

    build: Callable[[], M_co]
    weights: LazyStateDict
    origin: str

    def load(self) -> M_co:
        """The module with its weights, in float32, for inference."""
        module = self.build().eval().requires_grad_(False)
        for name, value in module.named_parameters():  # yields a tied weight once
            value.copy_(self.weights[name].read())
        return module


class ModelSource(Protocol):
    """Describes the components of a model one by one, without reading weights."""

    @property
    def model(self) -> ModelConfig: ...

    def tokenizer(self) -> Tokenizer: ...

    def text_encoder(self) -> Component[TextEncoder]: ...

    def transformer(self) -> Component[DiffusionTransformer]: ...

    def vae_decoder(self) -> Component[VaeDecoder]: ...


def components_of(source: ModelSource) -> dict[str, Component[nn.Module]]:
    """All components, by the names of their folders in a bundle."""
    return {
        "text_encoder": source.text_encoder(),
        "transformer": source.transformer(),
        "vae_decoder": source.vae_decoder(),
    }


@dataclass(frozen=True)
class SeededSource:
    """Random weights from a seed, and a tokenizer trained on the package's prose. For models with a small vocabulary.

    Raises ConfigError for a model with a larger one.
    """

    model: ModelConfig
    seed: int

    def __post_init__(self) -> None:
        if not can_be_seeded(self.model):
            kind, vocab_size = "preset" if self.model.name in PRESETS else "model", self.model.text_encoder.vocab_size
            raise ConfigError(
                f"{kind} is {self.model.name!r}: needs weights; give --checkpoint as well "
                f"(random weights need a text_encoder.vocab_size of at most {MOST_SEEDED_TOKENS}, not {vocab_size})"
            )

    @cached_property
    def _weights(self) -> SeededWeights:
        return SeededWeights(self.seed)

    def tokenizer(self) -> Tokenizer:
        return train_tokenizer(tiny_prose(), self.model.text_encoder.vocab_size)

    def text_encoder(self) -> Component[TextEncoder]:
        return self._seeded(lambda: TextEncoder(self.model.text_encoder))

    def transformer(self) -> Component[DiffusionTransformer]:
        return self._seeded(lambda: DiffusionTransformer(self.model.transformer))

    def vae_decoder(self) -> Component[VaeDecoder]:
        return self._seeded(lambda: VaeDecoder(self.model.vae))

    def _seeded(self, build: Callable[[], M]) -> Component[M]:
        return Component(build, self._weights.describe(build), f"seed {self.seed}")


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint folder with the layout of the Hugging Face hub: transformer/, vae/, text_encoder/ and tokenizer/.

    `transformer` holds TTT-Video's weights under the names of its public code, or Hugging Face's CogVideoX. CogVideoX
    has no TTT layers: where the model has, they are initialised from `seed`, which `report` states. `vae` is the
    original 3d-vae.pt or Hugging Face's, `text_encoder` and `tokenizer` are T5 v1.1's. `open_state` lists the file
    formats. Raises CheckpointError for a component that is missing or damaged, or whose sizes differ from the model's.
    """

    model: ModelConfig
    folder: Path
    seed: int = 0
    report: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: is not a folder; give one that holds transformer/, vae/, text_encoder/ and tokenizer/"
            )

    def with_stored_scale(self) -> "CheckpointSource":
        """This source with the VAE scale factor that the checkpoint states. `report` states which factor is used.

        The factor scales the latents that a transformer was trained on. CogVideoX was trained on latents times the
        scaling_factor of its vae/config.json. TTT-Video was not, whichever VAE is in the folder: it keeps the model's
        factor.
        """
        path, current = self.folder / "vae", self.model.vae.scale_factor
        stored = stored_scale_factor(path)
        if is_cogvideox_transformer(open_state(self.folder / "transformer")):
            if stored is None:
                self.report(f"{path}: has no config.json with a scaling_factor; the VAE scale factor is {current}")
                return self
            self.report(f"{path / 'config.json'}: the VAE scale factor is {stored}")
            return replace(
                self, model=structs.replace(self.model, vae=structs.replace(self.model.vae, scale_factor=stored))
            )
        if stored is not None and stored != current:
            self.report(
                f"{path / 'config.json'}: states {stored}; {current} is used, because TTT-Video's transformer needs it"
            )
        return self

    def tokenizer(self) -> Tokenizer:
        return load_t5_tokenizer(self.folder / "tokenizer", self.model.text_encoder.vocab_size)

    def text_encoder(self) -> Component[TextEncoder]:
        config, path = self.model.text_encoder, self.folder / "text_encoder"
        weights = text_encoder_weights(open_state(path), vocab_size=config.vocab_size, source=path)
        return _component(lambda: TextEncoder(config), weights, path, fingerprint(path))

    def transformer(self) -> Component[DiffusionTransformer]:
        path = self.folder / "transformer"

        def build() -> DiffusionTransformer:
            return DiffusionTransformer(self.model.transformer)

        state = open_state(path)
        weights, origin = transformer_weights(state), fingerprint(path)
        if is_cogvideox_transformer(state) and self.model.transformer.ttt_kind:
            self.report(
                f"{path}: has no TTT layers; they are initialised, untrained, from seed {self.seed} "
                "(--ttt none leaves them out)"
            )
            shapes = {name: value.shape for name, value in on_meta_device(build).state_dict().items() if is_ttt(name)}
            weights, origin = {**weights, **init_ttt_weights(shapes, self.seed)}, f"{origin}, TTT from seed {self.seed}"
        kind, wanted = ttt_kind(weights), self.model.transformer.ttt
        if kind is not None and kind != wanted:
            raise CheckpointError(f"{path}: has TTT layers of kind {kind}, not {wanted}; use --ttt {kind}")
        return _component(build, weights, path, origin)

    def vae_decoder(self) -> Component[VaeDecoder]:
        config, path = self.model.vae, self.folder / "vae"
        weights = vae_weights(open_state(path), config)
        return _component(lambda: VaeDecoder(config), weights, path, fingerprint(path))


def _component(build: Callable[[], M], weights: LazyStateDict, path: Path, origin: str) -> Component[M]:
    check_fit(weights, on_meta_device(build), path)
    return Component(build, weights, origin)
