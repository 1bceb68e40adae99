"""How to render: the choices of `sample`, and what a bundle proposes for them."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Guidance = Literal["dynamic", "upstream", "constant"]
Sampler = Literal["ddim", "dpmpp-2m-sde"]
BackendName = Literal["onnxruntime", "tensorrt"]
"""What runs the graphs: the values of `--engine`."""
MAX_SEED = (1 << 63) - 1
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
"""What both numpy and torch take."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Recorded beside every video; the defaults are the documented ones of TTT-Video.

    `low_memory` runs the two branches of guidance one after the other: half the activations, the same video up to
    rounding. `fps` is the rate of the mp4, `seed` that of the noise.
    """

    num_steps: int = 50
    guidance_scale: float = 6.0
    guidance: Guidance = "dynamic"
    sampler: Sampler = "ddim"
    fps: float = 16
    seed: Seed = 42
    low_memory: bool = False
