"""Sizes of a CogVideoX, from the config files that Hugging Face publishes beside its weights. Imports no torch.

What a file states is checked: a model that `reference/` would compute otherwise is refused, and not exported wrong.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from ttt_video_engine.reference.checkpoints.damage import reading, regular_size
from ttt_video_engine.runtime.config import (
    DiffusionConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)
from ttt_video_engine.runtime.errors import CheckpointError, ConfigError
from ttt_video_engine.runtime.presets import COGVIDEOX

T = TypeVar("T", bound=Struct)
Values = Mapping[str, object]

_MAX_BYTES = 1 << 20

# What the reference computes. A value that a file lacks is assumed, but for those that diffusers and transformers would
# assume otherwise: `_ABSENT`.
_TRANSFORMER: Values = {
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
    "patch_size_t": None,
    "ofs_embed_dim": None,
    "sample_frames": 49,
    "temporal_compression_ratio": 4,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "attention_bias": True,
    "patch_bias": True,
    "norm_elementwise_affine": True,
}
_VAE: Values = {
    "temporal_compression_ratio": 4,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "use_post_quant_conv": False,
}
_TEXT_ENCODER: Values = {
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_SCHEDULER: Values = {
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
_ABSENT: Values = {
    "use_rotary_positional_embeddings": False,
    "feed_forward_proj": "relu",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
}
_REASONS = {
    "use_rotary_positional_embeddings": "the sinusoidal positions of CogVideoX-2B are not supported",
    "use_learned_positional_embeddings": "CogVideoX for image to video is not supported",
    "patch_size_t": "CogVideoX1.5 is not supported",
    "ofs_embed_dim": "CogVideoX1.5 is not supported",
}


class _Transformer(Struct):
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    patch_size: int
    text_embed_dim: int
    time_embed_dim: int
    max_text_seq_length: int
    sample_width: int
    sample_height: int
    norm_eps: float


class _Vae(Struct):
    block_out_channels: list[int]
    layers_per_block: int
    latent_channels: int


class _TextEncoder(Struct):
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int


class _Scheduler(Struct):
    """The defaults are those of diffusers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    snr_shift_scale: float = 3.0


def with_stored_sizes(folder: Path, model: ModelConfig) -> ModelConfig:
    """`model`, which has no TTT, with the sizes that the config files in a checkpoint's folder state.

    The files are `transformer/config.json`, `vae/config.json`, `text_encoder/config.json` and
    `scheduler/scheduler_config.json`; where one is missing, that part of `model` stays. The VAE's scale factor stays
    (`stored_scale.py`), as does the vocabulary, which is the tokenizer's. Raises CheckpointError, which names the file
    and the field, for a file that is damaged and for a model that the reference does not compute.
    """
    vae = _vae(folder / "vae" / "config.json", model.vae)
    changes: dict[str, Any] = {
        "vae": vae,
        "text_encoder": _text_encoder(folder / "text_encoder" / "config.json", model.text_encoder),
        "diffusion": _diffusion(folder / "scheduler" / "scheduler_config.json", model.diffusion),
    }
    path = folder / "transformer" / "config.json"
    stored = _read(path, _Transformer, _TRANSFORMER)
    if stored is not None:
        with _naming(path):
            changes["transformer"] = _transformer(stored, model.transformer)
        changes |= {
            "name": COGVIDEOX,
            "width": stored.sample_width * vae.spatial_factor,
            "height": stored.sample_height * vae.spatial_factor,
            "text_lengths": {"3s": stored.max_text_seq_length},
        }
    with _naming(folder):
        return replace(model, **changes)


def _transformer(stored: _Transformer, config: TransformerConfig) -> TransformerConfig:
    patch = stored.patch_size
    grid: tuple[int, int] | UnsetType = UNSET
    if patch > 0:  # else the config refuses it
        grid = (stored.sample_height // patch, stored.sample_width // patch)
    return replace(
        config,
        model_dim=stored.num_attention_heads * stored.attention_head_dim,
        num_heads=stored.num_attention_heads,
        num_layers=stored.num_layers,
        text_dim=stored.text_embed_dim,
        time_embed_dim=stored.time_embed_dim,
        in_channels=stored.in_channels,
        out_channels=stored.out_channels,
        patch_size=patch,
        layer_norm_eps=stored.norm_eps,
        rope_grid=grid,
    )


def _vae(path: Path, config: VaeConfig) -> VaeConfig:
    stored = _read(path, _Vae, _VAE)
    if stored is None:
        return config
    widths = stored.block_out_channels
    first = widths[0] if widths else 0
    if first < 1 or any(width % first for width in widths):
        raise CheckpointError(f"{path}: block_out_channels is {widths}: must be multiples of the first")
    with _naming(path):
        return replace(
            config,
            ch=first,
            ch_mult=tuple(width // first for width in widths),
            num_res_blocks=stored.layers_per_block,
            z_channels=stored.latent_channels,
        )


def _text_encoder(path: Path, config: TextEncoderConfig) -> TextEncoderConfig:
    stored = _read(path, _TextEncoder, _TEXT_ENCODER)
    if stored is None:
        return config
    with _naming(path):
        return replace(config, **msgspec.structs.asdict(stored))


def _diffusion(path: Path, config: DiffusionConfig) -> DiffusionConfig:
    stored = _read(path, _Scheduler, _SCHEDULER)
    if stored is None:
        return config
    with _naming(path):
        return replace(
            config,
            num_train_timesteps=stored.num_train_timesteps,
            beta_start=stored.beta_start,
            beta_end=stored.beta_end,
            shift_scale=stored.snr_shift_scale,
        )


def _read(path: Path, kind: type[T], wanted: Values) -> T | None:
    """The fields of a file; None if there is no file. Raises CheckpointError for other values than `wanted`."""
    with reading(path):
        exists = path.exists()
    if not exists:
        return None
    regular_size(path, at_most=_MAX_BYTES)
    with reading(path):
        stated = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    for name, value in wanted.items():
        found = stated.get(name, _ABSENT.get(name, value))
        if found != value:
            reason = _REASONS.get(name, "another model than CogVideoX-5B is not supported")
            raise CheckpointError(f"{path}: {name} is {_json(found)}, must be {_json(value)}: {reason}")
    with reading(path):
        return msgspec.convert(stated, kind)


def _json(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:60]} …"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what is wrong with a config into a CheckpointError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
