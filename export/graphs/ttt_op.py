"""The TTT scan as an ONNX operator: a node `ai.ttt::TTTLinear` or `ai.ttt::TTTMLP`, and its function body.

This is version 1; `projections_op.py` has version 2, `scan_parts.py` version 3. The body, an ONNX function of the same
name in standard operators, computes the recurrence of `reference/ttt.py` with few operators per mini-batch. Values that
do not depend on the inner weights are computed for the whole sequence: targets before the loop, the norm of the outputs
after it.

Shapes, with NC mini-batches of C tokens, H heads of size F and the MLP's hidden size K: XQ, XK and XV [B, H, NC, C, F];
eta [B, H, NC, C]; norm_weight and norm_bias [H, F]; TTT-Linear's W1 [H, F, F] and b1 [H, 1, F]; TTT-MLP's W1 [H, F, K],
b1 [H, 1, K], W2 [H, K, F] and b2 [H, 1, F].
"""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx.parser
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from ttt_video_engine.export.graphs.projections_body import projections_body
from ttt_video_engine.export.graphs.ttt_steps import LINEAR_STEP, MLP_CONSTANTS, MLP_STEP
from ttt_video_engine.reference.ttt_layer import TTTLayer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, VERSION, OpVersion


@contextmanager
def scans_as_nodes(module: nn.Module, kind: TTTKind) -> Iterator[None]:
    """Within the block, the scan of every TTT layer of `module` is traced as one custom node."""

    def scan(queries: Tensor, *rest: Tensor) -> Tensor:
        # TensorRT's parser uses a plugin only if the node has the plugin's namespace as an attribute.
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_TYPES[kind]}",
            (queries, *rest),
            {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)},
            dtype=queries.dtype,
            shape=queries.shape,
            version=VERSION,
        )

    layers = [layer for layer in module.modules() if isinstance(layer, TTTLayer)]
    for layer in layers:
        layer.scan = scan
    try:
        yield
    finally:
        for layer in layers:
            del layer.scan  # restores the method of the class


def function_body(kind: TTTKind, opset: int, version: OpVersion = VERSION) -> onnx.FunctionProto:
    """The node's function in standard operators. `opset` must be that of the model."""
    text = {"linear": _LINEAR, "mlp": _MLP}[kind] if version == VERSION else projections_body(kind, version)
    function = onnx.parser.parse_function(text)
    function.opset_import.append(onnx.helper.make_opsetid("", opset))
    return function


def add_function_body(model: onnx.ModelProto, kind: TTTKind, version: OpVersion = VERSION) -> None:
    """Adds the function that defines TTT nodes of a version to a model that has them."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    model.functions.append(function_body(kind, opset, version))
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))


def inline_function_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each TTT node replaced by its body, for runtimes that do not support functions.

    Weights keep their names and byte ranges. onnx's own inliner would leave the domain among the opset imports.
    """
    inlined = ir.from_proto(model)
    passes.InlinePass()(inlined)
    passes.RemoveUnusedOpsetsPass()(inlined)
    return ir.to_proto(inlined)


# Before the loop. `target` is γ·(v − k − β), so that the gradient of the inner loss with respect to the normalised
# output x̂ is γ²·x̂ − target. Shapes: target_all [B, H, NC, C, F], rate [B, H, NC, C, 1], gamma [H, 1, F], gamma_all and
# beta_all [H, 1, 1, F]. Inner weights may have a batch axis or not.
_PROLOGUE = """
    Q = Cast <to = 1> (XQ)
    K = Cast <to = 1> (XK)
    V = Cast <to = 1> (XV)
    last_axis = Constant <value_ints = [-1]> ()
    token_axis = Constant <value_ints = [-2]> ()
    row_axes = Constant <value_ints = [1, 2]> ()
    eta_rate = Cast <to = 1> (eta)
    rate = Unsqueeze (eta_rate, last_axis)
    norm_weight_32 = Cast <to = 1> (norm_weight)
    norm_bias_32 = Cast <to = 1> (norm_bias)
    gamma_all = Unsqueeze (norm_weight_32, row_axes)
    beta_all = Unsqueeze (norm_bias_32, row_axes)
    V_minus_K = Sub (V, K)
    residual = Sub (V_minus_K, beta_all)
    target_all = Mul (residual, gamma_all)
    one_axis = Constant <value_ints = [1]> ()
    gamma = Unsqueeze (norm_weight_32, one_axis)
    gamma_squared = Mul (gamma, gamma)
    batch_and_heads = Shape <start = 0, end = 2> (XQ)
    num_mini_batches = Shape <start = 2, end = 3> (XQ)
    head_dim = Shape <start = 4, end = 5> (XQ)
    unit = ConstantOfShape <value = float[1] {1.0}> (head_dim)
    head_dim_32 = Cast <to = 1> (head_dim)
    one_over_head_dim = Reciprocal (head_dim_32)
    epsilon = Constant <value_float = 1e-6> ()
    go_on = Constant <value = bool {1}> ()
"""

