"""Config files of the public TTT-Video code, as they are: what of them is ours, and what has no meaning here.

The form is that of its `configs/eval/*.toml` and `configs/train/*.toml`; its `sample.py` shows what each field does.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ttt_video_engine.runtime import presets
from ttt_video_engine.runtime.config import LengthName, TTTKind, length_name, num_scenes
from ttt_video_engine.runtime.dtypes import Precision
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.settings import Seed

Table = dict[str, Any]

_ONLY = "for one process on one device there is nothing to set"
_TRAINING = "it is for training"
_WHY = {
    "job": "a bundle is named by --output, a video by its storyboard",
    "model.scale_factor": "latents are not scaled before decoding but for eval.vae_scale_factor",
    "eval.scale_factor": "the public code does not read it either; the VAE's is eval.vae_scale_factor",
    "eval": "weights are named by --checkpoint, the rest by options of sample",
    "guider": "eval.num_denoising_steps counts",
    "sampler": "sample --sampler chooses it",
    "parallelism": _ONLY,
    "remat": _TRAINING,
    "training": _TRAINING,
    "optimizer": _TRAINING,
    "checkpoint": "weights are named by --checkpoint",
    "wandb": "sample --wandb PROJECT logs to Weights & Biases",
    "profiling": "there is none",
    "metrics": "nothing is sent anywhere",
    "comm": _ONLY,
}
"""Section, or field of one → why it has no meaning here."""

SECTIONS = ("job", "model", "eval", "guider", "denoiser", "discretization", *_WHY)
MLP_MINI_BATCH = 64
"""Tokens that TTT-MLP is trained with and that its public kernel hard-codes; the public eval files say 16."""


class _Model(Struct, frozen=True):
    name: Literal["cogvideo"] = "cogvideo"
    size: str = "5B"
    ssm_layer: Literal["ttt_linear", "ttt_mlp"] | None = None
    ttt_base_lr: float | None = None
    mini_batch_size: int | None = None
    video_length: str | None = None


class _Eval(Struct, frozen=True):
    """`sampling_num_frames` counts latent frames, 13 for 3 seconds."""

    dtype: Precision | None = None
    image_width: int | None = None
    image_height: int | None = None
    txt_maxlen: int | None = None
    sampling_num_frames: int | None = None
    latent_channels: int | None = None
    vae_scale_factor: float | None = None
    num_denoising_steps: int | None = None
    sampling_fps: float | None = None


class _Guider(Struct, frozen=True):
    scale: float | None = None
    exp: float = 5


class _Denoiser(Struct, frozen=True):
    num_idx: int = 1000
    quantize_c_noise: bool = False


class _Discretization(Struct, frozen=True):
    shift_scale: float | None = None


class _Parallelism(Struct, frozen=True):
    fsdp_unsharded_dtype: Precision | None = None


class _Job(Struct, frozen=True):
    seed: Seed | None = None


class _Public(Struct, frozen=True):
    """What has a meaning here; other fields and sections are let through, for a warning."""

    model: _Model = _Model()
    eval: _Eval = _Eval()
    guider: _Guider = _Guider()
    denoiser: _Denoiser = _Denoiser()
    discretization: _Discretization = _Discretization()
    parallelism: _Parallelism = _Parallelism()
    job: _Job = _Job()


class SamplingOptions(Struct, frozen=True, kw_only=True):
    """What a file states of how to render, None where it does not, and `warnings` about the rest.

    `width` and `height` are pixels, `num_frames` latent frames: what the bundle must have.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    fps: float | None = None
    seed: Seed | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    dtype: Precision | None = None
    warnings: tuple[str, ...] = ()


_FOR_BOTH = (
    *(f"eval.{name}" for name in ("dtype", "image_width", "image_height", "sampling_num_frames")),
    *(f"denoiser.{name}" for name in _Denoiser.__struct_fields__),
)
_FOR_EXPORT = (
    *(f"model.{name}" for name in _Model.__struct_fields__),
    "eval.txt_maxlen",
    "eval.latent_channels",
    "eval.vae_scale_factor",
    "discretization.shift_scale",
    "parallelism.fsdp_unsharded_dtype",
)
_FOR_SAMPLE = ("eval.num_denoising_steps", "eval.sampling_fps", "guider.scale", "guider.exp", "job.seed")


def is_public(table: Mapping[str, Any]) -> bool:
    """Whether a file has the form of the public code, whose sections have other names than ours."""
    return any(section in table for section in SECTIONS)


def with_placeholders_quoted(text: str) -> str:
    """The eval files hold lines such as `t5_model_dir = TODO`, for users to fill in, which is no TOML."""
    return re.sub(
        r"(?m)^(\s*(?:t5_model_dir|vae_checkpoint_path|dataset_path|jsonl_paths)\s*=\s*)TODO\b", r'\1"TODO"', text
    )


