"""Compiles the layers of the transformer with torch.compile, where there is a GPU and what compiling for it takes.

Their elementwise work, which PyTorch would launch operation by operation, becomes a few kernels. The scan stays the
kernel that it is.
"""

import shutil
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ttt_video_engine.engines.torch.scan import use_scan
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.transformer import TransformerLayer
from ttt_video_engine.reference.ttt_layer import Scan

_SCANS: dict[str, Scan] = {}
"""By the name that the operator is called with."""


def cannot_compile(device: torch.device, scan: Scan | None, *, has_ttt: bool) -> str:
    """Why the layers are not compiled; empty where they are.

    The reference's scan would be unrolled into a program as long as the clip.
    """
    if device.type != "cuda":
        return "no GPU"
    if has_ttt and scan is None:
        return "no kernel for the scan"
    if find_spec("triton") is None:
        return "no Triton"
    return "" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "no C compiler"


def compile_layers(module: nn.Module, scan: Scan | None, **options: Any) -> None:
    """Compiles each layer of a transformer in `module` when it first runs, with `scan` as an operator.

    `options` are those of torch.compile. All layers share what is compiled, since only their weights differ. Where
    compiling fails, the layer runs as it is: torch is set to fall back so for the rest of the process.
    """
    torch._dynamo.config.suppress_errors = True
    if scan is not None:
        use_scan(module, _as_operator(scan))
    for layer in [part for part in module.modules() if isinstance(part, TransformerLayer)]:
        layer.forward = _outside_of_modes(torch.compile(layer.forward, dynamic=False, **options))  # type: ignore[method-assign]


def _outside_of_modes(forward: Callable[[Tensor, Tensor, TokenLayout], Tensor]) -> Callable[..., Tensor]:
    """A layer that torch compiles whole. Under a default device, it would be cut at every `Tensor.unflatten`.

    What needs the default device is done before: the tables of the clip's layout.
    """

    def call(x_BLD: Tensor, t_emb: Tensor, layout: TokenLayout) -> Tensor:
        for name, table in vars(TokenLayout).items():
            if isinstance(table, cached_property):
                getattr(layout, name)
        with torch._C.DisableTorchFunction():
            return forward(x_BLD, t_emb, layout)

    return call


def _as_operator(scan: Scan) -> Scan:
    """The scan as one operator of a compiled program. Its name is that of the object, which is kept."""
    name = f"{type(scan).__name__}-{id(scan)}"
    _SCANS[name] = scan

    def call(queries: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor = _scan(name, queries, list(rest))
        return out

    return call


@torch.library.custom_op("ttt_video_engine::scan", mutates_args=())
def _scan(name: str, queries: Tensor, rest: list[Tensor]) -> Tensor:
    return _SCANS[name](queries, *rest)


@_scan.register_fake
def _(name: str, queries: Tensor, rest: list[Tensor]) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)
