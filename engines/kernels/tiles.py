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
        return tl.dot(a, b, input_precision=PRECISION)


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
