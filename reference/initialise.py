"""Modules without trained weights: with random weights from a seed, or with none."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.reference.ttt_layer import TTTLayer

INNER_WEIGHT_STD = 0.02
GATE = 0.1

M = TypeVar("M", bound=nn.Module)


def seeded(build: Callable[[], M], seed: int) -> M:
    """The module that `build` makes, with PyTorch's usual initial weights and those of TTT layers, for inference.

    TTT weights are those that a fresh layer starts training with: normal with a standard deviation of 0.02, biases
    zero. The same seed gives the same weights. The caller's random state is restored.
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
    """Describes the weights of `seeded` modules, which are made when they are read.

    A module draws all its weights in one sequence, so reading one makes all. Those that wait to be read are kept, of
    one module at a time: whoever reads each weight once has them made once, and leaves nothing in memory.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._unread: dict[str, Tensor] = {}
        self._owner: LazyStateDict = {}

    def describe(self, build: Callable[[], nn.Module]) -> LazyStateDict:
        """The weights of the module that `build` makes, by name. Names of one weight share an entry."""
        weights: LazyStateDict = {}
        entries: dict[Tensor, LazyTensor] = {}
        for name, value in on_meta_device(build).state_dict(keep_vars=True).items():
            read = partial(self._read, build, weights, name)
            weights[name] = entries.setdefault(value, LazyTensor(tuple(value.shape), value.dtype, read))
        return weights

    def _read(self, build: Callable[[], nn.Module], owner: LazyStateDict, name: str) -> Tensor:
        if self._owner is not owner or name not in self._unread:
            self._owner, self._unread = owner, {}  # the old ones go first
            made = seeded(build, self._seed).state_dict()
            first_names = {id(stored): name for name, stored in reversed(owner.items())}
            self._unread = {name: made[name] for name in first_names.values()}
        return self._unread.pop(name)


def with_placeholder_weights(build: Callable[[], M], dtype: torch.dtype = torch.float32) -> M:
    """The module that `build` makes, with weights of the right shapes and of `dtype` that take no memory.

    It serves to trace a model of any size. Weights cannot be loaded into it.
    """
    module = on_meta_device(build)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a weight of two names stays one
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            one = torch.zeros((), dtype=dtype).expand(weight.shape)
            setattr(part, name, made.setdefault(weight, nn.Parameter(one, requires_grad=False)))
    return module.eval()


def on_meta_device(build: Callable[[], M]) -> M:
    """The module that `build` makes, its weights without values: names, shapes, and which names share a tensor."""
    with torch.device("meta"):
        return build()


def init_ttt_weights(shapes: Mapping[str, torch.Size], seed: int) -> LazyStateDict:
    """Weights that TTT layers and their gates start training with, by their names in the transformer.

    Matrices are normal with a standard deviation of 0.02, gates 0.1, scales of norms 1 and all biases 0. A weight
    depends on its name and the seed alone, so each is made when it is read.
    """
    return {
        name: LazyTensor(tuple(shape), torch.float32, partial(_fresh, name, shape, seed))
        for name, shape in shapes.items()
    }


def _fresh(name: str, shape: torch.Size, seed: int) -> Tensor:
    kind = name.rpartition(".ttt.")[2]
    if kind.endswith("gating_alpha"):
        return torch.full(shape, GATE)
    if kind in ("ttt_norm_weight", "post_norm.weight"):
        return torch.ones(shape)
    if kind in ("b1", "b2") or kind.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.normal(0.0, INNER_WEIGHT_STD, shape, generator=generator)
