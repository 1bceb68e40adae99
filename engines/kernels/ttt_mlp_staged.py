"""TTT-MLP in Gluon, where layouts and shared memory are explicit: bfloat16, mini-batches of 64 tokens, heads of 64.

The computation and the arguments are those of `ttt_mlp.py`; one program of 8 warps handles a batch element and head. W1
and W2 stay in registers in float32, with hidden channels as rows, so each warp holds all columns of its own rows. What
warps exchange goes through shared memory in bfloat16, once, and is read as a factor of products in any orientation:

- the hidden layer, written by the forward pass, is a factor of the output and of the step of W2;
- W2 is rounded once per step, for the gradient of the hidden layer and for the output;
- GELU's slopes, where the GPU has the shared memory (`SLOPES_SHARED`), else in registers.

W2 and b2 are centred over the output channels, as in `tiles.py`: one reduction gives all sums of a step. Steps are
stored negated, so products add them to the weights in place. Keys, values and queries are copied asynchronously: keys
and values while the mini-batch before is finished, queries while the keys are worked on.

Shape suffixes as in `ttt_mlp.py`, with T = C/2 tokens, which the hidden layer is processed in.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ttt_video_engine.engines.kernels.tiles import EPSILON

WARPS = 8
_HIDDEN = gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8])
_TOKENS = gl.NVMMADistributedLayout([2, 0], [4, 2], [16, 8])
HIDDEN = gl.constexpr(_HIDDEN)
"""Results with hidden channels as rows: 16 rows of each half for each warp."""
HIDDEN_A = gl.constexpr(gl.DotOperandLayout(0, _HIDDEN, 2))
HIDDEN_B = gl.constexpr(gl.DotOperandLayout(1, _HIDDEN, 2))
TOKENS = gl.constexpr(_TOKENS)
"""Results with tokens as rows: 16 tokens and half of the channels for each warp."""
TOKENS_A = gl.constexpr(gl.DotOperandLayout(0, _TOKENS, 2))
TOKENS_B = gl.constexpr(gl.DotOperandLayout(1, _TOKENS, 2))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""Rows of 128 bytes, whose 16-byte parts are permuted so that eight rows have no bank in common."""
SHARED_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
"""16 bytes of a row for each thread, the unit of an asynchronous copy."""


@gluon.jit
def add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@gluon.jit
def tanh(x):
    """The GPU's own approximation: relative error 2^-11, an eighth of the rounding of its result to bfloat16."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def pack(x):
    """Rounds to bfloat16, two values in one instruction and one register."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, True, 2)


@gluon.jit
def gelu(z):
    return z * (0.5 * tanh(z * (0.79788456 + 0.035677408 * z * z)) + 0.5)


@gluon.jit
def gelu_and_slope(z):
    squared = z * z
    t = tanh(z * (0.79788456 + 0.035677408 * squared))
    cdf = 0.5 * t + 0.5
    return z * cdf, z * (1 - t * t) * (0.39894228 + 0.05351611 * squared) + cdf


@gluon.jit
def load_half(W1, b1, W2, head, half: gl.constexpr, F: gl.constexpr):
    """W1 transposed [K, F], b1 [K] and centred W2 [K, F] of one half of the hidden layer, as float32."""
    K: gl.constexpr = 2 * F
    hidden_K = half * K + gl.arange(0, K, gl.SliceLayout(1, HIDDEN))
    channels_F = gl.arange(0, F, gl.SliceLayout(0, HIDDEN))
    W1_KF = gl.load(W1 + head * 4 * F * F + hidden_K[:, None] + channels_F[None, :] * (4 * F)).to(gl.float32)
    W2_KF = gl.load(W2 + head * 4 * F * F + hidden_K[:, None] * F + channels_F[None, :]).to(gl.float32)
    b1_K = gl.load(b1 + head * 4 * F + hidden_K).to(gl.float32)
    return W1_KF, b1_K, W2_KF - (gl.sum(W2_KF, 1) / F)[:, None]


