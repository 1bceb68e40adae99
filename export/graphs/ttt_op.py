"""The TTT scan as an ONNX operator: a node `ai.ttt::TTTLinear` or `ai.ttt::TTTMLP`, and its function body.

A TensorRT plugin implements the node. The body, an ONNX function of the same name in standard operators, computes the
recurrence of `reference/ttt.py` with few operators per mini-batch. Values that do not depend on the inner weights are
computed for the whole sequence: targets before the loop, the norm of the outputs after it.

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

from ttt_video_engine.reference.ttt_layer import TTTLayer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, VERSION


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


def function_body(kind: TTTKind, opset: int) -> onnx.FunctionProto:
    """The node's function in standard operators. `opset` must be that of the model."""
    function = onnx.parser.parse_function({"linear": _LINEAR, "mlp": _MLP}[kind])
    function.opset_import.append(onnx.helper.make_opsetid("", opset))
    return function


def add_function_body(model: onnx.ModelProto, kind: TTTKind) -> None:
    """Adds the function that defines TTT nodes to a model that has them."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    model.functions.append(function_body(kind, opset))
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


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

# One mini-batch: the backward pass of LayerNorm, from z [B, H, C, F], the inner output for k, to `projected`.
# The step is `projected` times the learning rate of the token over std. TensorRT's parser does not support
# LayerNormalization with more than one output, so the standard deviation is computed here.
_INNER_GRADIENT = """
      z_mean = ReduceMean (z, last_axis)
      centred = Sub (z, z_mean)
      squares = ReduceSumSquare (centred, last_axis)
      variance = Mul (squares, one_over_head_dim)
      variance_eps = Add (variance, epsilon)
      std = Sqrt (variance_eps)
      normalised = Div (centred, std)
      scaled = Mul (gamma_squared, normalised)
      grad = Sub (scaled, target)
      grad_mean = ReduceMean (grad, last_axis)
      grad_along = Mul (grad, normalised)
      along_mean = ReduceMean (grad_along, last_axis)
      along = Mul (normalised, along_mean)
      without_mean = Sub (grad, grad_mean)
      projected = Sub (without_mean, along)
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
      kW = MatMul (k, W)
      z = Add (kW, b)
{_INNER_GRADIENT}
      rate_over_std = Div (rate_j, std)
      step = Mul (projected, rate_over_std)
      W_step = MatMul (k_T, step)
      W_next = Sub (W, W_step)
      b_step = ReduceSum (step, token_axis)
      b_next = Sub (b, b_step)
      qW = MatMul (q, W_next)
      z_q = Add (qW, b_next)
    }}>
{_EPILOGUE}
}}
"""

# GELU in tanh form is x·σ(u) with u = √(8/π)·(x + 0.044715x³), because ½(1 + tanh(u/2)) = σ(u). That saves elementwise
# passes over the hidden layer. Its derivative is σ + x·σ·(1 − σ)·u′, with u′ = u_linear + 3·u_cubic·x².
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
    one = Constant <value_float = 1.0> ()
    three = Constant <value_float = 3.0> ()
    u_linear = Constant <value_float = 1.59576912> ()
    u_cubic = Constant <value_float = 0.0713548163> ()
    W1_last, b1_last, W2_last, b2_last, z_read =
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
      kW1 = MatMul (k, W1_j)
      z1 = Add (kW1, b1_j)
      z1_squared = Mul (z1, z1)
      cubic_term = Mul (z1_squared, u_cubic)
      u_over_z1 = Add (cubic_term, u_linear)
      u = Mul (z1, u_over_z1)
      cdf = Sigmoid (u)
      hidden = Mul (z1, cdf)
      hW2 = MatMul (hidden, W2_j)
      z = Add (hW2, b2_j)
{_INNER_GRADIENT}
      rate_over_std = Div (rate_j, std)
      step2 = Mul (projected, rate_over_std)
      W2_T = Transpose <perm = [0, 1, 3, 2]> (W2_j)
      step_hidden = MatMul (step2, W2_T)
      slope_cubic = Mul (cubic_term, three)
      u_slope = Add (slope_cubic, u_linear)
      one_minus_cdf = Sub (one, cdf)
      hidden_slope = Mul (hidden, one_minus_cdf)
      slope_product = Mul (hidden_slope, u_slope)
      gelu_slope = Add (slope_product, cdf)
      step1 = Mul (step_hidden, gelu_slope)
      W1_step = MatMul (k_T, step1)
      W1_next = Sub (W1_j, W1_step)
      b1_step = ReduceSum (step1, token_axis)
      b1_next = Sub (b1_j, b1_step)
      hidden_T = Transpose <perm = [0, 1, 3, 2]> (hidden)
      W2_step = MatMul (hidden_T, step2)
      W2_next = Sub (W2_j, W2_step)
      b2_step = ReduceSum (step2, token_axis)
      b2_next = Sub (b2_j, b2_step)
      qW1 = MatMul (q, W1_next)
      q1 = Add (qW1, b1_next)
      q_hidden = Gelu <approximate = "tanh"> (q1)
      qW2 = MatMul (q_hidden, W2_next)
      z_q = Add (qW2, b2_next)
    }}>
{_EPILOGUE}
}}
"""
