"""State dicts as they lie in files, read and compared, and what pickle would run of one."""

import os
from pathlib import Path

import torch
from formats import State

from ttt_video_engine.export.sources.source import Component
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.presets import tiny


class Evil:
    """What pickle would run while it reads the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def transformer_state() -> State:
    return seeded(lambda: DiffusionTransformer(tiny("mlp").transformer), 5).state_dict()


def transformer_of(weights: LazyStateDict) -> DiffusionTransformer:
    return Component(lambda: DiffusionTransformer(tiny("mlp").transformer), weights, "a file").load()


def stored(state: State) -> LazyStateDict:
    """As if it lay in a file."""
    return {name: LazyTensor(tuple(value.shape), value.dtype, value.clone) for name, value in state.items()}


def read(state: LazyStateDict) -> State:
    """All of it; what is described must be what is read."""
    tensors = {name: value.read() for name, value in state.items()}
    for name, value in state.items():
        assert (value.shape, value.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
    return tensors


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
