"""The graphs of a bundle as modules of the reference: how each is built, and what its inputs and outputs are.

Embeddings, latents and frames are float32, as those of the ONNX graphs are. The VAE's caches have the model's dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import ConvCache, VaeDecoder
from ttt_video_engine.runtime.bundle import CACHE_IN, CACHE_OUT, TEXT_ENCODER, VAE_FIRST, VAE_NEXT
from ttt_video_engine.runtime.config import ModelConfig

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Component:
    """A module, the prefix of its weights' names in a graph, and the outputs of a graph for its inputs, by name."""

    build: Callable[[], nn.Module]
    prefix: str
    run: Callable[[nn.Module, Tensors], dict[str, Tensor]]


def component_of(graph: str, model: ModelConfig) -> Component:
    """The component that a graph of a bundle, such as "transformer-9s", is a graph of."""
    if graph == TEXT_ENCODER:
        return text_encoder(lambda: TextEncoder(model.text_encoder))
    if graph in (VAE_FIRST, VAE_NEXT):
        return vae_decoder(lambda: VaeDecoder(model.vae))
    return transformer(lambda: DiffusionTransformer(model.transformer))


def text_encoder(build: Callable[[], nn.Module]) -> Component:
    """ids [B, N] int64 → embeddings [B, N, d_model]."""
    return Component(build, "encoder.", lambda module, inputs: {"embeddings": module(inputs["ids"]).float()})


def transformer(build: Callable[[], nn.Module]) -> Component:
    """latents [B, T, C, H, W], text [B, S, N, text_dim], timestep [B] → velocity like latents."""
    return Component(build, "transformer.", _velocity)


def vae_decoder(build: Callable[[], nn.Module]) -> Component:
    """latents [1, T, C, H, W] and, but for the first window, caches → frames [1, 3, T', 8H, 8W] and caches."""
    return Component(build, "decoder.", _frames)


def _velocity(module: nn.Module, inputs: Tensors) -> dict[str, Tensor]:
    dtype = _dtype(module)
    velocity = module(inputs["latents"].to(dtype), inputs["text"].to(dtype), inputs["timestep"])
    return {"velocity": velocity.float()}


def _frames(module: nn.Module, inputs: Tensors) -> dict[str, Tensor]:
    if not isinstance(module, VaeDecoder):
        raise TypeError(f"{type(module).__name__} is not a VAE decoder")
    cache = ConvCache(
        {name.removeprefix(CACHE_IN): value for name, value in inputs.items() if name.startswith(CACHE_IN)}
    )
    z = inputs["latents"].transpose(1, 2).to(_dtype(module)) / module.config.scale_factor
    frames = module(z, cache).float()
    return {"frames": frames, **{CACHE_OUT + name: value for name, value in cache.frames.items()}}


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
