"""The kernels around the scan that versions 2 and 3 of the TTT operator need. They work through a clip in chunks.

`ttt_start` copies the inner weights into a state in float32, one for each batch element. Compiled for float32, and with
as many heads as programs, it copies a state. For each chunk of G mini-batches, `ttt_prepare` brings q, k, targets and
learning rates into the order of the scan, the scan goes on from the state and leaves it, and `ttt_finish` brings its
output back into the order of the tokens.

Tensors are contiguous, in the shapes of `runtime/ttt_op.py`: tokens [B, L, D] with D = H·F channels, tables [N, C] of
the whole clip. Those of a chunk are those of the scan with G for N: q, k, v, out [B, H, G, C, F], eta [B, H, G, C].
One program handles the C tokens of a mini-batch and one head; programs of one mini-batch are neighbours, because they
read the same rows. Shape suffixes: C tokens of a mini-batch, F head dimension, P = F/2 pairs of channels.
"""

import triton
import triton.language as tl


@triton.jit
def ttt_start(weights, state, num_heads, num_values, SIZE: tl.constexpr):
    """weights [H, num_values] → state [B, H, num_values], one program per batch element and head."""
    program = tl.program_id(0)
    head = program % num_heads
    for first in range(0, num_values, SIZE):
        places = first + tl.arange(0, SIZE)
        inside = places < num_values
        values = tl.load(weights + head * num_values + places, mask=inside).to(tl.float32)
        tl.store(state + program * num_values + places, values, mask=inside)


@triton.jit
def place_of(num_heads, num_mini_batches):
    """The clip, mini-batch of the chunk and head of this program; and its place among the mini-batches of all heads."""
    program = tl.program_id(0)
    head, mini_batch = program % num_heads, program // num_heads
    clip, mini_batch = mini_batch // num_mini_batches, mini_batch % num_mini_batches
    return clip, mini_batch, head, (clip * num_heads + head) * num_mini_batches + mini_batch


@triton.jit
def rotated(rows, row_C, cos_CP, sin_CP, C: tl.constexpr, F: tl.constexpr):
    """[C, F]: rows of length 1, each pair of neighbouring channels (a, b) → (a·cos − b·sin, b·cos + a·sin)."""
    x_CF = tl.load(rows + row_C[:, None] * F + tl.arange(0, F)[None, :]).to(tl.float32)
    unit_CF = x_CF / tl.maximum(tl.sqrt(tl.sum(x_CF * x_CF, axis=1)), 1e-12)[:, None]
    a_CP, b_CP = tl.split(tl.reshape(unit_CF, (C, F // 2, 2)))
    return tl.reshape(tl.join(a_CP * cos_CP - b_CP * sin_CP, b_CP * cos_CP + a_CP * sin_CP), (C, F))


@triton.jit
def target_of(v_CF, k_CF, gamma_F, beta_F, F: tl.constexpr):
    """γ·n + β + k, where n is v − k with mean 0 and (unbiased) standard deviation 1 over the channels."""
    difference_CF = v_CF - k_CF
    centred_CF = difference_CF - (tl.sum(difference_CF, axis=1) / F)[:, None]
    std_C = tl.sqrt(tl.sum(centred_CF * centred_CF, axis=1) / (F - 1))
    return gamma_F[None, :] * (centred_CF / (std_C + 1e-8)[:, None]) + beta_F[None, :] + k_CF


@triton.jit
def ttt_prepare(
    XQ,
    XK,
    XV,
    rate_logits,
    rate_scale,
    cos,
    sin,
    tokens,
    rate_tokens,
    norm_weight,
    norm_bias,
    q,
    k,
    v,
    eta,
    num_heads,
    num_tokens,
    num_before,
    num_mini_batches,
    C: tl.constexpr,
    F: tl.constexpr,
):
    """The `num_mini_batches` of a chunk, which comes after `num_before` mini-batches of the clip."""
    clip, mini_batch, head, first = place_of(num_heads, num_mini_batches)
    place_C = (num_before + mini_batch) * C + tl.arange(0, C)
    first_row = clip.to(tl.int64) * num_tokens  # all heads of a clip have more than 2^31 elements
    row_C = (first_row + tl.load(tokens + place_C)) * num_heads + head
    pair_CP = place_C[:, None] * (F // 2) + tl.arange(0, F // 2)[None, :]
    cos_CP, sin_CP = tl.load(cos + pair_CP), tl.load(sin + pair_CP)
    channels = tl.arange(0, F)
    gamma_F = tl.load(norm_weight + head * F + channels).to(tl.float32)
    beta_F = tl.load(norm_bias + head * F + channels).to(tl.float32)

    # What the scan subtracts from the target are the keys as they are stored.
    k_CF = rotated(XK, row_C, cos_CP, sin_CP, C, F).to(k.dtype.element_ty)
    v_CF = tl.load(XV + row_C[:, None] * F + channels[None, :]).to(tl.float32)
    target_CF = target_of(v_CF, k_CF.to(tl.float32), gamma_F, beta_F, F)
    q_CF = rotated(XQ, row_C, cos_CP, sin_CP, C, F)
    rate_row_C = (first_row + tl.load(rate_tokens + place_C)) * num_heads + head
    opening_C = tl.sigmoid(tl.load(rate_logits + rate_row_C).to(tl.float32))

    own_C = first.to(tl.int64) * C + tl.arange(0, C)
    own_CF = own_C[:, None] * F + channels[None, :]
    tl.store(q + own_CF, q_CF.to(q.dtype.element_ty))
    tl.store(k + own_CF, k_CF)
    tl.store(v + own_CF, target_CF.to(v.dtype.element_ty))
    tl.store(eta + own_C, opening_C * tl.load(rate_scale))


@triton.jit
def ttt_finish(out, tokens, XQW, num_heads, num_tokens, num_before, num_mini_batches, C: tl.constexpr, F: tl.constexpr):
    clip, mini_batch, head, first = place_of(num_heads, num_mini_batches)
    place_C = (num_before + mini_batch) * C + tl.arange(0, C)
    row_C = (clip.to(tl.int64) * num_tokens + tl.load(tokens + place_C)) * num_heads + head
    own_C = first.to(tl.int64) * C + tl.arange(0, C)
    channels = tl.arange(0, F)
    values_CF = tl.load(out + own_C[:, None] * F + channels[None, :])
    tl.store(XQW + row_C[:, None] * F + channels[None, :], values_CF)
