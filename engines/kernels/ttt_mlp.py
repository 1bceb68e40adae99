"""TTT-MLP as a Triton kernel: the scan of `reference/ttt.py`, one program per batch and head.

The inner weights are 8·F² float32 values, 128 KiB at F = 64. They stay in registers, and occupy half of a
multiprocessor's. To save registers, the kernel processes the hidden layer of 4F channels in two halves, and recomputes
its activations in the backward pass instead of storing them.

Shape suffixes: C tokens of a mini-batch, F head dimension, K = 2F half of the hidden layer. Tensors are contiguous, in
the shapes of `ai.ttt::TTTMLP`: XQ, XK, XV, XQW [B, H, N, C, F], eta [B, H, N, C] in float32, norm weight and bias
[H, F], W1 [H, F, 4F], b1 [H, 1, 4F], W2 [H, 4F, F], b2 [H, 1, F]. Tiles are transposed, see `tiles.py`, except
for W2: its rows already are the hidden channels that are distributed over the warps. With RESUMED, the weights are the
state of a scan, in float32 and with a batch axis in front: the scan goes on from it and leaves it.
"""

import triton
import triton.language as tl

from ttt_video_engine.engines.kernels.tiles import EPSILON, load_transposed, product, store_transposed, tile_offsets


@triton.jit
def normalise(z_FC, F: tl.constexpr):
    """(z − mean) / std and 1 / std of each token, with the biased variance."""
    mean_C = tl.sum(z_FC, axis=0) / F
    centred_FC = z_FC - mean_C[None, :]
    inverse_std_C = tl.rsqrt(tl.sum(centred_FC * centred_FC, axis=0) / F + EPSILON)
    return centred_FC * inverse_std_C[None, :], inverse_std_C


@triton.jit
def loss_step(z_FC, target_FC, rate_C, gamma_F, beta_F, F: tl.constexpr):
    """∂/∂z of ½‖LN(z) − target‖², multiplied for each token by its learning rate."""
    normalised_FC, inverse_std_C = normalise(z_FC, F)
    grad_FC = (gamma_F[:, None] * normalised_FC + beta_F[:, None] - target_FC) * gamma_F[:, None]
    mean_C = tl.sum(grad_FC, axis=0) / F
    along_C = tl.sum(grad_FC * normalised_FC, axis=0) / F
    return (grad_FC - mean_C[None, :] - normalised_FC * along_C[None, :]) * (inverse_std_C * rate_C)[None, :]


@triton.jit
def places_of_half(owner, half: tl.constexpr, F: tl.constexpr):
    """Where the weights of one half of the hidden layer are: W1 transposed [K, F], b1 [K] and W2 [K, F]."""
    K: tl.constexpr = 2 * F
    first = half * K
    rows_K = owner * 4 * F + first + tl.arange(0, K)
    W1_KF = owner * 4 * F * F + first + tile_offsets(0, F, K, 4 * F)
    return W1_KF, rows_K, rows_K[:, None] * F + tl.arange(0, F)[None, :]


@triton.jit
def load_half(W1, b1, W2, owner, half: tl.constexpr, F: tl.constexpr):
    """As float32."""
    W1_KF, rows_K, W2_KF = places_of_half(owner, half, F)
    W1_KF, W2_KF = tl.load(W1 + W1_KF).to(tl.float32), tl.load(W2 + W2_KF).to(tl.float32)
    return W1_KF, tl.load(b1 + rows_K).to(tl.float32), W2_KF


@triton.jit
def store_half(W1, b1, W2, owner, half: tl.constexpr, weights, F: tl.constexpr):
    W1_KF, rows_K, W2_KF = places_of_half(owner, half, F)
    tl.store(W1 + W1_KF, weights[0])
    tl.store(b1 + rows_K, weights[1])
    tl.store(W2 + W2_KF, weights[2])


