"""The TTT layer of the transformer: projections, rotary embedding and learning rates around the scan of `ttt.py`.

Shape suffixes: B batch, L tokens, D model dimension, H heads, F head dimension, N mini-batches, C tokens of one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.rope import rotate
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp, wide
from ttt_video_engine.runtime.config import TransformerConfig, TTTKind

Scan = Callable[..., Tensor]
"""(XQ, XK, XV, eta, norm weight, norm bias, *inner weights) → XQW, as `ttt.ttt_linear`."""


class TTTLayer(nn.Module):
    """TTT over [B, L, D] in the order of `layout`. Subclasses hold the initial weights of their inner model.

    `scan` may be replaced by another implementation of the same recurrence.
    """

    scan: Scan

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.model_dim, config.num_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        self.ttt_norm_weight = nn.Parameter(torch.ones(heads, config.head_dim))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(heads, config.head_dim))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.zeros(heads, 1, dim))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(heads, 1))
        self.post_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm that each head's inner model has."""
        return self.ttt_norm_weight, self.ttt_norm_bias

    def inner_weights(self) -> tuple[Tensor, ...]:
        """Initial weights of the inner model, in the order `scan` takes them."""
        raise TypeError(f"{type(self).__name__} has no inner model; use TTTLinear or TTTMLP")

    def forward(self, x_BLD: Tensor, layout: TokenLayout) -> Tensor:
        q, k, v = (self._split_heads(project(x_BLD)) for project in (self.wq, self.wk, self.wv))
        q, k = (rotate(_unit_length(stream), layout.clip_rotation) for stream in (q, k))
        v = self._reconstruction_target(k, v)
        eta = self._learning_rates(x_BLD)

        if layout.num_scenes > 1:
            order = layout.interleaved_order
            q, k, v = (stream.index_select(2, order) for stream in (q, k, v))
            # Trained weights depend on this: learning rates are cut into mini-batches before the scenes are
            # interleaved. Each mini-batch of the interleaved sequence uses all rates of the original mini-batch that
            # its last token came from.
            last_tokens = order[self.config.mini_batch_size - 1 :: self.config.mini_batch_size]
            eta = eta.index_select(2, last_tokens // self.config.mini_batch_size)

        q, k, v = (stream.unflatten(2, (-1, self.config.mini_batch_size)) for stream in (q, k, v))  # [B, H, N, C, F]
        out = self.scan(q, k, v, eta, self.ttt_norm_weight, self.ttt_norm_bias, *self.inner_weights())
        # Mini-batches are joined (L), then heads go behind tokens and are merged (D).
        out_BLD = self.wo(self.post_norm(out.flatten(2, 3).transpose(1, 2).flatten(2)))
        if layout.num_scenes > 1:
            out_BLD = out_BLD.index_select(1, layout.standard_order)
        return out_BLD

    def _split_heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, H, L, F]."""
        return x_BLD.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def _reconstruction_target(self, k_BHLF: Tensor, v_BHLF: Tensor) -> Tensor:
        """The value the inner model is to reach: v − k, standardised (unbiased std) and scaled per head, plus k."""
        difference = v_BHLF - k_BHLF
        std, mean = torch.std_mean(difference, dim=-1, keepdim=True)
        normalised = (difference - mean) / (std + 1e-8)
        return self.ttt_norm_weight.unsqueeze(1) * normalised + self.ttt_norm_bias.unsqueeze(1) + k_BHLF

    def _learning_rates(self, x_BLD: Tensor) -> Tensor:
        """Learned step size of every token and head, cut into mini-batches: [B, H, N, C], float32."""
        config = self.config
        logits_BHL = functional.linear(x_BLD, self.learnable_ttt_lr_weight.squeeze(1)).transpose(1, 2)
        # About 1e-5 at full size, which float16 holds to one digit.
        gate_BHL = torch.sigmoid(wide(logits_BHL + self.learnable_ttt_lr_bias))
        eta = config.ttt_base_lr * gate_BHL / config.head_dim / config.mini_batch_size
        return eta.unflatten(2, (-1, config.mini_batch_size))


def _unit_length(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, in float32: the 1e-12 that keeps the norm from zero is zero in float16."""
    return functional.normalize(wide(x), dim=-1).to(x.dtype)


class TTTLinear(TTTLayer):
    """TTT with a linear inner model."""

    scan = staticmethod(ttt_linear)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        heads, dim = config.num_heads, config.head_dim
        self.W1 = nn.Parameter(torch.zeros(heads, dim, dim))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, dim))

    def inner_weights(self) -> tuple[Tensor, ...]:
        return self.W1, self.b1


class TTTMLP(TTTLayer):
    """TTT with an inner MLP of one hidden layer, four times as wide."""

    scan = staticmethod(ttt_mlp)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        heads, dim = config.num_heads, config.head_dim
        self.W1 = nn.Parameter(torch.zeros(heads, dim, 4 * dim))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, 4 * dim))
        self.W2 = nn.Parameter(torch.zeros(heads, 4 * dim, dim))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, dim))

    def inner_weights(self) -> tuple[Tensor, ...]:
        return self.W1, self.b1, self.W2, self.b2


class SSMGating(nn.Module):
    """tanh(α) per channel: how much of a TTT pass is added to what it read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gating_alpha = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gating_alpha) * x


class TTTWrapper(nn.Module):
    """Holds the one TTT layer that both directions share (`ssm.ttt` in the state dict)."""

    def __init__(self, kind: TTTKind, config: TransformerConfig) -> None:
        super().__init__()
        self.ttt = {"linear": TTTLinear, "mlp": TTTMLP}[kind](config)

    def forward(self, x_BLD: Tensor, layout: TokenLayout) -> Tensor:
        return self.ttt(x_BLD, layout)
