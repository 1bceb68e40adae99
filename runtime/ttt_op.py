"""The custom ONNX operators of the TTT layers: the exporter emits them, plugins and kernels implement them."""

from ttt_video_engine.runtime.config import TTTKind

DOMAIN = "ai.ttt"
VERSION = 1
OP_TYPES: dict[TTTKind, str] = {"linear": "TTTLinear", "mlp": "TTTMLP"}
INPUTS: dict[TTTKind, tuple[str, ...]] = {
    "linear": ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", "W1", "b1"),
    "mlp": ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", "W1", "b1", "W2", "b2"),
}
"""Shapes, with B batch, H heads, NC mini-batches, CS tokens of a mini-batch, F head dimension, K = 4F:

XQ, XK, XV and the output [B, H, NC, CS, F]; eta [B, H, NC, CS], always float32; norm_weight, norm_bias [H, F];
linear: W1 [H, F, F], b1 [H, 1, F]; mlp: W1 [H, F, K], b1 [H, 1, K], W2 [H, K, F], b2 [H, 1, F].
"""
