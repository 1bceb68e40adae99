"""A step of `first_contact.py`: the TTT kernels against the scan of the reference, in every size and dtype."""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from contact_rows import add_row
from torch import Tensor
from torch.nn import functional

from ttt_video_engine.engines.cuda import device
from ttt_video_engine.engines.kernels.cubin import cubin_name, read_cubin
from ttt_video_engine.engines.torch.scan import KernelScan
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp

SCANS = {"linear": ttt_linear, "mlp": ttt_mlp}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCES = {"float32": 1e-4, "float16": 1.5e-3, "bfloat16": 1.5e-2}
"""Of the largest value, as in `tests/test_kernels.py`."""
BATCH, HEADS, MINI_BATCHES = 2, 3, 12
MODEL_SIZES = {"linear": (16, 64), "mlp": (64, 64)}
"""Tokens of a mini-batch and head size of the 5B model, which are run first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="no case is begun after so long")
    parser.add_argument("--small", action="store_true", help="the 5B model's sizes in bfloat16 alone")
    parser.add_argument("--cubins", type=Path, help="folder of cubins, in place of compiling them")
    options = parser.parse_args()
    start, gpu = time.monotonic(), device(torch.cuda.current_device()).gpu
    with TemporaryDirectory() as scratch:
        for op, dtype, (tokens, head_dim) in cases(options.small):
            if time.monotonic() - start > options.seconds:
                add_row(kernel="further sizes", note="left out: the time is up")
                return
            name = cubin_name(op, gpu, dtype, tokens, head_dim)
            if options.cubins is None:
                reason = compiled(op, gpu, dtype, tokens, head_dim, Path(scratch))
            else:
                reason = "" if (options.cubins / f"{name}.json").is_file() else "is not in the folder"
            if reason:
                add_row(kernel=name, note=reason)
                continue
            scan = KernelScan(*read_cubin(options.cubins or Path(scratch), name))
            inputs = random_inputs(op, tokens, head_dim, DTYPES[dtype])
            expected, found = SCANS[op](*inputs).float(), scan(*inputs).float()
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            passed = bool(found.isfinite().all()) and error <= TOLERANCES[dtype]
            add_row(kernel=name, error=f"{error:.1e}", allowed=TOLERANCES[dtype], passed=passed)


def cases(small: bool) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(op, dtype, (tokens of a mini-batch, head size)), those of the 5B model first."""
    first = [(op, dtype, size) for op, size in MODEL_SIZES.items() for dtype in DTYPES]
    yield from (case for case in first if not small or case[1] == "bfloat16")
    if not small:
        sizes = product((16, 64), (16, 32, 64, 128))
        yield from (case for case in product(SCANS, DTYPES, sizes) if case not in first)


def compiled(op: str, gpu: str, dtype: str, tokens: int, head_dim: int, folder: Path) -> str:
    """Compiles a kernel into a folder; returns why there is none."""
    from ttt_video_engine.engines.kernels.compile import compile_kernel
    from ttt_video_engine.engines.kernels.sizes import NoKernel

    try:
        compile_kernel(op, gpu=gpu, dtype=dtype, mini_batch_size=tokens, head_dim=head_dim, folder=folder)
    except NoKernel as reason:
        return str(reason)
    return ""


def random_inputs(op: str, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """As in a model: unit queries and keys, small learning rates."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(*size, generator=generator, device="cuda")).to(dtype)

    clip, hidden = (BATCH, HEADS, MINI_BATCHES, tokens, head_dim), 4 * head_dim
    weights = {
        "linear": [(HEADS, head_dim, head_dim), (HEADS, 1, head_dim)],
        "mlp": [(HEADS, head_dim, hidden), (HEADS, 1, hidden), (HEADS, hidden, head_dim), (HEADS, 1, head_dim)],
    }
    q, k = (functional.normalize(normal(*clip).float(), dim=-1).to(dtype) for _ in range(2))
    eta = torch.rand(clip[:-1], generator=generator, device="cuda") / head_dim / tokens
    norm = [normal(HEADS, head_dim, std=0.1, mean=1.0), normal(HEADS, head_dim, std=0.1)]
    return [q, k, normal(*clip), eta, *norm, *(normal(*size, std=0.1) for size in weights[op])]


if __name__ == "__main__":
    main()
