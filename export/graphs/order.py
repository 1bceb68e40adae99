"""Makes a graph compute one thing after another, where that keeps the memory of an engine small."""

from torch import Tensor


def after(factor: Tensor, before: Tensor | None) -> Tensor:
    """`factor`, but only once `before` [B, L, D] is computed, if given: 0 times one of its values is added."""
    return factor if before is None else factor + 0 * before[-1, -1, :1]
