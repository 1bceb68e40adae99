"""Learning rates over a run."""

import math

_WARM_UP = 150
_LAST_RATE = 0.02
"""What is left of a learning rate at the end, as a share."""


def rate_share(step: int, num_steps: int) -> float:
    """What share of its learning rate step number `step` takes: a linear warm-up, then half a cosine."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    progress = min((step - _WARM_UP) / max(num_steps - _WARM_UP, 1), 1.0)
    return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
