"""Lazy tensors: described by shape and dtype, read on demand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of `shape` and `dtype`. Every call of `read` reads it again; it is not cached."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


LazyStateDict = dict[str, LazyTensor]
"""Tensors by name."""


def in_memory(tensor: Tensor) -> LazyTensor:
    """Describes a tensor that is already in memory or memory-mapped."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_identity, tensor.detach()))


def lazy_state(tensors: Mapping[str, Tensor]) -> LazyStateDict:
    """Describes tensors that are already in memory."""
    return {name: in_memory(value) for name, value in tensors.items()}


def _identity(tensor: Tensor) -> Tensor:
    return tensor