# After the loop: q + LN(f(q)) for all queries at once. z_read [NC, B, H, C, F] becomes [B, H, NC, C, F].
_EPILOGUE = """
    read = Transpose <perm = [1, 2, 0, 3, 4]> (z_read)
    read_normalised = LayerNormalization <axis = -1, epsilon = 1e-6> (read, unit)
    read_scaled = Mul (read_normalised, gamma_all)
    read_shifted = Add (read_scaled, beta_all)
    result = Add (Q, read_shifted)
    XQW = CastLike (result, XQ)
"""

_LINEAR = f"""
<domain: "{DOMAIN}", opset_import: []>
TTTLinear (XQ, XK, XV, eta, norm_weight, norm_bias, W1, b1) => (XQW)
{{
{_PROLOGUE}
    W1_32 = Cast <to = 1> (W1)
    b1_32 = Cast <to = 1> (b1)
    W1_size = Shape <start = -2> (W1)
    b1_size = Shape <start = -2> (b1)
    W1_shape = Concat <axis = 0> (batch_and_heads, W1_size)
    b1_shape = Concat <axis = 0> (batch_and_heads, b1_size)
    W1_first = Expand (W1_32, W1_shape)
    b1_first = Expand (b1_32, b1_shape)
    W1_last, b1_last, z_read = Loop (num_mini_batches, go_on, W1_first, b1_first) <body = mini_batch (
      int64 j, bool go, float[B, H, F, F] W, float[B, H, 1, F] b
    ) => (bool go_next, float[B, H, F, F] W_next, float[B, H, 1, F] b_next, float[B, H, C, F] z_q) {{
      go_next = Identity (go)
      k = Gather <axis = 2> (K, j)
      k_T = Transpose <perm = [0, 1, 3, 2]> (k)
      q = Gather <axis = 2> (Q, j)
      target = Gather <axis = 2> (target_all, j)
      rate_j = Gather <axis = 2> (rate, j)
{LINEAR_STEP}    }}>
{_EPILOGUE}
}}
"""

_MLP = f"""
<domain: "{DOMAIN}", opset_import: []>
TTTMLP (XQ, XK, XV, eta, norm_weight, norm_bias, W1, b1, W2, b2) => (XQW)
{{
{_PROLOGUE}
    W1_32 = Cast <to = 1> (W1)
    b1_32 = Cast <to = 1> (b1)
    W2_32 = Cast <to = 1> (W2)
    b2_32 = Cast <to = 1> (b2)
    W1_size = Shape <start = -2> (W1)
    b1_size = Shape <start = -2> (b1)
    W2_size = Shape <start = -2> (W2)
    b2_size = Shape <start = -2> (b2)
    W1_shape = Concat <axis = 0> (batch_and_heads, W1_size)
    b1_shape = Concat <axis = 0> (batch_and_heads, b1_size)
    W2_shape = Concat <axis = 0> (batch_and_heads, W2_size)
    b2_shape = Concat <axis = 0> (batch_and_heads, b2_size)
    W1_first = Expand (W1_32, W1_shape)
    b1_first = Expand (b1_32, b1_shape)
    W2_first = Expand (W2_32, W2_shape)
    b2_first = Expand (b2_32, b2_shape)
{MLP_CONSTANTS}    W1_last, b1_last, W2_last, b2_last, z_read =
      Loop (num_mini_batches, go_on, W1_first, b1_first, W2_first, b2_first) <body = mini_batch (
      int64 j, bool go, float[B, H, F, K] W1_j, float[B, H, 1, K] b1_j, float[B, H, K, F] W2_j, float[B, H, 1, F] b2_j
    ) => (
      bool go_next,
      float[B, H, F, K] W1_next, float[B, H, 1, K] b1_next, float[B, H, K, F] W2_next, float[B, H, 1, F] b2_next,
      float[B, H, C, F] z_q
    ) {{
      go_next = Identity (go)
      k = Gather <axis = 2> (K, j)
      k_T = Transpose <perm = [0, 1, 3, 2]> (k)
      q = Gather <axis = 2> (Q, j)
      target = Gather <axis = 2> (target_all, j)
      rate_j = Gather <axis = 2> (rate, j)
{MLP_STEP}    }}>
{_EPILOGUE}
}}
"""
