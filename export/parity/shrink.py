"""A subset of a model that runs where the whole one is too large: its first and last layers on small clips.

Only repetitions are left out: of layers, patches and text tokens. Widths, scenes and frames stay.
"""

import re
from collections.abc import Callable

from msgspec.structs import replace
from torch import nn

from ttt_video_engine.export.sources.source import Component
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.config import ModelConfig

MOST_PIXELS = 256 * 256
MOST_MATRICES = 1 << 27
"""Layers × width². A larger component takes gigabytes, and a step of it minutes."""

LAYERS = 2
FEWEST_TOKENS = 8
"""Text tokens of a scene: room for the scene tokens and the end of the text."""

_LAST_LAYER = re.compile(rf"\b(layers|encoder\.block)\.{LAYERS - 1}\.")


def shrink_config(model: ModelConfig) -> ModelConfig:
    """A small model unchanged; a large one with two layers, and clips of few tokens that fill whole mini-batches."""
    transformer, encoder = model.transformer, model.text_encoder
    if transformer.num_layers * transformer.model_dim**2 > MOST_MATRICES:
        transformer = replace(transformer, num_layers=min(LAYERS, transformer.num_layers))
    if encoder.num_layers * encoder.d_model**2 > MOST_MATRICES:
        encoder = replace(encoder, num_layers=min(LAYERS, encoder.num_layers))
    model = replace(model, transformer=transformer, text_encoder=encoder)
    if model.width * model.height <= MOST_PIXELS:
        return model
    # The remainder modulo the mini-batch stays, so the tokens of every length still fill whole mini-batches.
    step, mini_batch = transformer.patch_size * model.vae.spatial_factor, transformer.mini_batch_size
    patches = (model.width // step) * (model.height // step)
    sides = ((w, h) for h in range(2, 2 + mini_batch) for w in range(h, h + mini_batch))
    width, height = min((s for s in sides if (s[0] * s[1] - patches) % mini_batch == 0), key=lambda s: s[0] * s[1])
    return replace(
        model,
        width=width * step,
        height=height * step,
        text_lengths={
            length: FEWEST_TOKENS + (tokens - FEWEST_TOKENS) % mini_batch
            for length, tokens in model.text_lengths.items()
        },
    )


def shrink_component(
    name: str, component: Component[nn.Module], part: ModelConfig, whole: ModelConfig
) -> Component[nn.Module]:
    """A component of the model `part` with the weights of the whole one."""
    builds: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: TextEncoder(part.text_encoder),
        "transformer": lambda: DiffusionTransformer(part.transformer),
        "vae_decoder": lambda: VaeDecoder(part.vae),
    }
    names = on_meta_device(builds[name]).state_dict()
    weights = {weight: component.weights[full_weight_name(name, weight, part, whole)] for weight in names}
    return Component(builds[name], weights, component.origin)


def full_weight_name(component: str, weight: str, part: ModelConfig, whole: ModelConfig) -> str:
    """The name in the whole component of a weight of its part: last layers correspond to last layers."""
    kept, num_layers = _layers(component, part), _layers(component, whole)
    return weight if kept == num_layers else _LAST_LAYER.sub(rf"\1.{num_layers - 1}.", weight)


def describe_subset(component: str, part: ModelConfig, whole: ModelConfig) -> str:
    """A few words that describe the part of a component; empty if it is the whole component."""
    words = []
    if _layers(component, part) != _layers(component, whole):
        words.append(f"{_layers(component, part)} of {_layers(component, whole)} layers")
    if component != "text_encoder" and (part.width, part.height) != (whole.width, whole.height):
        words.append(f"{part.width}x{part.height} pixels")
    return ", ".join(words)


def _layers(component: str, model: ModelConfig) -> int:
    layers = {"text_encoder": model.text_encoder.num_layers, "transformer": model.transformer.num_layers}
    return layers.get(component, 0)
