"""The dtypes of a model, of its weights and of its tensors, by their names, and how weights lie in a file."""

from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
"""Precision of weights and activations."""

TensorDType = Literal["float32", "float16", "bfloat16", "int64"]
"""What a graph's inputs and outputs may have."""

Precision = Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]
"""What a user may call a DType."""

DTYPES: dict[Precision, DType] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}

ITEM_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

WEIGHT_ALIGNMENT = 4096
"""Bytes that the place of each weight in a data file is a multiple of: whole pages, so that a runtime can map weights
instead of reading them."""