def export_table(table: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """The fields of `export --config` that a file states, and warnings. Raises ConfigError for what cannot be had."""
    public = _public(table)
    model, eval_ = public.model, public.eval
    warnings = _warnings(table, _FOR_EXPORT, _FOR_SAMPLE, "sample --config takes them")
    kind: TTTKind | None = None if model.ssm_layer is None else "mlp" if model.ssm_layer == "ttt_mlp" else "linear"
    preset = presets.preset(model.size, kind or "linear")
    if eval_.latent_channels not in (None, preset.transformer.in_channels):
        cure = f"must be {preset.transformer.in_channels}, those of {model.size}"
        raise ConfigError(f"eval.latent_channels is {eval_.latent_channels}: {cure}")
    mini_batch = model.mini_batch_size
    if kind == "mlp" and mini_batch == 16:
        mini_batch = MLP_MINI_BATCH
        warnings.append(
            f"model.mini_batch_size is 16, but TTT-MLP is trained with mini-batches of {MLP_MINI_BATCH} tokens: "
            f"{MLP_MINI_BATCH} is used"
        )
    length = _length(model.video_length, eval_.sampling_num_frames)
    size = eval_.image_width or preset.width, eval_.image_height or preset.height
    text_lengths = None
    if length is not None and eval_.txt_maxlen is not None:
        # Those of the preset need not fit another size.
        others = preset.text_lengths if size == (preset.width, preset.height) else {}
        text_lengths = others | {length: eval_.txt_maxlen}
    ours = {
        "preset": model.size,
        "ttt": kind,
        "length": length,
        "dtype": eval_.dtype or public.parallelism.fsdp_unsharded_dtype,
        "width": eval_.image_width,
        "height": eval_.image_height,
        "text_lengths": text_lengths,
        "transformer": _stated({"mini_batch_size": mini_batch, "ttt_base_lr": model.ttt_base_lr}),
        "vae": _stated({"scale_factor": eval_.vae_scale_factor}),
        "diffusion": _stated({"shift_scale": public.discretization.shift_scale}),
    }
    return _stated(ours), warnings


def sampling_table(table: Mapping[str, Any]) -> SamplingOptions:
    """What a file states of how to render. Raises ConfigError for guidance that grows with another exponent than 5."""
    public = _public(table)
    if public.guider.exp != 5:
        raise ConfigError(f"guider.exp is {public.guider.exp:g}: must be 5, the exponent with which guidance grows")
    _length(None, public.eval.sampling_num_frames)
    return SamplingOptions(
        num_steps=public.eval.num_denoising_steps,
        guidance_scale=public.guider.scale,
        fps=public.eval.sampling_fps,
        seed=public.job.seed,
        width=public.eval.image_width,
        height=public.eval.image_height,
        num_frames=public.eval.sampling_num_frames,
        dtype=public.eval.dtype,
        warnings=tuple(_warnings(table, _FOR_SAMPLE, _FOR_EXPORT, "export --config takes them")),
    )


def scenes_of_frames(frames: int, field: str) -> int:
    """Scenes of so many latent frames: 12 for each, and one. Raises ConfigError, which names `field`, for others."""
    scenes, rest = divmod(frames - 1, 12)
    if scenes >= 1 and rest == 0:
        return scenes
    least = 12 * max(scenes, 1) + 1
    cure = f"must be one more than a multiple of 12 latent frames, such as {least} or {least + 12}"
    raise ConfigError(f"{field} is {frames}: {cure}")


def _public(table: Mapping[str, Any]) -> _Public:
    for name, value in table.items():
        if not isinstance(value, dict):
            section = next(section for section in SECTIONS if section in table)
            raise ConfigError(f"{name} stands beside [{section}], a section of the public code: leave one of them out")
    public = msgspec.convert(dict(table), _Public)
    # Of the noise schedule there is one table of 1000 steps, and steps are integers already.
    if public.denoiser.num_idx != 1000:
        raise ConfigError(f"denoiser.num_idx is {public.denoiser.num_idx}: must be 1000")
    if public.denoiser.quantize_c_noise:
        raise ConfigError("denoiser.quantize_c_noise is true: must be false")
    return public


def _length(video_length: str | None, num_frames: int | None) -> LengthName | None:
    """What is rendered: the frames decide, as in the public code, where `video_length` sizes tables of angles."""
    if num_frames is not None:
        name = length_name(scenes_of_frames(num_frames, "eval.sampling_num_frames"))
    elif video_length is not None:
        name = video_length.removesuffix("ec")
    else:
        return None
    try:
        num_scenes(name)
    except ConfigError as error:
        field = "model.video_length" if num_frames is None else "eval.sampling_num_frames"
        raise ConfigError(f"{field} is {video_length if num_frames is None else num_frames}: {error}") from error
    return name


def _stated(fields: Table) -> Table:
    return {name: value for name, value in fields.items() if value is not None and value != {}}


def _warnings(table: Mapping[str, Any], taken: Sequence[str], others: Sequence[str], elsewhere: str) -> list[str]:
    """One line for what the other command takes, then one for the fields that have no meaning here for one reason."""
    known = {*taken, *others, *_FOR_BOTH}
    names = [f"{section}.{field}" for section, fields in table.items() for field in fields or ("",)]
    names = [name.removesuffix(".") for name in names]
    theirs = [name for name in names if name in others]
    lines = [f"{_listed(theirs)}: {elsewhere}"] if theirs else []
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name not in known:
            section = name.partition(".")[0]
            why = _WHY.get(name) or _WHY.get(section) or "it is unknown"
            groups.setdefault((section, why), []).append(name)
    return lines + [f"{_listed(group)}: no meaning here, as {why}" for (_, why), group in groups.items()]


def _listed(names: Sequence[str]) -> str:
    return repr(", ".join(names))[1:-1][:300]  # a name in quotes may hold a line break
