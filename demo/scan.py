"""TTT-Linear for training on a CPU: the reference's recurrence, one compiled mini-batch at a time.

The numbers are those of `ttt_linear` up to rounding. A mini-batch, not the scan, is compiled: that is done in seconds
and serves clips of every length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ttt_video_engine.reference.ttt import LAYER_NORM_EPS

_Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


def scan(
    step: _Step,
    XQ_BHNCF: Tensor,
    XK_BHNCF: Tensor,
    XV_BHNCF: Tensor,
    eta_BHNC: Tensor,
    norm_weight_HF: Tensor,
    norm_bias_HF: Tensor,
    W1_HFF: Tensor,
    b1_H1F: Tensor,
) -> Tensor:
    """As `ttt_linear`, with `step` for each mini-batch."""
    with torch.autocast("cpu", enabled=False):
        streams = (XQ_BHNCF, XK_BHNCF, XV_BHNCF, eta_BHNC.unsqueeze(-1))
        per_mini_batch = zip(*(stream.float().unbind(2) for stream in streams), strict=True)
        size = (XQ_BHNCF.shape[0], -1, -1, -1)
        W, b = W1_HFF.float().expand(size), b1_H1F.float().expand(size)
        gamma, beta = norm_weight_HF.float().unsqueeze(1), norm_bias_HF.float().unsqueeze(1)
        outputs = []
        for q, k, v, eta in per_mini_batch:
            out, W, b = step(q.contiguous(), k.contiguous(), v.contiguous(), eta.contiguous(), gamma, beta, W, b)
            outputs.append(out)
        return torch.stack(outputs, dim=2).to(XQ_BHNCF.dtype)


def mini_batch(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, gamma: Tensor, beta: Tensor, W: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One inner gradient step and what is read after it: output [B, H, C, F], new weights and biases."""
    normed, std = _standardise(k @ W + b)
    grad = (gamma * normed + beta - (v - k)) * gamma
    along = (grad * normed).mean(-1, keepdim=True)
    grad = eta * (grad - grad.mean(-1, keepdim=True) - normed * along) / std
    W = W - k.mT @ grad
    b = b - grad.sum(-2, keepdim=True)
    normed, _ = _standardise(q @ W + b)
    return q + gamma * normed + beta, W, b


def _standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    centred = z - z.mean(-1, keepdim=True)
    std = torch.sqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred / std, std
