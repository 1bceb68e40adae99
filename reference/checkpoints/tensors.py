"""Tensors that are described without being read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of `shape` and `dtype`. Every call of `read` returns it again; it is not kept in between."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


LazyStateDict = dict[str, LazyTensor]
"""Tensors by name."""


def in_memory(tensor: Tensor) -> LazyTensor:
    """Describes a tensor that is in memory, or mapped to it, already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_same, tensor.detach()))


def lazy_state(tensors: Mapping[str, Tensor]) -> LazyStateDict:
    """Describes tensors that are in memory already."""
    return {name: in_memory(value) for name, value in tensors.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor
