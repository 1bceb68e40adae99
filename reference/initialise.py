"""Modules without trained weights: with random weights from a seed, or with placeholders."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.reference.ttt_layer import TTTLayer

INNER_WEIGHT_STD = 0.02
"""Standard deviation of TTT weights before training, as in the public TTT-Video code."""

GATE_INIT = 0.1
"""Value of the gates of TTT layers before training, before their tanh."""

M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[[], M], seed: int) -> M:
    """The module that `build` creates, with random weights, for inference.

    Weights have PyTorch's default initialisation. TTT weights are normal with a standard deviation of 0.02, their
    biases zero. The same seed gives the same weights. The caller's random state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for layer in module.modules():
            if isinstance(layer, TTTLayer):
                for weight in (*layer.inner_weights()[::2], layer.learnable_ttt_lr_weight):
                    nn.init.normal_(weight, std=INNER_WEIGHT_STD)
    return module.eval().requires_grad_(False)


class SeededWeights:
    """Describes the weights of `seeded` modules, which are generated when they are read.

    A module draws all its weights from one random sequence, so reading one weight generates all of them. The unread
    weights of one module are kept. A caller that reads each weight once generates them once and leaves none in memory.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._unread: dict[str, Tensor] = {}
        self._owner: LazyStateDict = {}

    def describe(self, build: Callable[[], nn.Module]) -> LazyStateDict:
        """The weights of the module that `build` creates, by name. The names of a tied weight share one entry."""
        weights: LazyStateDict = {}
        entries: dict[Tensor, LazyTensor] = {}
        for name, value in on_meta_device(build).state_dict(keep_vars=True).items():
            read = partial(self._read, build, weights, name)
            weights[name] = entries.setdefault(value, LazyTensor(tuple(value.shape), value.dtype, read))
        return weights

    def _read(self, build: Callable[[], nn.Module], owner: LazyStateDict, name: str) -> Tensor:
        if self._owner is not owner or name not in self._unread:
            self._owner, self._unread = owner, {}  # frees the old weights first
            generated = seeded(build, self._seed).state_dict()
            first_names = {id(stored): name for name, stored in reversed(owner.items())}
            self._unread = {name: generated[name] for name in first_names.values()}
        return self._unread.pop(name)


def with_placeholder_weights(build: Callable[[], M], dtype: torch.dtype = torch.float32) -> M:
    """The module that `build` creates, with weights of `dtype` that have the right shapes but take no memory.

    Used to trace a model of any size. Weights cannot be loaded into it.
    """
    module = on_meta_device(build)
    placeholders: dict[nn.Parameter, nn.Parameter] = {}  # keeps tied weights tied
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype).expand(weight.shape)
            setattr(part, name, placeholders.setdefault(weight, nn.Parameter(zeros, requires_grad=False)))
    return module.eval()


def on_meta_device(build: Callable[[], M]) -> M:
    """The module that `build` creates, on the meta device: it has names, shapes and tied weights, but no values."""
    with torch.device("meta"):
        return build()


def init_ttt_weights(shapes: Mapping[str, torch.Size], seed: int) -> LazyStateDict:
    """Initial weights of TTT layers and their gates, by their names in the transformer.

    Matrices are normal with a standard deviation of 0.02, gates 0.1, norm scales 1, biases 0. A weight depends only on
    its name and the seed. Each is generated when it is read.
    """
    return {
        name: LazyTensor(tuple(shape), torch.float32, partial(_initial_ttt_weight, name, shape, seed))
        for name, shape in shapes.items()
    }


def _initial_ttt_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    kind = name.rpartition(".ttt.")[2]
    if kind.endswith("gating_alpha"):
        return torch.full(shape, GATE_INIT)
    if kind in ("ttt_norm_weight", "post_norm.weight"):
        return torch.ones(shape)
    if kind in ("b1", "b2") or kind.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.normal(0.0, INNER_WEIGHT_STD, shape, generator=generator)