@gluon.jit
def hidden_of_keys(W1_KF, b1_K, keys, hidden, slopes, K: gl.constexpr, T: gl.constexpr, SLOPES_SHARED: gl.constexpr):
    """Stores one half of the hidden layer, and the slopes, or returns these in two parts."""
    W1_A = gl.convert_layout(W1_KF.to(gl.bfloat16), HIDDEN_A)
    bias_KT = b1_K[:, None] + gl.zeros((K, T), gl.float32, HIDDEN)
    hidden_KT, slope_KT = gelu_and_slope(mma_v2(W1_A, keys.slice(0, T).permute([1, 0]).load(HIDDEN_B), bias_KT))
    hidden.slice(0, T, 1).store(hidden_KT.to(gl.bfloat16))
    first_KT = pack(slope_KT)
    if SLOPES_SHARED:
        slopes.slice(0, T, 1).store(first_KT)
    hidden_KT, slope_KT = gelu_and_slope(mma_v2(W1_A, keys.slice(T, T).permute([1, 0]).load(HIDDEN_B), bias_KT))
    hidden.slice(T, T, 1).store(hidden_KT.to(gl.bfloat16))
    second_KT = pack(slope_KT)
    if SLOPES_SHARED:
        slopes.slice(T, T, 1).store(second_KT)
    return first_KT, second_KT


@gluon.jit
def step_of_half(
    weights,  # W1_KF, b1_K, W2_KF
    tiles,  # keys, steps [C, F], the hidden layer [K, C], W2 [K, F] and slopes [K, C], in shared memory
    first_KT,
    second_KT,
    K: gl.constexpr,
    T: gl.constexpr,
    SLOPES_SHARED: gl.constexpr,
):
    """The weights of one half after a step, whose W2 is also stored. The gradient uses W2 before its update."""
    W1_KF, b1_K, W2_KF = weights
    keys, steps, hidden, W2, slopes = tiles
    zero_KT = gl.zeros((K, T), gl.float32, HIDDEN)
    W2_A = W2.load(HIDDEN_A)
    if SLOPES_SHARED:
        first_KT = slopes.slice(0, T, 1).load(HIDDEN)
    step_KT = mma_v2(W2_A, steps.slice(0, T).permute([1, 0]).load(HIDDEN_B), zero_KT) * first_KT.to(gl.float32)
    b1_K += gl.sum(step_KT, 1)
    step_A = gl.convert_layout(step_KT.to(gl.bfloat16), HIDDEN_A)
    W1_KF = mma_v2(step_A, keys.slice(0, T).load(HIDDEN_B), W1_KF)
    if SLOPES_SHARED:
        second_KT = slopes.slice(T, T, 1).load(HIDDEN)
    step_KT = mma_v2(W2_A, steps.slice(T, T).permute([1, 0]).load(HIDDEN_B), zero_KT) * second_KT.to(gl.float32)
    b1_K += gl.sum(step_KT, 1)
    step_A = gl.convert_layout(step_KT.to(gl.bfloat16), HIDDEN_A)
    W1_KF = mma_v2(step_A, keys.slice(T, T).load(HIDDEN_B), W1_KF)
    W2_KF = mma_v2(hidden.load(HIDDEN_A), steps.load(HIDDEN_B), W2_KF)
    W2.store(W2_KF.to(gl.bfloat16))
    return W1_KF, b1_K, W2_KF


@gluon.jit
def hidden_of_queries(W1_KF, b1_K, queries, hidden, K: gl.constexpr, T: gl.constexpr):
    W1_A = gl.convert_layout(W1_KF.to(gl.bfloat16), HIDDEN_A)
    bias_KT = b1_K[:, None] + gl.zeros((K, T), gl.float32, HIDDEN)
    for part in gl.static_range(2):
        factor = queries.slice(part * T, T).permute([1, 0]).load(HIDDEN_B)
        hidden.slice(part * T, T, 1).store(gelu(mma_v2(W1_A, factor, bias_KT)).to(gl.bfloat16))


