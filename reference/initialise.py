"""Modules without trained weights: with random ones from a seed, or with none at all."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ttt_video_engine.reference.ttt_layer import TTTLayer

INNER_WEIGHT_STD = 0.02

M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[[], M], seed: int) -> M:
    """The module that `build` makes, with PyTorch's usual initial weights and those of TTT layers, for inference.

    TTT weights are those a fresh layer starts training with: normal with a standard deviation of 0.02, biases zero.
    The same seed gives the same weights; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for layer in module.modules():
            if isinstance(layer, TTTLayer):
                for weight in (*layer.inner_weights()[::2], layer.learnable_ttt_lr_weight):
                    nn.init.normal_(weight, std=INNER_WEIGHT_STD)
    return module.eval().requires_grad_(False)


def hollow(build: Callable[[], M]) -> M:
    """The module that `build` makes, its weights of the right shapes and dtypes but of one value that takes no memory.

    For tracing a model of any size. It cannot be loaded into.
    """
    with torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            one = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            setattr(part, name, nn.Parameter(one, requires_grad=False))
    return module.eval()
