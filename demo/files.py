"""Checkpoints that are there as a whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def save(state: dict[str, Any], path: Path) -> None:
    """Writes beside `path` first, so that whoever is cut off leaves the checkpoint before."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def published(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The number of steps that a part of a checkpoint was trained for, and its weights in float32."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        steps = int(file.metadata()["steps"])
        return steps, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
