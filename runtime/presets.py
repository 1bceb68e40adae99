"""The model sizes that have a name.

`tiny` is ours: every part of the real model at a size that a laptop renders, with room for a short prompt. `debug` and
`5B` are the sizes of the public TTT-Video code; the text lengths of 5B are those its stages were trained with. Without
TTT, `5B` is CogVideoX-5B as Hugging Face publishes it.
"""

from msgspec.structs import replace

from ttt_video_engine.runtime.config import (
    DiffusionConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    TTTChoice,
    VaeConfig,
)
from ttt_video_engine.runtime.errors import ConfigError

# TTT-MLP is trained with mini-batches of 64 tokens, TTT-Linear with 16 (arXiv 2504.05298, section 3).
_INNER_TRAINING: dict[TTTChoice, tuple[int, float]] = {"linear": (16, 1.0), "mlp": (64, 0.1), "none": (1, 1.0)}

# Chosen so that 24 patches a frame and the text fill mini-batches of 64 at every length.
_TINY_TEXT_LENGTHS = {"3s": 136, "9s": 152, "18s": 156, "30s": 132, "63s": 168}
COGVIDEOX = "CogVideoX"
"""Name of a model whose sizes are those of a checkpoint of CogVideoX."""
COGVIDEOX_TEXT_LENGTH = 226
"""Tokens of a prompt in CogVideoX's training."""

_TINY_VAE = VaeConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1)


def tiny(ttt: TTTChoice) -> ModelConfig:
    """96x64 pixels, seconds on a CPU."""
    model = ModelConfig(
        name="tiny",
        width=96,
        height=64,
        text_lengths=_TINY_TEXT_LENGTHS,
        transformer=_transformer(ttt, model_dim=64, num_heads=4, num_layers=2, text_dim=64, time_embed_dim=64),
        vae=_TINY_VAE,
        text_encoder=TextEncoderConfig(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=2002),
    )
    return _as_published(model)


def debug(ttt: TTTChoice) -> ModelConfig:
    """The public code's small transformer (8 heads of 64), on the clips of `tiny`."""
    model = ModelConfig(
        name="debug",
        width=96,
        height=64,
        text_lengths=_TINY_TEXT_LENGTHS,
        transformer=_transformer(ttt, model_dim=512, num_heads=8, num_layers=6, text_dim=512, time_embed_dim=512),
        vae=_TINY_VAE,
        text_encoder=TextEncoderConfig(d_model=512, d_kv=64, d_ff=1024, num_layers=2, num_heads=8, vocab_size=2002),
    )
    return _as_published(model)


def full(ttt: TTTChoice) -> ModelConfig:
    """CogVideoX-5B, with TTT layers or without, T5 v1.1 XXL and the CogVideoX VAE at 720x480."""
    model = ModelConfig(
        name="5B",
        width=720,
        height=480,
        text_lengths={"3s": 498, "9s": 502, "18s": 471, "30s": 497, "63s": 458},
        transformer=_transformer(ttt, model_dim=3072, num_heads=48, num_layers=42, text_dim=4096, time_embed_dim=512),
        vae=VaeConfig(),
        text_encoder=TextEncoderConfig(),
    )
    return _as_published(model)


PRESETS = {"tiny": tiny, "debug": debug, "5B": full}


def preset(name: str, ttt: TTTChoice = "linear") -> ModelConfig:
    """The config of a named size. Raises ConfigError for a name that is not there."""
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name](ttt)


def _transformer(
    ttt: TTTChoice, *, model_dim: int, num_heads: int, num_layers: int, text_dim: int, time_embed_dim: int
) -> TransformerConfig:
    mini_batch_size, base_lr = _INNER_TRAINING[ttt]
    return TransformerConfig(
        ttt=ttt,
        model_dim=model_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        text_dim=text_dim,
        time_embed_dim=time_embed_dim,
        mini_batch_size=mini_batch_size,
        ttt_base_lr=base_lr,
    )


def _as_published(model: ModelConfig) -> ModelConfig:
    """A model with TTT unchanged; one without as Hugging Face's diffusers runs CogVideoX-5B.

    TTT-Video trained on from it with other epsilons, other text lengths and latents that are not scaled.
    """
    if model.transformer.ttt_kind:
        return model
    step = model.transformer.patch_size * model.vae.spatial_factor
    grid = (model.height // step, model.width // step)
    return replace(
        model,
        text_lengths={"3s": COGVIDEOX_TEXT_LENGTH},
        transformer=replace(model.transformer, layer_norm_eps=1e-5, qk_norm_eps=1e-6, rope_grid=grid),
        vae=replace(model.vae, scale_factor=0.7),
        diffusion=DiffusionConfig(sampling_steps="cogvideox"),
    )
