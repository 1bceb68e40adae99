"""Which weights of a transformer an int8 bundle holds as integers, and what such a bundle excludes."""

import re
from typing import Literal

from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import ConfigError

Quantization = Literal["none", "int8"]
"""How the matrices of the transformer's layers are stored and multiplied: as the other weights are, or in int8."""

INTEGERS, SCALES = ".int8", ".scale"
"""Suffixes of the two tensors that take the place of a quantised weight."""

_QUANTIZED = re.compile(r"(.*\.)?layers\.\d+\.(seq_modeling_block\.([qkvo]|ssm\.ttt\.w[qkvo])|mlp\.layer[12])\.weight")


def is_quantized(name: str) -> bool:
    """Whether an int8 bundle holds the transformer's weight of this name in int8.

    Those are the matrices that every token of every layer is multiplied with: nearly all of a step's arithmetic. The
    first and the last projection and what the timestep modulates are few, and stay in float32.
    """
    return _QUANTIZED.fullmatch(name) is not None


def precision(dtype: DType, quantize: Quantization) -> str:
    """In words: "float32", or "float32 with int8"."""
    return dtype if quantize == "none" else f"{dtype} with {quantize}"


def check_quantization(quantize: Quantization, dtype: DType, *, tensorrt: bool = False) -> None:
    """Raises ConfigError for int8 beside another precision than float32, or beside TensorRT."""
    if quantize == "none":
        return
    if dtype != "float32":
        raise ConfigError(
            f"--quantize {quantize} and --dtype {dtype}: the rest of an int8 bundle is in float32; leave one out"
        )
    if tensorrt:
        raise ConfigError(
            f"--quantize {quantize} and --engine tensorrt: int8 bundles are for CPUs; use --dtype bfloat16 on a GPU"
        )
