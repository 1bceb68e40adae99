"""One data file of weights that all graphs of a component share."""

from collections.abc import Mapping
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


def write_weights(weights: Mapping[str, Tensor], path: Path) -> WeightFile:
    """Writes every tensor once, in the order and dtype given; names of the same storage share a place."""
    places: dict[str, tuple[int, int]] = {}
    written: dict[tuple[int, torch.Size], str] = {}
    with path.open("wb") as file:
        for name, weight in weights.items():
            storage = (weight.data_ptr(), weight.shape)
            if storage in written:
                places[name] = places[written[storage]]
                continue
            written[storage] = name
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(weight.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            places[name] = offset, file.tell() - offset
    return WeightFile(path, places)
