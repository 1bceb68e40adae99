"""Functions that both kernels use: tiles, LayerNorm over a head, and the gradient of the inner loss.

Tiles are transposed, channels by tokens: Triton distributes the rows of a matrix product over the warps, and there are
more channels than tokens. Shape suffixes: C tokens of a mini-batch, F head dimension. Arithmetic is float32.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a·b with float32 sums; the factors are bfloat16, or float32 at one of Triton's precisions."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def tile_offsets(row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets [COLUMNS, ROWS] of the transpose of `ROWS` rows, from `row` on, of a matrix with `STRIDE` columns."""
    return row * STRIDE + tl.arange(0, ROWS)[None, :] * STRIDE + tl.arange(0, COLUMNS)[:, None]


@triton.jit
def load_transposed(tensor, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[COLUMNS, ROWS]: rows of a matrix of `COLUMNS` columns from `row` on, transposed, as float32."""
    return tl.load(tensor + tile_offsets(row, ROWS, COLUMNS, COLUMNS)).to(tl.float32)


@triton.jit
def store_transposed(tensor, row, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(tensor + tile_offsets(row, ROWS, COLUMNS, COLUMNS), tile.to(tensor.dtype.element_ty))


@triton.jit
def centred(weights, F: tl.constexpr):
    """Weights or a bias without their mean over the output channels, which are the first axis.

    LayerNorm ignores that mean: f(x) only loses a constant over the channels. And a gradient through LayerNorm has no
    mean over the channels, so steps leave the weights centred, but for rounding, which `loss_step` keeps from growing.
    """
    return weights - tl.sum(weights, axis=0, keep_dims=True) / F


@triton.jit
def add_seven(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def loss_sums(z_FC, offset_FC, read_FC, gamma_F):
    """The sums over channels, each [C], that `loss_step` needs of a centred z; Σ read² of a centred `read` is sixth.

    One reduction: warps exchange their sums once instead of five times.
    """
    scaled_FC = (gamma_F * gamma_F)[:, None] * z_FC
    squares_FC, read_squares_FC = z_FC * z_FC, read_FC * read_FC
    terms = (squares_FC, scaled_FC, scaled_FC * z_FC, offset_FC, offset_FC * z_FC, read_squares_FC, z_FC)
    return tl.reduce(terms, 0, add_seven)


@triton.jit
def loss_step(z_FC, offset_FC, rate_C, gamma_F, sums, F: tl.constexpr):
    """∂/∂z of ½‖LN(z) − target‖² for a centred z, multiplied for each token by its learning rate.

    With n = z/std, the gradient before LayerNorm's own is g = γ²·n + offset, where offset = γ·(β − target). Its mean
    and the mean of g·n follow from the sums of `loss_sums`. What rounding has left as the mean of z is taken from the
    step: it would be in the weights then, and grow from step to step.
    """
    inverse_std_C = tl.rsqrt(sums[0] / F + EPSILON)
    mean_C = (inverse_std_C * sums[1] + sums[3]) / F
    along_C = (inverse_std_C * sums[2] + sums[4]) * inverse_std_C / F
    mean_C -= inverse_std_C * along_C * sums[6] / F
    grad_FC = (gamma_F * gamma_F)[:, None] * z_FC * inverse_std_C[None, :] + offset_FC
    along_FC = z_FC * (inverse_std_C * along_C)[None, :]
    return (grad_FC - mean_C[None, :] - along_FC) * (inverse_std_C * rate_C)[None, :]


@triton.jit
def read_norm(read_FC, squares_C, gamma_F, beta_F, F: tl.constexpr):
    """γ·LN(read) + β of a centred `read` with these sums of squares."""
    inverse_std_C = tl.rsqrt(squares_C / F + EPSILON)
    return read_FC * inverse_std_C[None, :] * gamma_F[:, None] + beta_F[:, None]