@triton.jit
def hidden_of(x_FC, W1_KF, b1_K, PRECISION: tl.constexpr):
    """Half of the hidden layer before and after GELU, and σ(u) with u = √(8/π)·(z + 0.044715z³), each [K, C].

    The tanh form of GELU is z·σ(u).
    """
    z1_KC = product(W1_KF, x_FC, PRECISION) + b1_K[:, None]
    cdf_KC = tl.sigmoid(1.59576912 * z1_KC * (1 + 0.044715 * z1_KC * z1_KC))
    return z1_KC, z1_KC * cdf_KC, cdf_KC


@triton.jit
def read_half(x_FC, W1_KF, b1_K, W2_KF, PRECISION: tl.constexpr):
    """The contribution of one half to the output of the inner model, [F, C]."""
    _, hidden_KC, _ = hidden_of(x_FC, W1_KF, b1_K, PRECISION)
    return product(tl.trans(W2_KF), hidden_KC, PRECISION)


@triton.jit
def update_half(k_FC, step_FC, W1_KF, b1_K, W2_KF, PRECISION: tl.constexpr):
    """The weights of one half after one step. The gradient uses W2 before its update."""
    z1_KC, hidden_KC, cdf_KC = hidden_of(k_FC, W1_KF, b1_K, PRECISION)
    slope_KC = cdf_KC + hidden_KC * (1 - cdf_KC) * (1.59576912 + 0.2140644488 * z1_KC * z1_KC)
    step1_KC = product(W2_KF, step_FC, PRECISION) * slope_KC
    W2_KF -= product(hidden_KC, tl.trans(step_FC), PRECISION)
    W1_KF -= product(step1_KC, tl.trans(k_FC), PRECISION)
    return W1_KF, b1_K - tl.sum(step1_KC, axis=1), W2_KF


@triton.jit
def ttt_mlp(
    XQ,
    XK,
    XV,
    eta,
    norm_weight,
    norm_bias,
    W1,
    b1,
    W2,
    b2,
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
    W1_0, b1_0, W2_0 = load_half(W1, b1, W2, owner, 0, F)
    W1_1, b1_1, W2_1 = load_half(W1, b1, W2, owner, 1, F)
    b2_F = tl.load(b2 + owner * F + channels).to(tl.float32)

    token = program.to(tl.int64) * num_mini_batches * C  # all heads of a clip have more than 2^31 elements
    for _ in range(num_mini_batches):
        k_FC = load_transposed(XK, token, C, F)
        z_FC = b2_F[:, None] + read_half(k_FC, W1_0, b1_0, W2_0, PRECISION)
        z_FC += read_half(k_FC, W1_1, b1_1, W2_1, PRECISION)
        target_FC = load_transposed(XV, token, C, F) - k_FC
        rate_C = tl.load(eta + token + tl.arange(0, C))
        step_FC = loss_step(z_FC, target_FC, rate_C, gamma_F, beta_F, F)

        W1_0, b1_0, W2_0 = update_half(k_FC, step_FC, W1_0, b1_0, W2_0, PRECISION)
        W1_1, b1_1, W2_1 = update_half(k_FC, step_FC, W1_1, b1_1, W2_1, PRECISION)
        b2_F -= tl.sum(step_FC, axis=1)

        q_FC = load_transposed(XQ, token, C, F)
        read_FC = b2_F[:, None] + read_half(q_FC, W1_0, b1_0, W2_0, PRECISION)
        read_FC += read_half(q_FC, W1_1, b1_1, W2_1, PRECISION)
        normalised_FC, _ = normalise(read_FC, F)
        store_transposed(XQW, token, q_FC + normalised_FC * gamma_F[:, None] + beta_F[:, None], C, F)
        token += C

    if RESUMED:
        store_half(W1, b1, W2, owner, 0, (W1_0, b1_0, W2_0), F)
        store_half(W1, b1, W2, owner, 1, (W1_1, b1_1, W2_1), F)
        tl.store(b2 + owner * F + channels, b2_F)
