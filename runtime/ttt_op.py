"""The custom ONNX operators of the TTT layers: the exporter emits them, plugins and kernels implement them.

Version 1 is the scan alone, of packed heads in the order of the scan. Version 2 takes the projections of the layer, and
has everything up to the norm of the layer's output; exports write it. TensorRT plugins implement both.
"""

from typing import Literal

from ttt_video_engine.runtime.config import TTTKind

OpVersion = Literal[1, 2]

DOMAIN = "ai.ttt"
VERSION: OpVersion = 1
PROJECTIONS_VERSION: OpVersion = 2
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
"""
