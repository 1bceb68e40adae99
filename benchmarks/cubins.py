"""Registers, stack and shared memory of the compiled TTT kernels per GPU architecture, at the sizes of the 5B model."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import print_row, table

from ttt_video_engine.engines.kernels.compile import PRECISIONS, SHARED_MEMORY, NoKernel, compile_kernel

MINI_BATCH_SIZES = {"linear": 16, "mlp": 64}
HEAD_DIM = 64


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for op, mini_batch_size in MINI_BATCH_SIZES.items():
            for dtype, precision in PRECISIONS[op].items():
                for gpu in SHARED_MEMORY:
                    name = [f"TTT-{op}, C = {mini_batch_size}", dtype, precision, gpu]
                    sizes = {"mini_batch_size": mini_batch_size, "head_dim": HEAD_DIM}
                    try:
                        cubin = compile_kernel(op, gpu=gpu, dtype=dtype, folder=Path(folder), **sizes)
                    except NoKernel as reason:
                        rows.append(print_row([*name, "–", "–", "–", str(reason)]))
                        continue
                    used = [f"{cubin.num_warps * 32}", f"{cubin.registers}", f"{cubin.spills:,}"]
                    rows.append(print_row([*name, *used, f"{cubin.shared_memory:,}"]))
    header = ["scan", "tensors", "products", "GPU", "threads", "registers", "stack", "shared memory"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
