"""The optimisers of the transformer and its text encoder."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from demo.model import DemoModel

_MUON_RATE, _ADAM_RATE = 0.01, 1e-3
_VECTOR_RATE = 5e-3
"""Of norms, biases and gates. They begin at 1 or 0 and have far to go: what the norms of queries and keys leave in them
is all that tells a token of pure noise where it stands, by its rotation against the text's."""
_CLIP = 1.0


class Optimiser:
    """Muon for the matrices of the layers, AdamW for everything else, under one schedule of learning rates."""

    def __init__(self, model: DemoModel) -> None:
        self._weights = list(model.parameters())
        matrices = [weight for name, weight in model.named_parameters() if _is_layer_matrix(name, weight)]
        text = list(model.text_encoder.parameters())
        chosen = {*matrices, *text}
        rest = [weight for weight in self._weights if weight not in chosen]
        vectors = [weight for weight in rest if weight.dim() == 1]
        others = [weight for weight in rest if weight.dim() > 1]
        self._muon: Optimizer = torch.optim.Muon(matrices, lr=_MUON_RATE, weight_decay=0.01, ns_steps=4)
        groups = [{"params": text}, {"params": vectors}, {"params": others}]
        self._adam: Optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, share: float, text_rate: float) -> float:
        """Applies the gradients at `share` of the learning rates and clears them; their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._weights, _CLIP)
        (layers,), (text, vectors, others) = self._muon.param_groups, self._adam.param_groups
        layers["lr"], vectors["lr"] = share * _MUON_RATE, share * _VECTOR_RATE
        text["lr"], others["lr"] = share * text_rate * _ADAM_RATE, share * _ADAM_RATE
        for part in (self._muon, self._adam):
            part.step()
            part.zero_grad()
        return float(norm)

    def state_dict(self) -> list[dict[str, object]]:
        return [self._muon.state_dict(), self._adam.state_dict()]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip((self._muon, self._adam), states, strict=True):
            part.load_state_dict(state)


def _is_layer_matrix(name: str, weight: Tensor) -> bool:
    """Those that multiply tokens; not the modulations, which start from zero."""
    return weight.dim() == 2 and "transformer.layers." in name and "adaLN" not in name and "ttt_norm" not in name
