"""One data file of weights that all graphs of a component share."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

ALIGNMENT = 4096
"""Bytes; a multiple of the page size, so that a runtime can map tensors instead of reading them."""


@dataclass(frozen=True)
class WeightFile:
    """Where each weight lies in a data file, by its name in the module."""

    path: Path
    places: Mapping[str, tuple[int, int]]
    """Name → (offset, length) in bytes."""

    def attach(self, model: ir.Model) -> None:
        """Makes the initializers of `model` that are weights refer to this file, which lies beside the graph."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if name in self.places and tensor is not None:
                offset, length = self.places[name]
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]  # weights have no free axes
                    name=name,
                    base_dir=self.path.parent,
                )


def weight_file(weights: Mapping[str, Tensor], path: Path, *, write: bool) -> WeightFile:
    """Lays every tensor out once, in the order and dtype given; names of the same storage share a place.

    Without `write` the file is taken to be there already: the layout depends on the weights alone.
    """
    places: dict[str, tuple[int, int]] = {}
    by_storage: dict[tuple[int, torch.Size], tuple[int, int]] = {}
    end = 0
    with path.open("wb") if write else nullcontext() as file:
        for name, weight in weights.items():
            storage = (weight.data_ptr(), weight.shape)
            if storage not in by_storage:
                offset = end + -end % ALIGNMENT
                by_storage[storage] = offset, weight.nbytes
                if file is not None:
                    file.write(b"\0" * (offset - end))
                    file.write(weight.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                end = offset + weight.nbytes
            places[name] = by_storage[storage]
    return WeightFile(path, places)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
