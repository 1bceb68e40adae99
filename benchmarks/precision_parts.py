"""Measures the error of a transformer in half precision, as built and with one part of it in another precision.

One step of the debug model with random weights and both guidance branches, in PyTorch on a CPU, against float32.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Patch
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from measure import print_row, table
from torch import Tensor, nn
from torch.nn import functional

from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.parity.gate import random_cases
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.reference import attention, transformer, ttt_layer
from ttt_video_engine.reference.transformer import TransformerLayer
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.reference.ttt_layer import TTTMLP, TTTLayer, TTTLinear
from ttt_video_engine.runtime.presets import preset

LENGTH = "3s"

SCANS: dict[str, tuple[Callable[..., Tensor], int, float]] = {
    "linear": (ttt_linear, 16, 1.0),
    "mlp": (ttt_mlp, 64, 0.1),
}
"""Kind of TTT → the scan, its mini-batch and its learning rate."""

HEADS, HEAD_DIM, TOKENS = 4, 64, {"3s": 18_048, "63s": 351_168}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(transformers(), scans(), sep="\n\n")


def scans() -> str:
    """The scan alone, on the same rounded inputs: the error over a clip with state and arithmetic in half."""
    rows = []
    for ttt, (scan, mini_batch, rate) in SCANS.items():
        for length, tokens in TOKENS.items():
            cells = []
            for dtype in (torch.bfloat16, torch.float16):
                inputs = [value.to(dtype) for value in scan_inputs(ttt, tokens // mini_batch, mini_batch, rate)]
                with torch.no_grad():
                    exact = scan(*(value.float() for value in inputs))
                    with patch.object(Tensor, "float", lambda self: self):
                        found = scan(*inputs)
                found = found.to(torch.float32)
                cells.append(f"{float((found - exact).norm() / exact.norm()):.1e}")
            rows.append(print_row([f"TTT-{ttt}, {length}", *cells]))
    return table(["output of the scan, state and arithmetic in half", "bfloat16", "float16"], rows)


def scan_inputs(ttt: str, count: int, mini_batch: int, rate: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    clip = (1, HEADS, count, mini_batch, HEAD_DIM)
    q, k = (functional.normalize(normal(*clip), dim=-1) for _ in range(2))
    eta = rate * torch.rand(*clip[:-1], generator=generator) / HEAD_DIM / mini_batch
    sizes = {"linear": (HEAD_DIM, HEAD_DIM), "mlp": (HEAD_DIM, 4 * HEAD_DIM, HEAD_DIM)}[ttt]
    weights = []
    for width, out in pairwise(sizes):
        weights += [normal(HEADS, width, out, std=0.1), torch.zeros(HEADS, 1, out)]
    return [q, k, normal(*clip), eta, torch.ones(HEADS, HEAD_DIM), torch.zeros(HEADS, HEAD_DIM), *weights]


def transformers() -> str:
    rows = []
    columns = [(ttt, dtype) for ttt in ("linear", "mlp") for dtype in (torch.bfloat16, torch.float16)]
    losses = {column: dict(measured(*column)) for column in columns}
    for part in PARTS:
        rows.append([part, *(f"{losses[column][part]:.2e}" for column in columns)])
    names = [f"TTT-{ttt}, {str(dtype).removeprefix('torch.')}" for ttt, dtype in columns]
    return table(["velocity, relative error", *names], rows)


def measured(ttt: Any, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    model = preset("debug", ttt)
    exact = SeededSource(model, seed=0).transformer().load()
    latents, text, timestep = random_cases(transformer_graph(exact, model, LENGTH))["random, batch 2"]
    half = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        expected = exact(latents, text, timestep)
        for part, patched in PARTS.items():
            with patched(dtype):
                found = half(latents.to(dtype), text.to(dtype), timestep).float()
            error = float((found - expected).norm() / expected.norm())
            print_row([f"{ttt} {dtype}", part, f"{error:.2e}"])
            yield part, error


def scan_in_half(dtype: torch.dtype) -> Patch[object]:
    """Computes the inner model, its state included, in the dtype of the activations."""

    def in_half(scan: Callable[..., Tensor]) -> Any:
        def run(*inputs: Tensor) -> Tensor:
            with patch.object(Tensor, "float", lambda self: self):
                return scan(*(value.to(dtype) for value in inputs))

        return staticmethod(run)

    return all_patches(
        patch.object(TTTLinear, "scan", in_half(TTTLinear.scan)), patch.object(TTTMLP, "scan", in_half(TTTMLP.scan))
    )


def rates_in_half(dtype: torch.dtype) -> Patch[object]:
    rates = TTTLayer._learning_rates
    return patch.object(TTTLayer, "_learning_rates", lambda self, x: rates(self, x).to(dtype))


def unit_length_in_half(dtype: torch.dtype) -> Patch[object]:
    def unit_length(x: Tensor) -> Tensor:
        return x / (x * x).sum(-1, keepdim=True).sqrt()

    return patch.object(ttt_layer, "_unit_length", unit_length)


def norms_in_half(dtype: torch.dtype) -> Patch[object]:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred * centred).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias

    return patch.object(nn.LayerNorm, "forward", forward)


def softmax_in_half(dtype: torch.dtype) -> Patch[object]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ v

    return patch.object(attention.functional, "scaled_dot_product_attention", attend)


def timestep_in_half(dtype: torch.dtype) -> Patch[object]:
    embedding = transformer.timestep_embedding
    return patch.object(transformer, "timestep_embedding", lambda timestep, dim: embedding(timestep.to(dtype), dim))


def sum_in_float32(dtype: torch.dtype) -> Patch[object]:
    """Keeps the residual stream and its modulation in float32. Blocks take and return half precision."""
    forward, norm = TransformerLayer.forward, nn.LayerNorm.forward

    def layer(self: TransformerLayer, x: Tensor, t_emb: Tensor, layout: Any) -> Tensor:
        return forward(self, x.float(), t_emb, layout)

    def wide_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return norm(self, x)
        return functional.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)

    def narrowed(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, x, *rest: block(self, x.to(dtype), *rest)

    return all_patches(
        patch.object(TransformerLayer, "forward", layer),
        patch.object(nn.LayerNorm, "forward", wide_norm),
        patch.object(attention.SeqModelingBlock, "forward", narrowed(attention.SeqModelingBlock.forward)),
        patch.object(transformer.MLP, "forward", narrowed(transformer.MLP.forward)),
        patch.object(transformer.FinalLayer, "forward", narrowed(transformer.FinalLayer.forward)),
    )


@contextmanager
def all_patches(*patches: Patch[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


PARTS: dict[str, Callable[[torch.dtype], Patch[object]]] = {
    "as built": lambda dtype: nullcontext(),
    "inner model of TTT in half": scan_in_half,
    "learning rates of TTT in half": rates_in_half,
    "unit length of q and k in half": unit_length_in_half,
    "LayerNorm in half": norms_in_half,
    "softmax in half": softmax_in_half,
    "timestep in half": timestep_in_half,
    "sum of the layers in float32": sum_in_float32,
}


if __name__ == "__main__":
    main()
