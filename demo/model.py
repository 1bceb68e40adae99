"""The two networks that are trained together: text encoder and transformer."""

import torch
from torch import Tensor, nn

from demo.config import MODEL
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import ModelConfig

_GATE = 0.3
_MODULATIONS = ("pre_seq_adaLN_modulation.1", "pre_mlp_adaLN_modulation.1")
_GATES = (2, 5)
"""Places of the video's and the text's gate among the six modulations of a block."""


class DemoModel(nn.Module):
    """(noised latents [B, T, 16, 8, 12], ids [B, S, N], timesteps [B]) → velocity like the latents."""

    def __init__(self, config: ModelConfig = MODEL) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(config.text_encoder)
        self.transformer = DiffusionTransformer(config.transformer)

    def forward(self, latents: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        velocity: Tensor = self.transformer(latents, self.embed(ids), timesteps)
        return velocity

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [B, S, N, text_dim] of ids [B, S, N]."""
        embeddings = self.text_encoder(ids.flatten(0, 1))
        per_scene: Tensor = embeddings.unflatten(0, ids.shape[:2])
        return per_scene


def new_model(seed: int, config: ModelConfig = MODEL) -> DemoModel:
    """A model to train: its first velocity is 0, and each block adds 0.3 of what it computes at every timestep."""
    model = seeded(lambda: DemoModel(config), seed).requires_grad_(True)  # in eval mode: T5 has dropout
    layers, final = model.transformer.layers, model.transformer.final_layer
    with torch.no_grad():
        for layer in layers.children():
            for modulation in (layer.get_submodule(name) for name in _MODULATIONS):
                _zero(modulation)
                for gate in _GATES:
                    modulation.get_parameter("bias").view(6, -1)[gate] = _GATE
        _zero(final.linear)
        _zero(final.get_submodule("adaLN_modulation.1"))
    return model


def _zero(linear: nn.Module) -> None:
    linear.get_parameter("weight").zero_()
    linear.get_parameter("bias").zero_()
