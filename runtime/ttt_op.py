"""The custom ONNX operators of the TTT layers: the exporter emits them, plugins and kernels implement them.

Version 1 is the scan alone, of packed heads in the order of the scan. Version 2 takes the projections of the layer, and
has everything up to the norm of the layer's output; exports in float32 write it. Version 3 is a part of that scan: it
also takes the state of the part before and gives its own; exports in half precision write it. TensorRT plugins
implement all.
"""

from typing import Literal

from ttt_video_engine.runtime.config import ClipSize, TransformerConfig, TTTKind
from ttt_video_engine.runtime.dtypes import DType

OpVersion = Literal[1, 2, 3]

DOMAIN = "ai.ttt"
VERSION: OpVersion = 1
PROJECTIONS_VERSION: OpVersion = 2
PART_VERSION: OpVersion = 3
COLLECTIVE = "DistCollective"
"""TensorRT's operator between devices, in the same domain. ONNX Runtime has none of its own: `engines/exchange.py`."""
OP_TYPES: dict[TTTKind, str] = {"linear": "TTTLinear", "mlp": "TTTMLP"}
INPUTS: dict[TTTKind, tuple[str, ...]] = {
    "linear": ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", "W1", "b1"),
    "mlp": ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", "W1", "b1", "W2", "b2"),
}
"""Shapes, with B batch, H heads, NC mini-batches, CS tokens of a mini-batch, F head dimension, K = 4F:

XQ, XK, XV and the output [B, H, NC, CS, F]; eta [B, H, NC, CS], always float32; norm_weight, norm_bias [H, F];
linear: W1 [H, F, F], b1 [H, 1, F]; mlp: W1 [H, F, K], b1 [H, 1, K], W2 [H, K, F], b2 [H, 1, F].
"""

_PROJECTIONS = ("XQ", "XK", "XV", "rate_logits", "rate_scale", "cos", "sin", "tokens", "rate_tokens")
PROJECTIONS_INPUTS: dict[TTTKind, tuple[str, ...]] = {
    kind: (*_PROJECTIONS, *INPUTS[kind][INPUTS[kind].index("norm_weight") :]) for kind in OP_TYPES
}
"""Version 2, with L = NC·CS tokens, D = H·F:

XQ, XK, XV and the output [B, L, D] are in the order of the model's tokens. rate_logits [B, L, H]: their sigmoid times
rate_scale [], float32, is the learning rate. tokens [NC, CS], int32: the token at each place of the scan. rate_tokens
[NC, CS], int32: the token whose learning rate that place takes. Each token occurs once in either. cos, sin
[NC, CS, F/2], float32: the rotary embedding of each place, for pairs of neighbouring channels. Norms and inner weights
are as in version 1.

Version 3 has the same inputs, where L are the tokens of a part of the clip. Inner weights are a state, float32 with the
batch as their first axis: W1 [B, H, F, F], and so on. Further outputs are the state that the part leaves.
"""
SCAN_PARTS = 3
"""Parts of a scan in half precision, at most. q, k and v of one part are in memory at a time."""


def num_scan_parts(num_scenes: int, num_mini_batches: int) -> int:
    """Parts of the scan of a clip in half precision. One scene is short enough to be scanned as a whole."""
    return min(SCAN_PARTS, num_scenes, num_mini_batches)


def exported_version(dtype: DType) -> OpVersion:
    """The version that an export writes, where nothing demands another one."""
    return PROJECTIONS_VERSION if dtype == "float32" else PART_VERSION


def num_scans(config: TransformerConfig, size: ClipSize, version: OpVersion) -> int:
    """TTT nodes in the graph of a clip: both directions of each layer, of version 3 in parts."""
    mini_batches = size.num_tokens(config.patch_size) // config.mini_batch_size
    return 2 * config.num_layers * (num_scan_parts(size.num_scenes, mini_batches) if version == PART_VERSION else 1)
