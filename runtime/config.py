"""Sizes of the model, as data: what a checkpoint, a preset or a bundle has to state.

Every struct is frozen and checks itself when it is made, so a config that exists is a config that fits.
Sizes: "One-Minute Video Generation with Test-Time Training" (arXiv 2504.05298) and CogVideoX (arXiv 2408.06072).
"""

import re
from collections.abc import Iterable
from math import lcm
from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field
from msgspec.structs import replace

from ttt_video_engine.runtime.errors import ConfigError

TTTKind = Literal["linear", "mlp"]
TTTChoice = Literal["linear", "mlp", "none"]
"""The inner model of the TTT layers; "none" is a model without them: CogVideoX."""
LengthName = str
"""Seconds of a video, such as "9s": what `num_scenes` takes."""

SCENE_SECONDS = 3
SCENES_PER_LENGTH = {"3s": 1, "9s": 3, "18s": 6, "30s": 10, "63s": 21}
"""Length name → number of scenes, for the lengths that the public model was trained with."""
MAX_SCENES = 100
"""Of a video: 5 minutes, nearly five times the longest that was trained. Memory and time grow with the scenes, and
activations of 5B for 21 scenes take 48 GiB in bfloat16: more than 100 fit no GPU there is."""

MAX_SIZE, MAX_COUNT, MAX_LEVELS, MAX_PIXELS = 1 << 18, 1 << 12, 8, 1 << 14
"""Far above any model that there is: widths of layers, numbers of layers and the like, levels of the VAE, pixels."""
MIN_TEXT_LENGTH = 3
"""Tokens of a scene that always stand: scene start, scene end and `</s>`."""
KERNEL_TOKENS = 64
"""The larger of the two mini-batches in use: tokens that fill it fill mini-batches of 16 as well."""


def ttt_label(ttt: str) -> str:
    """What a model of a `TTTChoice` is called: "TTT-linear", or "no TTT"."""
    return "no TTT" if ttt == "none" else f"TTT-{ttt}"


def length_name(scenes: int) -> LengthName:
    """The name of the length that so many scenes make: "9s" for 3."""
    return f"{SCENE_SECONDS * scenes}s"