@gluon.jit
def output_of(hidden_0, hidden_1, W2_0, W2_1, bias_CF):
    """[C, F]: the output of the inner model from both halves in shared memory."""
    z_CF = mma_v2(hidden_0.permute([1, 0]).load(TOKENS_A), W2_0.load(TOKENS_B), bias_CF)
    return mma_v2(hidden_1.permute([1, 0]).load(TOKENS_A), W2_1.load(TOKENS_B), z_CF)


@gluon.jit
def negative_step(z_CF, offset_CF, rate_C, squared_gamma_F, F: gl.constexpr):
    """The negated step of `tiles.loss_step`, [C, F]."""
    scaled_CF = squared_gamma_F[None, :] * z_CF
    terms = (z_CF * z_CF, scaled_CF, scaled_CF * z_CF, offset_CF, offset_CF * z_CF)
    squares_C, sum1_C, sum2_C, sum3_C, sum4_C = gl.reduce(terms, 1, add_five)
    inverse_std_C = gl.rsqrt(squares_C / F + EPSILON)
    mean_C = (inverse_std_C * sum1_C + sum3_C) / F
    along_C = (inverse_std_C * sum2_C + sum4_C) * inverse_std_C / F
    along_CF = z_CF * (inverse_std_C * along_C)[:, None]
    without_CF = along_CF + mean_C[:, None] - inverse_std_C[:, None] * scaled_CF - offset_CF
    return without_CF * (inverse_std_C * rate_C)[:, None]


