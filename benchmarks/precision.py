"""What rounding the factors of a scan's matrix products costs, at full width: the error budget of the GPU kernels.

The oracle is run as it is, once with every product's factors rounded to what the tensor cores take.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measure import so_far, table
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ttt_video_engine.engines.kernels.compile import PRECISIONS
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.runtime.config import DType, TTTKind

HEADS, HEAD_DIM, TOKENS = 48, 64, 18048
"""Of the 5B model and 3 seconds."""

_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PRODUCTS = {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul}


class RoundedProducts(TorchFunctionMode):
    """Rounds the factors of every matrix product."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        self._rounded = rounded

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _PRODUCTS:
            arguments = tuple(self._rounded(argument) for argument in arguments)
        return function(*arguments, **(keywords or {}))


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, to nearest."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf32x3": lambda x: x,  # three products of tf32 are a float32 one to the last bits
    "tf32": to_tf32,
    "bf16": lambda x: x.bfloat16().float(),
}


def full_width_inputs(op: TTTKind, mini_batch_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    clip = (1, HEADS, TOKENS // mini_batch_size, mini_batch_size, HEAD_DIM)
    hidden = {"linear": (HEAD_DIM,), "mlp": (4 * HEAD_DIM, HEAD_DIM)}[op]
    weights, width = {}, HEAD_DIM
    for layer, out in enumerate(hidden, start=1):
        weights |= {f"W{layer}": normal(HEADS, width, out, std=0.02), f"b{layer}": normal(HEADS, 1, out, std=0.02)}
        width = out
    base_lr = {"linear": 1.0, "mlp": 0.1}[op]
    return {
        "XQ": functional.normalize(normal(*clip), dim=-1),
        "XK": functional.normalize(normal(*clip), dim=-1),
        "XV": normal(*clip),
        "eta": base_lr * torch.rand(*clip[:-1], generator=generator) / HEAD_DIM / mini_batch_size,
        "norm_weight": 1 + normal(HEADS, HEAD_DIM, std=0.1),
        "norm_bias": normal(HEADS, HEAD_DIM, std=0.1),
        **weights,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for op, scan, mini_batch_size in (("linear", ttt_linear, 16), ("mlp", ttt_mlp, 64)):
        inputs = full_width_inputs(op, mini_batch_size)
        exact = scan(*inputs.values())
        for dtype, precision in PRECISIONS[op].items():
            stored = {name: value.to(_DTYPES[dtype]).float() for name, value in inputs.items()}
            stored["eta"] = inputs["eta"]
            alone = error(scan(*stored.values()), exact)
            with RoundedProducts(ROUNDINGS[precision]):
                products = scan(*stored.values()).to(_DTYPES[dtype]).float()
            cells = [f"TTT-{op}, C = {mini_batch_size}", dtype, precision, alone, error(products, exact)]
            rows.append(so_far(cells))
    print(table(["scan", "tensors", "products", "rounded inputs alone: max / mean", "all: max / mean"], rows))


def error(found: Tensor, exact: Tensor) -> str:
    difference = (found - exact).abs()
    return f"{difference.max() / exact.abs().max():.1e} / {difference.mean() / exact.abs().mean():.1e}"


if __name__ == "__main__":
    main()
