"""Names of the dtypes of models and tensors, and the alignment of weights in a file."""

from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
"""Precision of weights and activations."""

TensorDType = Literal["float32", "float16", "bfloat16", "int64"]
"""Dtypes of a graph's inputs and outputs."""

Precision = Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]
"""The names of a DType that options and config files accept."""

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
"""The offset of each weight in a data file is a multiple of this many bytes: whole pages, so that a runtime can map
weights instead of reading them."""