@gluon.jit
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
    C: gl.constexpr,
    F: gl.constexpr,
    SLOPES_SHARED: gl.constexpr,
):
    K: gl.constexpr = 2 * F
    T: gl.constexpr = C // 2
    program = gl.program_id(0)
    head = program % num_heads
    channels_F = gl.arange(0, F, gl.SliceLayout(0, TOKENS))
    tokens_C = gl.arange(0, C, gl.SliceLayout(1, TOKENS))
    W1_0, b1_0, W2_0 = load_half(W1, b1, W2, head, 0, F)
    W1_1, b1_1, W2_1 = load_half(W1, b1, W2, head, 1, F)
    b2_F = gl.load(b2 + head * F + channels_F).to(gl.float32)
    b2_F -= gl.sum(b2_F, 0) / F

    keys = gl.allocate_shared_memory(gl.bfloat16, [C, F], SHARED)
    values = gl.allocate_shared_memory(gl.bfloat16, [C, F], SHARED)
    queries = gl.allocate_shared_memory(gl.bfloat16, [C, F], SHARED)
    steps = gl.allocate_shared_memory(gl.bfloat16, [C, F], SHARED)
    hidden = gl.allocate_shared_memory(gl.bfloat16, [2, K, C], SHARED)
    rounded_W2 = gl.allocate_shared_memory(gl.bfloat16, [2, K, F], SHARED)
    hidden_0, hidden_1 = hidden.index(0), hidden.index(1)
    shared_W2_0, shared_W2_1 = rounded_W2.index(0), rounded_W2.index(1)
    slopes_0, slopes_1 = hidden_0, hidden_1  # not used in registers
    if SLOPES_SHARED:
        slopes = gl.allocate_shared_memory(gl.bfloat16, [2, K, C], SHARED)
        slopes_0, slopes_1 = slopes.index(0), slopes.index(1)
    gamma = gl.allocate_shared_memory(gl.bfloat16, [F], SHARED_ROW)
    beta = gl.allocate_shared_memory(gl.bfloat16, [F], SHARED_ROW)
    gamma.store(gl.load(norm_weight + head * F + channels_F))
    beta.store(gl.load(norm_bias + head * F + channels_F))
    shared_W2_0.store(W2_0.to(gl.bfloat16))
    shared_W2_1.store(W2_1.to(gl.bfloat16))

    rows_C, columns_F = gl.arange(0, C, gl.SliceLayout(1, COPIED)), gl.arange(0, F, gl.SliceLayout(0, COPIED))
    copied_CF = rows_C[:, None] * F + columns_F[None, :]
    zero_CF = gl.zeros((C, F), gl.float32, TOKENS)
    token = program.to(gl.int64) * num_mini_batches * C  # all heads of a clip have more than 2^31 elements
    async_copy.async_load(values, XV + token * F + copied_CF)
    async_copy.async_load(keys, XK + token * F + copied_CF)
    async_copy.commit_group()
    rate_C = gl.load(eta + token + tokens_C)
    for i in range(num_mini_batches):
        following = token + gl.where(i + 1 < num_mini_batches, C, 0)
        async_copy.wait_group(0)
        async_copy.async_load(queries, XQ + token * F + copied_CF)
        async_copy.commit_group()

        slope_00, slope_01 = hidden_of_keys(W1_0, b1_0, keys, hidden_0, slopes_0, K, T, SLOPES_SHARED)
        slope_10, slope_11 = hidden_of_keys(W1_1, b1_1, keys, hidden_1, slopes_1, K, T, SLOPES_SHARED)
        z_CF = output_of(hidden_0, hidden_1, shared_W2_0, shared_W2_1, b2_F[None, :] + zero_CF)
        gamma_F = gamma.load(gl.SliceLayout(0, TOKENS)).to(gl.float32)
        beta_F = beta.load(gl.SliceLayout(0, TOKENS)).to(gl.float32)
        target_CF = values.load(TOKENS).to(gl.float32) - keys.load(TOKENS).to(gl.float32)
        offset_CF = (beta_F[None, :] - target_CF) * gamma_F[None, :]
        step_CF = negative_step(z_CF, offset_CF, rate_C, gamma_F * gamma_F, F)
        b2_F += gl.sum(step_CF, 0)
        steps.store(step_CF.to(gl.bfloat16))
        async_copy.async_load(values, XV + following * F + copied_CF)
        async_copy.commit_group()
        rate_C = gl.load(eta + following + tokens_C)

        tiles_0 = (keys, steps, hidden_0, shared_W2_0, slopes_0)
        tiles_1 = (keys, steps, hidden_1, shared_W2_1, slopes_1)
        W1_0, b1_0, W2_0 = step_of_half((W1_0, b1_0, W2_0), tiles_0, slope_00, slope_01, K, T, SLOPES_SHARED)
        W1_1, b1_1, W2_1 = step_of_half((W1_1, b1_1, W2_1), tiles_1, slope_10, slope_11, K, T, SLOPES_SHARED)
        async_copy.async_load(keys, XK + following * F + copied_CF)
        async_copy.commit_group()

        async_copy.wait_group(2)  # the queries have arrived, values and keys may be on their way
        hidden_of_queries(W1_0, b1_0, queries, hidden_0, K, T)
        hidden_of_queries(W1_1, b1_1, queries, hidden_1, K, T)
        read_CF = output_of(hidden_0, hidden_1, shared_W2_0, shared_W2_1, b2_F[None, :] + zero_CF)
        scale_C = gl.rsqrt(gl.sum(read_CF * read_CF, 1) / F + EPSILON)
        gamma_F = gamma.load(gl.SliceLayout(0, TOKENS)).to(gl.float32)
        beta_F = beta.load(gl.SliceLayout(0, TOKENS)).to(gl.float32)
        normalised_CF = read_CF * scale_C[:, None] * gamma_F[None, :] + beta_F[None, :]
        out_CF = queries.load(TOKENS).to(gl.float32) + normalised_CF
        gl.store(XQW + token * F + tokens_C[:, None] * F + channels_F[None, :], out_CF.to(XQW.dtype.element_ty))
        token += C
