"""Test-Time Training as a scan: an inner model is trained on the sequence while it reads it.

Every other implementation is tested against this one. Papers: "Learning to (Learn at Test Time)" (arXiv 2407.04620) and
"One-Minute Video Generation with Test-Time Training" (arXiv 2504.05298).

Each head has an inner model f, a linear layer or an MLP with one hidden layer. It learns to map a key k to its value v;
the inner loss is ‖LN(f(k)) − (v − k)‖². Tokens are grouped in mini-batches. Each mini-batch takes one gradient step
from the weights that the previous one left. It is then read with the *updated* weights: the output of a query q is
q + LN(f(q)).

Shape suffixes: B batch, H heads, N mini-batches (NC in the graphs), C tokens of a mini-batch (CS), F head dimension,
K hidden dimension of the inner MLP.
"""

import torch
from torch import Tensor
from torch.nn import functional

LAYER_NORM_EPS = 1e-6


def ttt_linear(
    XQ_BHNCF: Tensor,
    XK_BHNCF: Tensor,
    XV_BHNCF: Tensor,
    eta_BHNC: Tensor,
    norm_weight_HF: Tensor,
    norm_bias_HF: Tensor,
    W1_HFF: Tensor,
    b1_H1F: Tensor,
) -> Tensor:
    """TTT-Linear, f(x) = x·W1 + b1.

    Queries, keys and values are [B, H, N, C, F], learning rates `eta` [B, H, N, C]; the initial weights may have a
    leading batch axis. Returns [B, H, N, C, F] in the dtype of the queries. All arithmetic is `wide`.
    """
    norm = _HeadNorm(norm_weight_HF, norm_bias_HF)
    W1, b1 = wide(W1_HFF), wide(b1_H1F)
    outputs = []
    for q, k, v, eta in _mini_batches(XQ_BHNCF, XK_BHNCF, XV_BHNCF, eta_BHNC):
        z = k @ W1 + b1
        grad_z = norm.loss_gradient(z, target=v - k)

        # Both are sums over the tokens of the mini-batch, each token with its own learning rate.
        W1 = W1 - (eta * k).mT @ grad_z
        b1 = b1 - (eta * grad_z).sum(-2, keepdim=True)

        outputs.append(q + norm(q @ W1 + b1))
    return torch.stack(outputs, dim=2).to(XQ_BHNCF.dtype)


def ttt_mlp(
    XQ_BHNCF: Tensor,
    XK_BHNCF: Tensor,
    XV_BHNCF: Tensor,
    eta_BHNC: Tensor,
    norm_weight_HF: Tensor,
    norm_bias_HF: Tensor,
    W1_HFK: Tensor,
    b1_H1K: Tensor,
    W2_HKF: Tensor,
    b2_H1F: Tensor,
) -> Tensor:
    """TTT-MLP, f(x) = gelu(x·W1 + b1)·W2 + b2 with the tanh form of GELU. Otherwise like `ttt_linear`."""
    norm = _HeadNorm(norm_weight_HF, norm_bias_HF)
    W1, b1, W2, b2 = wide(W1_HFK), wide(b1_H1K), wide(W2_HKF), wide(b2_H1F)
    outputs = []
    for q, k, v, eta in _mini_batches(XQ_BHNCF, XK_BHNCF, XV_BHNCF, eta_BHNC):
        z1 = k @ W1 + b1
        hidden = _gelu(z1)
        z2 = hidden @ W2 + b2
        grad_z2 = norm.loss_gradient(z2, target=v - k)
        grad_z1 = (grad_z2 @ W2.mT) * _gelu_derivative(z1)  # through W2 as it was before the step

        W1 = W1 - (eta * k).mT @ grad_z1
        b1 = b1 - (eta * grad_z1).sum(-2, keepdim=True)
        W2 = W2 - (eta * hidden).mT @ grad_z2
        b2 = b2 - (eta * grad_z2).sum(-2, keepdim=True)

        outputs.append(q + norm(_gelu(q @ W1 + b1) @ W2 + b2))
    return torch.stack(outputs, dim=2).to(XQ_BHNCF.dtype)


class _HeadNorm:
    """LayerNorm over F with a weight and bias per head, and the gradient of the inner loss through it."""

    def __init__(self, weight_HF: Tensor, bias_HF: Tensor) -> None:
        self.weight_H1F = wide(weight_HF).unsqueeze(1)
        self.bias_H1F = wide(bias_HF).unsqueeze(1)

    def __call__(self, z: Tensor) -> Tensor:
        normalised, _ = _standardise(z)
        return self.weight_H1F * normalised + self.bias_H1F

    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """∂/∂z of ½‖LN(z) − target‖² (the ½ takes the factor 2 of the square)."""
        normalised, std = _standardise(z)
        grad = (self.weight_H1F * normalised + self.bias_H1F - target) * self.weight_H1F
        along_normalised = (grad * normalised).mean(-1, keepdim=True)
        return (grad - grad.mean(-1, keepdim=True) - normalised * along_normalised) / std


def _standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z − mean) / std and std over the last axis, with the biased variance."""
    variance, mean = torch.var_mean(z, dim=-1, keepdim=True, correction=0)
    std = torch.sqrt(variance + LAYER_NORM_EPS)
    return (z - mean) / std, std


def _mini_batches(
    XQ_BHNCF: Tensor, XK_BHNCF: Tensor, XV_BHNCF: Tensor, eta_BHNC: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(q, k, v, eta) of each mini-batch in turn, `wide`: [B, H, C, F] thrice and [B, H, C, 1]."""
    streams = (XQ_BHNCF, XK_BHNCF, XV_BHNCF, eta_BHNC.unsqueeze(-1))
    q, k, v, eta = (wide(stream).unbind(2) for stream in streams)
    return list(zip(q, k, v, eta, strict=True))


def wide(x: Tensor) -> Tensor:
    """x in float32; a float64, which tells how much float32 rounds, is left as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of ½x(1 + tanh(√(2/π)(x + 0.044715x³))); 0.1070322243 is 3·0.044715·√(2/π)."""
    tanh = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x) + 0.5 * (1 + tanh)