def num_scenes(length: LengthName) -> int:
    """Scenes of a length: 3 for "9s". Raises ConfigError for what is no multiple of 3 s from 3s to 300s."""
    longest = SCENE_SECONDS * MAX_SCENES
    seconds = int(length[:-1]) if re.fullmatch("[1-9][0-9]{0,5}s", length) else 0
    if 0 < seconds <= longest and seconds % SCENE_SECONDS == 0:
        return seconds // SCENE_SECONDS
    whole = min(max(seconds // SCENE_SECONDS, 1), MAX_SCENES)
    near = f", such as {length_name(whole)} or {length_name(whole + 1)}" if 0 < seconds < longest else ""
    raise ConfigError(f"length is {length[:20]!r}: must be a multiple of {SCENE_SECONDS}s up to {longest}s{near}")


class TransformerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The diffusion transformer: CogVideoX, with TTT layers unless `ttt` is "none".

    `mini_batch_size` is the number of tokens that share one inner gradient step, 1 without TTT; `ttt_base_lr` is the
    inner learning rate before its learned gate. One attention segment is `attn_length` + `prefix_temporal_length`
    latent frames, the last of which the next segment starts with.

    `qk_norm_eps` is that of the norms of queries and keys: `layer_norm_eps` where it is not stated. `rope_grid` is the
    height and width in patches that a frame had in training: the rotary positions of a frame of another size are
    resized to it. Where it is not stated, they count from 0. Fields that are not stated are not written either.
    """

    ttt: TTTChoice
    model_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    time_embed_dim: int
    mini_batch_size: int
    ttt_base_lr: float
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    attn_length: int = 12
    prefix_temporal_length: int = 1
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm_eps: float | UnsetType = UNSET
    rope_grid: tuple[int, int] | UnsetType = UNSET

    def __post_init__(self) -> None:
        _require_range(self, 1, MAX_SIZE, "model_dim", "text_dim", "time_embed_dim", "mini_batch_size")
        _require_range(self, 1, MAX_COUNT, "num_heads", "num_layers", "in_channels", "out_channels", "patch_size")
        _require_range(self, 1, MAX_COUNT, "attn_length")
        _require_range(self, 1e-9, 1e3, "ttt_base_lr")
        _require_range(self, 1e-12, 1.0, "layer_norm_eps")
        if self.qk_norm_eps is not UNSET:
            _require_range(self, 1e-12, 1.0, "qk_norm_eps")
        for side in () if self.rope_grid is UNSET else self.rope_grid:
            _require(1 <= side <= MAX_PIXELS, "rope_grid", self.rope_grid, f"must lie in 1 … {MAX_PIXELS}")
        alone = self.ttt != "none" or self.mini_batch_size == 1
        _require(alone, "mini_batch_size", self.mini_batch_size, "must be 1 without TTT layers (ttt is 'none')")
        _require_range(self, 1.0, 1e9, "rope_theta")
        same = f"must equal in_channels {self.in_channels}"
        _require(self.out_channels == self.in_channels, "out_channels", self.out_channels, same)
        divides = self.model_dim % self.num_heads == 0
        _require(divides, "num_heads", self.num_heads, f"must divide model_dim {self.model_dim}")
        # Rotary embedding gives d/4 channels to time and 3d/8 to each of height and width, in pairs.
        _require(self.head_dim % 16 == 0, "model_dim / num_heads", self.head_dim, "must be a multiple of 16")
        prefix = self.prefix_temporal_length
        fits = 0 < prefix <= self.attn_length
        _require(fits, "prefix_temporal_length", prefix, f"must lie in 1 … attn_length ({self.attn_length})")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def ttt_kind(self) -> TTTKind | None:
        """The kind of the TTT layers; None if there are none."""
        return None if self.ttt == "none" else self.ttt

    @property
    def head_norm_eps(self) -> float:
        """Epsilon of the norms of queries and keys."""
        return self.layer_norm_eps if self.qk_norm_eps is UNSET else self.qk_norm_eps


class VaeConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The causal 3D-VAE decoder.

    Latents are divided by `scale_factor` before decoding: 1.0 for TTT-Video, which is trained on latents as the encoder
    gives them, 0.7 for CogVideoX-5B. Every level but one doubles height and width, the
    `temporal_levels` deepest of them time as well. One step of decoding takes `temporal_window` latent frames, the
    first step one more.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 3
    z_channels: int = 16
    out_ch: int = 3
    scale_factor: float = 1.0
    temporal_levels: int = 2
    temporal_window: int = 2

    def __post_init__(self) -> None:
        _require_range(self, 1, MAX_COUNT, "ch", "num_res_blocks", "z_channels")
        _require(self.out_ch == 3, "out_ch", self.out_ch, "must be 3, the colours of a frame")
        num_levels = len(self.ch_mult)
        _require(1 <= num_levels <= MAX_LEVELS, "ch_mult", self.ch_mult, f"must have 1 … {MAX_LEVELS} levels")
        for mult in self.ch_mult:
            _require(1 <= mult <= MAX_COUNT, "ch_mult", mult, f"must lie in 1 … {MAX_COUNT}")
            channels = self.ch * mult
            _require(channels % 32 == 0, "ch x ch_mult", channels, "must be a multiple of the 32 norm groups")
        _require_range(self, 1e-4, 1e4, "scale_factor")
        _require_range(self, 2, MAX_COUNT, "temporal_window")
        # The first window has one frame more; only an odd window keeps its first frame single.
        _require(self.temporal_window % 2 == 0, "temporal_window", self.temporal_window, "must be even")
        levels = self.temporal_levels
        _require(0 <= levels < num_levels, "temporal_levels", levels, "at most one per upsampling level")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one axis."""
        return 1 << (len(self.ch_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame, after the first."""
        return 1 << self.temporal_levels


class TextEncoderConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """T5 v1.1 encoder. `vocab_size` counts the tokenizer's own tokens and the two scene tokens that follow them."""

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 32102

    def __post_init__(self) -> None:
        _require_range(self, 1, MAX_SIZE, "d_model", "d_kv", "d_ff")
        _require_range(self, 1, MAX_COUNT, "num_layers", "num_heads")
        _require_range(self, 6, 1 << 21, "vocab_size")  # five control and scene tokens, and one piece


class DiffusionConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Training noise schedule: beta linear in its square root, then a shift of the signal-to-noise ratio.

    `sampling_steps` is how the steps of sampling are taken from it, see `schedule.make_schedule`; as TTT-Video does
    where it is not stated.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.0120
    num_train_timesteps: int = 1000
    shift_scale: float = 1.0
    sampling_steps: Literal["ttt-video", "cogvideox"] | UnsetType = UNSET

    def __post_init__(self) -> None:
        _require_range(self, 1e-9, 0.999, "beta_start", "beta_end")
        rises = self.beta_start <= self.beta_end
        _require(rises, "beta_end", self.beta_end, f"must be at least beta_start {self.beta_start}")
        _require_range(self, 1, 100_000, "num_train_timesteps")
        _require_range(self, 1e-6, 1e6, "shift_scale")


class ClipSize(Struct, frozen=True, kw_only=True):
    """One clip as the transformer sees it: frames, height and width are those of the latent."""

    num_scenes: int
    num_frames: int
    height: int
    width: int
    text_length: int

    def num_tokens(self, patch_size: int) -> int:
        """Length of the token sequence: all text, then all video patches."""
        tokens_per_frame = (self.height // patch_size) * (self.width // patch_size)
        return self.num_scenes * self.text_length + self.num_frames * tokens_per_frame


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that fixes the three components and the clips they make.

    `width` and `height` are pixels of the video, `text_lengths` the tokens kept per scene for each length name. A
    length that is not stated there can be had too: `text_length` says with how many tokens.
    """

    name: str
    width: int
    height: int
    text_lengths: dict[str, int]
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        named = 0 < len(self.name) <= 100 and self.name.isprintable()
        _require(named, "name", self.name[:100], "must have 1 … 100 printable characters")
        patch, factor = self.transformer.patch_size, self.vae.spatial_factor
        for name, pixels in (("width", self.width), ("height", self.height)):
            step = patch * factor
            nearest = max(step, (min(pixels, MAX_PIXELS) + step // 2) // step * step)
            cure = f"must be a multiple of {step} (patch {patch} x VAE {factor}), such as {nearest}"
            _require(pixels > 0 and pixels % step == 0, name, pixels, cure)
        _require_range(self, 1, MAX_PIXELS, "width", "height")
        text_dim, d_model = self.transformer.text_dim, self.text_encoder.d_model
        _require(text_dim == d_model, "transformer.text_dim", text_dim, f"must equal text_encoder.d_model {d_model}")
        channels, z = self.transformer.in_channels, self.vae.z_channels
        _require(channels == z, "transformer.in_channels", channels, f"must equal vae.z_channels {z}")
        _require(bool(self.text_lengths), "text_lengths", self.text_lengths, "must name a length")
        for length, tokens in self.text_lengths.items():
            try:
                num_scenes(length)
            except ConfigError as error:
                raise ConfigError(f"text_lengths: {error}") from error
            fits = MIN_TEXT_LENGTH <= tokens <= MAX_SIZE
            _require(fits, f"text_lengths.{length}", tokens, f"must lie in {MIN_TEXT_LENGTH} … {MAX_SIZE}")
            self.clip_size(length)

    def clip_size(self, length: LengthName) -> ClipSize:
        """The clip of a length such as "9s". Raises ConfigError where its tokens do not divide."""
        size = self._clip(length, self.text_length(length))
        window = self.vae.temporal_window
        cure = f"must be one more than a multiple of vae.temporal_window {window}"
        _require(size.num_frames % window == 1, f"latent frames of a {length} video", size.num_frames, cure)
        tokens, mini_batch = size.num_tokens(self.transformer.patch_size), self.transformer.mini_batch_size
        cure = f"must be a multiple of mini_batch_size {mini_batch}; change text_lengths.{length}, width or height"
        _require(tokens % mini_batch == 0, f"tokens of a {length} video", tokens, cure)
        return size

    def text_length(self, length: LengthName) -> int:
        """Tokens kept per scene, N: stated, else the most with which the clip fills whole mini-batches.

        That is the largest N, up to the largest that is stated, for which S·N text tokens and the video's fill
        mini-batches of both 64 and `mini_batch_size`, else of `mini_batch_size` alone. Without TTT there are no
        mini-batches, and N is the largest that is stated. Raises ConfigError where there is no N: with 1350 tokens a
        frame, as at 720x480, no number of scenes that 4 divides has one.
        """
        if length in self.text_lengths:
            return self.text_lengths[length]
        found = self._fitting_text_length(num_scenes(length))
        if found is not None:
            return found
        scenes = num_scenes(length)
        fitting = [other for other in range(1, MAX_SCENES + 1) if self._fitting_text_length(other) is not None]
        near = sorted(sorted(fitting, key=lambda other: abs(other - scenes))[:2])
        cure = f"take {' or '.join(map(length_name, near))}" if near else "change width or height"
        raise ConfigError(
            f"length is {length!r}: with {scenes} scenes of {self.width}x{self.height} no text length fills whole "
            f"mini-batches of {self.transformer.mini_batch_size} tokens (mini_batch_size); {cure}"
        )

    def stating(self, lengths: Iterable[LengthName]) -> "ModelConfig":
        """This model with the text length of each of `lengths` stated; equal to it where they are."""
        return replace(self, text_lengths=self.text_lengths | {length: self.text_length(length) for length in lengths})

    def _clip(self, length: LengthName, text_length: int) -> ClipSize:
        scenes = num_scenes(length)
        return ClipSize(
            num_scenes=scenes,
            num_frames=self.transformer.attn_length * scenes + self.transformer.prefix_temporal_length,
            height=self.height // self.vae.spatial_factor,
            width=self.width // self.vae.spatial_factor,
            text_length=text_length,
        )

    def _fitting_text_length(self, scenes: int) -> int | None:
        most, mini_batch = max(self.text_lengths.values()), self.transformer.mini_batch_size
        video = self._clip(length_name(scenes), 0).num_tokens(self.transformer.patch_size)
        for step in (lcm(KERNEL_TOKENS, mini_batch), mini_batch) if self.transformer.ttt_kind else (1,):
            # What a text length leaves over repeats after `step` of them.
            least = max(MIN_TEXT_LENGTH, most - step + 1)
            found = next((n for n in range(most, least - 1, -1) if (scenes * n + video) % step == 0), None)
            if found is not None:
                return found
        return None

    def num_video_frames(self, size: ClipSize) -> int:
        """Decoded frames of a clip: one for the first latent frame, `temporal_factor` for every other."""
        return 1 + self.vae.temporal_factor * (size.num_frames - 1)


def _require_range(struct: Struct, low: float, high: float, *names: str) -> None:
    """NaN lies in no range."""
    for name in names:
        value = getattr(struct, name)
        _require(low <= value <= high, name, value, f"must lie in {low} … {high}")


def _require(condition: bool, name: str, value: object, cure: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {_shown(value)}: {cure}")


def _shown(value: object) -> str:
    """The value as text. Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    return repr(value)
