"""Sampling settings: the options of `sample`, for which a bundle may state defaults."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from ttt_video_engine.runtime.config import TTTChoice

Guidance = Literal["dynamic", "upstream", "constant"]
Sampler = Literal["ddim", "dpmpp-2m-sde"]
Codec = Literal["h264", "hevc", "av1"]
BackendName = Literal["onnxruntime", "tensorrt", "torch"]
"""What runs the components: the values of `--engine` where videos are made."""
GraphBackend = Literal["onnxruntime", "tensorrt"]
"""What runs ONNX graphs, or engines that are built from them. torch needs no graph, only the weights."""
MAX_SEED = (1 << 63) - 1
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
"""The seeds that both NumPy and torch accept."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sampling settings, recorded in the sidecar of each video. The defaults are those that TTT-Video documents.

    `low_memory` runs the two branches of guidance one after the other: half the activations, the same video up to
    rounding. `seed` is the seed of the noise. `fps`, `codec` and `crf` are those of the mp4; a `crf` of None is the
    codec's default. `guidance_interval` is the share of the steps, from LO to HI, that is guided, None all of them;
    `step_cache` is the deviation below which a step reuses the last pass of the transformer (see `passes.py`), None
    never.
    """

    num_steps: int = 50
    guidance_scale: float = 6.0
    guidance: Guidance = "dynamic"
    sampler: Sampler = "ddim"
    fps: float = 16
    codec: Codec = "h264"
    crf: int | None = None
    seed: Seed = 42
    low_memory: bool = False
    guidance_interval: tuple[float, float] | None = None
    step_cache: Annotated[float, Meta(gt=0)] | None = None


FAST: dict[str, Any] = {"num_steps": 20}
"""What `sample --fast` changes: a share of the passes at no loss that docs/quality.md could measure."""


def settings_for(ttt: TTTChoice) -> Settings:
    """The settings that a model's authors use. CogVideoX: 8 frames per second, and the same guidance in every step."""
    return Settings(fps=8, guidance="constant") if ttt == "none" else Settings()
