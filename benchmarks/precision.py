"""Measures the error of rounding the factors of a scan's matrix products, at full width, as the GPU kernels do.

The reference scan runs in float32, and again with every product's factors rounded to the tensor cores' input type.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measure import print_row, table
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ttt_video_engine.engines.kernels.compile import PRECISIONS
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.parity.gate import random_cases
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.runtime.config import DiffusionConfig, TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.sampler import Array, guided, sample
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule

HEADS, HEAD_DIM, TOKENS = 48, 64, 18048
"""Sizes of the 5B model and tokens of 3 s."""

STEPS = 50

STDS = (0.1, 0.02)
"""Standard deviations of the initial inner weights. The public code starts training from 0.02, where LayerNorm divides
by almost zero in the first mini-batches."""

_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PRODUCTS = ("matmul", "__matmul__")


class RoundedProducts(TorchFunctionMode):
    """Rounds the factors of every matrix product."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        self._rounded = rounded

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        if function.__name__ in _PRODUCTS:
            arguments = tuple(self._rounded(argument) for argument in arguments)
        return function(*arguments, **(keywords or {}))


def to_tf32(x: Tensor) -> Tensor:
    """Rounds float32 to TF32: ten bits of mantissa, to nearest."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf32": to_tf32,
    "bf16": lambda x: x.bfloat16().float(),
}


def full_width_inputs(
    op: TTTKind, mini_batch_size: int, weight_std: float, heads: int = HEADS, tokens: int = TOKENS
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    clip = (1, heads, tokens // mini_batch_size, mini_batch_size, HEAD_DIM)
    hidden = {"linear": (HEAD_DIM,), "mlp": (4 * HEAD_DIM, HEAD_DIM)}[op]
    weights, width = {}, HEAD_DIM
    for layer, out in enumerate(hidden, start=1):
        weights |= {
            f"W{layer}": normal(heads, width, out, std=weight_std),
            f"b{layer}": normal(heads, 1, out, std=weight_std),
        }
        width = out
    base_lr = {"linear": 1.0, "mlp": 0.1}[op]
    return {
        "XQ": functional.normalize(normal(*clip), dim=-1),
        "XK": functional.normalize(normal(*clip), dim=-1),
        "XV": normal(*clip),
        "eta": base_lr * torch.rand(*clip[:-1], generator=generator) / HEAD_DIM / mini_batch_size,
        "norm_weight": 1 + normal(heads, HEAD_DIM, std=0.1),
        "norm_bias": normal(heads, HEAD_DIM, std=0.1),
        **weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="351168 for 63 s")
    parser.add_argument("--scans", action="store_true", help="only the scans")
    arguments = parser.parse_args()
    print(scans(arguments.heads, arguments.tokens))
    if not arguments.scans:
        print("", transformers(), sep="\n")


def scans(heads: int, tokens: int) -> str:
    rows = []
    for weight_std in STDS:
        for op, scan, mini_batch_size in (("linear", ttt_linear, 16), ("mlp", ttt_mlp, 64)):
            inputs = full_width_inputs(op, mini_batch_size, weight_std, heads, tokens)
            exact = scan(*inputs.values())
            for dtype, precision in PRECISIONS[op].items():
                if precision not in ROUNDINGS:
                    continue  # tf32x3 equals float32 except in the last bits
                stored = {name: value.to(_DTYPES[dtype]).float() for name, value in inputs.items()}
                stored["eta"] = inputs["eta"]
                from_stored = scan(*stored.values())
                with RoundedProducts(ROUNDINGS[precision]):
                    on_chip = scan(*stored.values()).to(_DTYPES[dtype]).float()
                name = [f"TTT-{op}, C = {mini_batch_size}", f"{weight_std:g}", dtype, precision]
                rows.append(print_row([*name, error(from_stored, exact), error(on_chip, from_stored)]))
    return table(
        ["scan", "weights' std", "tensors", "products", "tensors rounded", "products and output rounded"], rows
    )


def transformers() -> str:
    """Whole transformers in half precision against float32: one step's velocity, and the latents after 50 steps."""
    rows = []
    for ttt in ("linear", "mlp"):
        model = preset("tiny", ttt)
        exact = SeededSource(model, seed=0).transformer().load()
        inputs = random_cases(transformer_graph(exact, model, "9s"))["random, batch 2"]
        expected = velocity_and_latents(exact, torch.float32, model.diffusion, *inputs)
        for dtype in (torch.float16, torch.bfloat16):
            found = velocity_and_latents(copy.deepcopy(exact).to(dtype), dtype, model.diffusion, *inputs)
            errors = [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(found, expected, strict=True)]
            rows.append(print_row([f"tiny {ttt} 9s", str(dtype).removeprefix("torch."), *errors]))
    return table(["transformer", "precision", "velocity", f"latents after {STEPS} steps"], rows)


@torch.no_grad()
def velocity_and_latents(
    module: DiffusionTransformer,
    dtype: torch.dtype,
    diffusion: DiffusionConfig,
    latents: Tensor,
    text: Tensor,
    timestep: Tensor,
) -> tuple[Tensor, Tensor]:
    """The velocity of both guidance branches [2, T, C, H, W], and the latents after DDIM steps at guidance scale 6.

    Sampling starts from `latents[:1]` as noise.
    """

    def velocities(x: Array, t: int) -> tuple[Array, Array]:
        video = torch.from_numpy(x).expand(2, *x.shape[1:]).to(dtype)
        negative, positive = module(video, text.to(dtype), torch.tensor([t, t])).float().numpy()
        return negative[None], positive[None]

    schedule = make_schedule(diffusion, STEPS)
    guidance = guidance_scales("dynamic", 6.0, schedule.timesteps)
    noise = latents[:1].numpy()
    *_, last = sample(guided(velocities), noise, schedule, guidance, "ddim", lambda: noise)
    return module(latents.to(dtype), text.to(dtype), timestep).float(), torch.from_numpy(last.latents)


def error(found: Tensor, exact: Tensor) -> str:
    """Largest error / largest value, and mean error / mean value."""
    difference = (found - exact).abs()
    return f"{difference.max() / exact.abs().max():.1e} / {difference.mean() / exact.abs().mean():.1e}"


if __name__ == "__main__":
    main()
