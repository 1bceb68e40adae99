"""The moving average of weights."""

import torch
from torch import Tensor, nn

_DECAY = 0.999


class Average:
    """The exponential moving average of a model's weights, by their names."""

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follows faster in the beginning, when the weights still change fast."""
        decay = min(_DECAY, (1 + step) / (10 + step))
        current = [value.detach() for value in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)
