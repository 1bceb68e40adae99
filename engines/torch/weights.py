"""Loads a component's weights from the bundle's weight file. The ONNX graph says where in it each weight is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BundleError
from ttt_video_engine.runtime.graph_files import check_external_data, external_data
from ttt_video_engine.runtime.quantization import INTEGERS, SCALES

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

M = TypeVar("M", bound=nn.Module)


ByteRange = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True)
class WeightSource:
    """A weight file: the byte range of each weight by name, and the dtype of the weights.

    The weights have the names of the module behind `prefix`.
    """

    path: Path
    places: Mapping[str, ByteRange]
    prefix: str
    dtype: DType


def named_by_graph(graph: Path, weights: Path, prefix: str, dtype: DType) -> WeightSource:
    """The weight file of an ONNX graph, whose external data names the weights. Raises BundleError for a damaged one."""
    if not weights.is_file():
        raise BundleError(f"{weights}: is missing; {EXPORT_AGAIN}")
    check_external_data(graph, weights, weights.stat().st_size)
    entries = ((name, dict(pairs)) for name, pairs in external_data(graph.read_bytes()))
    return WeightSource(weights, {name: (int(e["offset"]), int(e["length"])) for name, e in entries}, prefix, dtype)


def with_stored_weights(build: Callable[[], M], source: WeightSource, device: torch.device) -> M:
    """The module that `build` creates, on `device`, with the weights of a bundle, for inference.

    On a CPU the weights stay in the file, mapped into memory. A weight that the bundle holds in int8 is its integers
    times their scales, in float32. Raises BundleError where a weight is missing, or has another size than the module's.
    """
    module = on_meta_device(build)
    stored = _StoredWeights(source)
    weights = module.state_dict(keep_vars=True)
    names: dict[Tensor, list[str]] = {}  # of a tied weight, which is stored under one of them
    for name, weight in weights.items():
        names.setdefault(weight, []).append(name)
    loaded = {
        weight: nn.Parameter(stored.read(same, tuple(weight.shape)).to(device), requires_grad=False)
        for weight, same in names.items()
    }
    module.load_state_dict({name: loaded[weight] for name, weight in weights.items()}, assign=True)
    return module.eval()


class _StoredWeights:
    """The weights of a weight file by the names of a source, each read where it is asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._dtype = TORCH_DTYPES[source.dtype]
        # Copy on write: torch takes no memory that cannot be written.
        self._content = np.memmap(source.path, np.uint8, mode="c")

    def read(self, names: list[str], shape: tuple[int, ...]) -> Tensor:
        """The weight of the first of `names` that the file has."""
        for name in (self._source.prefix + name for name in names):
            if name in self._source.places:
                return self._tensor(name, shape, self._dtype)
            if name + INTEGERS in self._source.places:
                rows, columns = shape
                integers = self._tensor(name + INTEGERS, (columns, rows), torch.int8)
                return integers.t().to(self._dtype) * self._tensor(name + SCALES, (rows,), self._dtype)[:, None]
        raise BundleError(f"{self._source.path}: has no weight {self._source.prefix}{names[0]}; {EXPORT_AGAIN}")

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        offset, length = self._source.places.get(name, (0, -1))
        count = torch.Size(shape).numel()
        if length != count * dtype.itemsize:
            raise BundleError(
                f"{self._source.path}: {name} has {max(length, 0):,} bytes; {list(shape)} in {dtype} takes "
                f"{count * dtype.itemsize:,}; {EXPORT_AGAIN}"
            )
        return torch.frombuffer(self._content, dtype=dtype, count=count, offset=offset).view(shape)
