"""TTT-Linear as a Triton kernel: the scan of `reference/ttt.py`, one program per batch and head.

The inner weights stay in registers in float32 from the first mini-batch to the last. Tensors are contiguous, in the
shapes of `ai.ttt::TTTLinear`: XQ, XK, XV, XQW [B, H, N, C, F], eta [B, H, N, C] in float32, norm weight and bias
[H, F], W1 [H, F, F], b1 [H, 1, F]. Tiles are transposed, see `tiles.py`.
"""

import triton
import triton.language as tl

from ttt_video_engine.engines.kernels.tiles import load_transposed, loss_step, normalise, product, store_transposed


@triton.jit
def ttt_linear(
    XQ,
    XK,
    XV,
    eta,
    norm_weight,
    norm_bias,
    W1,
    b1,
    XQW,
    num_heads,
    num_mini_batches,
    C: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % num_heads
    channels = tl.arange(0, F)
    gamma_F = tl.load(norm_weight + head * F + channels).to(tl.float32)
    beta_F = tl.load(norm_bias + head * F + channels).to(tl.float32)
    W_FF = load_transposed(W1, head * F, F, F)
    b_F = tl.load(b1 + head * F + channels).to(tl.float32)

    token = program.to(tl.int64) * num_mini_batches * C  # all heads of a clip have more than 2^31 elements
    for _ in range(num_mini_batches):
        k_FC = load_transposed(XK, token, C, F)
        q_FC = load_transposed(XQ, token, C, F)
        target_FC = load_transposed(XV, token, C, F) - k_FC
        rate_C = tl.load(eta + token + tl.arange(0, C))

        z_FC = product(W_FF, k_FC, PRECISION) + b_F[:, None]
        step_FC = loss_step(z_FC, target_FC, rate_C, gamma_F, beta_F, F)

        # Queries use the new weights, W − step·kᵀ and b − Σ step, written as W·q + b − step·(kᵀ·q + 1). So only the
        # last product depends on the step, and the next mini-batch depends on none of it.
        attention_CC = product(tl.trans(k_FC), q_FC, PRECISION) + 1.0
        read_FC = product(W_FF, q_FC, PRECISION) + b_F[:, None] - product(step_FC, attention_CC, PRECISION)

        W_FF -= product(step_FC, tl.trans(k_FC), PRECISION)
        b_F -= tl.sum(step_FC, axis=1)

        normalised_FC, _ = normalise(read_FC, F)
        store_transposed(XQW, token, q_FC + normalised_FC * gamma_F[:, None] + beta_F[:, None], C, F)
        token += C
