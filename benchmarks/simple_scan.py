"""A simple TTT-Linear kernel, the baseline for the optimised one: the scan of the reference, tokens by channels."""

import triton
import triton.language as tl


@triton.jit
def simple_linear(
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
    rows, columns = tl.arange(0, C), tl.arange(0, F)
    tile = rows[:, None] * F + columns[None, :]
    gamma = tl.load(norm_weight + head * F + columns).to(tl.float32)[None, :]
    beta = tl.load(norm_bias + head * F + columns).to(tl.float32)[None, :]
    W = tl.load(W1 + head * F * F + columns[:, None] * F + columns[None, :]).to(tl.float32)
    b = tl.load(b1 + head * F + columns).to(tl.float32)[None, :]
    token = program.to(tl.int64) * num_mini_batches * C
    for _ in range(num_mini_batches):
        q = tl.load(XQ + token * F + tile).to(tl.float32)
        k = tl.load(XK + token * F + tile).to(tl.float32)
        v = tl.load(XV + token * F + tile).to(tl.float32)
        rate = tl.load(eta + token + rows)[:, None]
        z = tl.dot(k, W, input_precision=PRECISION) + b
        centred = z - (tl.sum(z, axis=1) / F)[:, None]
        std = tl.sqrt(tl.sum(centred * centred, axis=1) / F + 1e-6)[:, None]
        x_hat = centred / std
        grad = (gamma * x_hat + beta - (v - k)) * gamma
        along = (tl.sum(grad * x_hat, axis=1) / F)[:, None]
        step = (grad - (tl.sum(grad, axis=1) / F)[:, None] - x_hat * along) / std * rate
        W -= tl.dot(tl.trans(k), step, input_precision=PRECISION)
        b -= tl.sum(step, axis=0)[None, :]
        z = tl.dot(q, W, input_precision=PRECISION) + b
        centred = z - (tl.sum(z, axis=1) / F)[:, None]
        std = tl.sqrt(tl.sum(centred * centred, axis=1) / F + 1e-6)[:, None]
        tl.store(XQW + token * F + tile, (q + gamma * centred / std + beta).to(XQW.dtype.element_ty))
        token += C
