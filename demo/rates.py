"""Learning rates over a run."""

import math

_WARM_UP = 150
_LAST_RATE = 0.02
"""What is left of a learning rate at the end, as a share."""


def rate_share(step: int, num_steps: int, first: int = 0) -> float:
    """What share of its learning rate step number `step` takes: a linear warm-up, then half a cosine.

    `first` is the step at which the optimiser began without a memory; the warm-up starts there.
    """
    progress = min(max(step - _WARM_UP, 0) / max(num_steps - _WARM_UP, 1), 1.0)
    return warm_up(step, first) * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def warm_up(step: int, first: int) -> float:
    """What share of its learning rate step number `step` takes after the optimiser began at step `first`."""
    return min((step - first + 1) / _WARM_UP, 1.0)
