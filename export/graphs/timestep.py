"""Traces what is computed of the timestep so that ONNX Runtime rounds it no more than PyTorch does.

The few values of the timestep reach every token of every layer. So their error does not average out as that of tokens
does, and TTT magnifies it over the clip: over 63 s, 4e-6 of them can become 1e-4 of the velocity. ONNX Runtime has two
such errors. Its Sigmoid is exact to 1e-7 absolutely, so that x·σ(x) of -16 is wrong by half. Its products of a matrix
and one row add in a chain, three times as far off as the partial sums of PyTorch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt import wide


@contextmanager
def accurate_timestep(module: nn.Module) -> Iterator[None]:
    """Within the block, each SiLU of a transformer in `module`, and each linear layer of its `time_embed`, is traced
    as operators that every runtime computes to the last bits."""
    replaced: list[nn.Module] = []
    for transformer in [part for part in module.modules() if isinstance(part, DiffusionTransformer)]:
        for part in transformer.modules():
            if isinstance(part, nn.SiLU):
                part.forward = _silu  # type: ignore[method-assign, assignment]
                replaced.append(part)
        for part in transformer.time_embed:
            if isinstance(part, nn.Linear):
                part.forward = partial(_linear, part)  # type: ignore[method-assign]
                replaced.append(part)
    try:
        yield
    finally:
        for part in replaced:
            del part.forward  # restores the method of the class


def _silu(x: Tensor) -> Tensor:
    """x·σ(x). Where exp overflows, the result is zero, as it is in float32."""
    return (wide(x) / (1 + torch.exp(-wide(x)))).to(x.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """x·Wᵀ + b of x [B, in] as a sum over products [B, out, in]."""
    return ((wide(x)[:, None, :] * wide(layer.weight)).sum(-1) + wide(layer.bias)).to(x.dtype)
