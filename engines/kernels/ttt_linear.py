"""TTT-Linear as a Triton kernel: the scan of `reference/ttt.py`, one program per batch and head.

The inner weights stay in registers in float32 from the first mini-batch to the last. Tensors are contiguous, in the
shapes of `ai.ttt::TTTLinear`: XQ, XK, XV, XQW [B, H, N, C, F], eta [B, H, N, C] in float32, norm weight and bias
[H, F], W1 [H, F, F], b1 [H, 1, F]. Tiles are transposed, see `tiles.py`. With RESUMED, W1 and b1 are the state of a
scan, in float32 and with a batch axis in front: the scan goes on from it and leaves it.

Three things keep a mini-batch short, because each one waits for the weights of the one before:

- It is loaded while the one before is computed.
- The queries of the one before are read in the same turn: both need the same weights, and share a reduction.
- W1 and b1 are centred once, see `centred`. So z has no mean, and all sums over channels that a step needs are sums of
  known terms: one reduction for z, its gradient and the queries, see `loss_sums`.
"""

import triton
import triton.language as tl

from ttt_video_engine.engines.kernels.tiles import (
    centred,
    load_transposed,
    loss_step,
    loss_sums,
    product,
    read_norm,
    store_transposed,
    tile_offsets,
)


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
    RESUMED: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % num_heads
    owner = program if RESUMED else head
    channels = tl.arange(0, F)
    gamma_F = tl.load(norm_weight + head * F + channels).to(tl.float32)
    beta_F = tl.load(norm_bias + head * F + channels).to(tl.float32)
    W_FF = centred(load_transposed(W1, owner * F, F, F), F)
    b_F = centred(tl.load(b1 + owner * F + channels).to(tl.float32), F)

    tile, tokens = tile_offsets(0, C, F, F), tl.arange(0, C)
    token = program.to(tl.int64) * num_mini_batches * C  # all heads of a clip have more than 2^31 elements
    k_FC = tl.load(XK + token * F + tile)
    v_FC = tl.load(XV + token * F + tile)
    rate_C = tl.load(eta + token + tokens)
    q_FC = tl.load(XQ + token * F + tile)
    for i in range(num_mini_batches):
        following = token + tl.where(i + 1 < num_mini_batches, C, 0)
        next_k_FC = tl.load(XK + following * F + tile)
        next_v_FC = tl.load(XV + following * F + tile)
        next_rate_C = tl.load(eta + following + tokens)
        next_q_FC = tl.load(XQ + token * F + tile)  # of this mini-batch: queries are read one turn later

        z_FC = product(W_FF, k_FC, PRECISION) + b_F[:, None]
        read_FC = product(W_FF, q_FC, PRECISION) + b_F[:, None]
        offset_FC = (beta_F[:, None] + k_FC.to(tl.float32) - v_FC.to(tl.float32)) * gamma_F[:, None]
        sums = loss_sums(z_FC, offset_FC, read_FC, gamma_F)
        step_FC = loss_step(z_FC, offset_FC, rate_C, gamma_F, sums, F)
        W_FF -= product(step_FC, tl.trans(k_FC), PRECISION)
        b_F -= tl.sum(step_FC, axis=1)

        out_FC = q_FC.to(tl.float32) + read_norm(read_FC, sums[5], gamma_F, beta_F, F)
        tl.store(XQW + (token - C) * F + tile, out_FC.to(XQW.dtype.element_ty), mask=i > 0)
        k_FC, v_FC, rate_C, q_FC = next_k_FC, next_v_FC, next_rate_C, next_q_FC
        token += C

    read_FC = product(W_FF, q_FC, PRECISION) + b_F[:, None]
    out_FC = q_FC.to(tl.float32) + read_norm(read_FC, tl.sum(read_FC * read_FC, axis=0), gamma_F, beta_F, F)
    tl.store(XQW + (token - C) * F + tile, out_FC.to(XQW.dtype.element_ty))
    if RESUMED:
        store_transposed(W1, owner * F, W_FF, F, F)
        tl.store(b1 + owner * F + channels, b_F)
