"""Registers, stack and shared memory of the compiled TTT kernels per GPU architecture, at the sizes of the 5B model."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import print_row, table

from ttt_video_engine.engines.kernels.compile import (
    PRECISIONS,
    compile_kernel,
    compile_staged_mlp,
)
from ttt_video_engine.engines.kernels.cubin import Cubin
from ttt_video_engine.engines.kernels.sizes import SHARED_MEMORY, NoKernel

MINI_BATCH_SIZES = {"linear": 16, "mlp": 64}
HEAD_DIM = 64


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for op, mini_batch_size in MINI_BATCH_SIZES.items():
            sizes = {"mini_batch_size": mini_batch_size, "head_dim": HEAD_DIM, "folder": Path(folder)}
            for dtype, precision in PRECISIONS[op].items():
                for gpu in SHARED_MEMORY:
                    name = [f"TTT-{op}, C = {mini_batch_size}", dtype, precision, gpu]
                    compiled = partial(compile_kernel, op, gpu=gpu, dtype=dtype, **sizes)
                    rows.append(print_row([*name, *resources(compiled)]))
        for gpu in SHARED_MEMORY:
            name = ["TTT-mlp, staged", "bfloat16", "bf16", gpu]
            rows.append(print_row([*name, *resources(partial(compile_staged_mlp, gpu=gpu, folder=Path(folder)))]))
    header = ["scan", "tensors", "products", "GPU", "threads", "registers", "stack", "shared memory"]
    print(table(header, rows))


def resources(compiled: Callable[[], Cubin]) -> list[str]:
    """Threads, registers, stack and shared memory, or why there is no kernel."""
    try:
        cubin = compiled()
    except NoKernel as reason:
        return ["–", "–", "–", str(reason)]
    return [f"{cubin.num_warps * 32}", f"{cubin.registers}", f"{cubin.spills:,}", f"{cubin.shared_memory:,}"]


if __name__ == "__main__":
    main()
