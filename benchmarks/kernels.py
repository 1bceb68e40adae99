"""Times the TTT kernels on this GPU at the sizes of the 5B model, beside the GPU's measured peaks. Needs no torch."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import triton
import triton.language as tl
from cuda.bindings import driver
from cuda.core import EventOptions
from measure import print_row, table
from msgspec.structs import replace
from simple_scan import simple_linear

from ttt_video_engine.engines.cuda import DeviceArray, DeviceBuffer, Stream, device, to_device
from ttt_video_engine.engines.kernels.compile import assemble, compile_kernel, compile_staged_mlp, constants
from ttt_video_engine.engines.kernels.cubin import Cubin, read_cubin
from ttt_video_engine.engines.kernels.launch import LoadedKernel
from ttt_video_engine.engines.kernels.sizes import NoKernel
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import preset

HEADS, HEAD_DIM = 48, 64
LENGTHS = ("3s", "9s", "63s")
MINI_BATCH: dict[TTTKind, int] = {"linear": 16, "mlp": 64}
REPETITIONS = 20
MATRIX = 8192
"""Rows and columns of the matrices that the peak of matrix products is measured with."""

Launch = Callable[[], None]


@triton.jit
def matmul(A, B, out, size, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out = A·Bᵀ for square bfloat16 matrices [SIZE, SIZE]; one tile of M by N per program."""
    rows = tl.program_id(0) // (SIZE // N) * M + tl.arange(0, M)
    columns = tl.program_id(0) % (SIZE // N) * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, size, K):
        a = tl.load(A + rows[:, None] * SIZE + start + inner[None, :])
        b = tl.load(B + columns[:, None] * SIZE + start + inner[None, :])
        total += tl.dot(a, tl.trans(b))
    tl.store(out + rows[:, None] * SIZE + columns[None, :], total.to(tl.bfloat16))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        gpu = device()
    except BackendError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    with closing(Stream()) as stream, TemporaryDirectory() as folder:
        copy, products = peak_bandwidth(stream), peak_matmul(stream, gpu.gpu)
        print(
            f"{gpu.name} ({gpu.gpu}): copies {copy / 1e9:.0f} GB/s, bfloat16 products {products / 1e12:.0f} TFLOP/s\n"
        )
        rows = []
        for op, staged in (("linear", False), ("mlp", False), ("mlp", True)):
            for length in LENGTHS:
                for batch in (1, 2):
                    rows.append(print_row(scan_row(stream, Path(folder), gpu.gpu, op, staged, length, batch)))
        print(table(["scan", "tokens", "batch", "ms", "TFLOP/s", "GB/s", "simple ms", "faster"], rows))


def scan_row(stream: Stream, folder: Path, gpu: str, op: TTTKind, staged: bool, length: str, batch: int) -> list[str]:
    model, mini_batch = preset("5B", op), MINI_BATCH[op]
    tokens = model.clip_size(length).num_tokens(model.transformer.patch_size)
    sizes = {"mini_batch_size": mini_batch, "head_dim": HEAD_DIM}
    name = [f"TTT-{op}{' staged' if staged else ''} {length}", f"{tokens:,}", f"{batch}"]
    try:
        if staged:
            cubin = compile_staged_mlp(gpu=gpu, folder=folder)
        else:
            cubin = compile_kernel(op, gpu=gpu, dtype="bfloat16", folder=folder, **sizes)
    except NoKernel as reason:
        return [*name, str(reason), "", "", "", ""]
    cubin, code = read_cubin(folder, Path(cubin.file).stem)
    arrays = inputs(stream, op, batch, tokens)
    seconds = seconds_of_scan(stream, cubin, code, arrays, batch, tokens // mini_batch)
    flops = batch * HEADS * tokens * flops_per_token(op, mini_batch)
    moved = batch * HEADS * tokens * (4 * HEAD_DIM * 2 + 4)
    row = [*name, f"{seconds * 1e3:.2f}", f"{flops / seconds / 1e12:.1f}", f"{moved / seconds / 1e9:.0f}"]
    if op == "mlp":
        return [*row, "", ""]
    simple, simple_code = simple_cubin(cubin, gpu)
    baseline = seconds_of_scan(stream, simple, simple_code, arrays, batch, tokens // mini_batch)
    return [*row, f"{baseline * 1e3:.2f}", f"{baseline / seconds:.2f}x"]


def flops_per_token(op: TTTKind, mini_batch: int) -> int:
    """Operations per token and head of the scan's matrix products, the minimum of any implementation."""
    square = HEAD_DIM * HEAD_DIM
    return {"linear": 2 * 3 * square, "mlp": 2 * 7 * 4 * square}[op]


def inputs(stream: Stream, op: TTTKind, batch: int, tokens: int) -> list[DeviceArray]:
    """The scan's inputs and its output buffer. One mini-batch of unit queries and keys is drawn and repeated."""
    mini_batch, random = MINI_BATCH[op], np.random.default_rng(0)

    def bfloat16(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def clip(unit: bool) -> DeviceArray:
        drawn = random.standard_normal((1, 1, 1, mini_batch, HEAD_DIM), dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True) if unit else 1
        shape = (batch, HEADS, tokens // mini_batch, mini_batch, HEAD_DIM)
        return to_device(np.ascontiguousarray(np.broadcast_to(bfloat16(drawn), shape)), stream)

    def weight(*shape: int, mean: float = 0.0) -> DeviceArray:
        return to_device(bfloat16(mean + 0.02 * random.standard_normal(shape, dtype=np.float32)), stream)

    hidden = 4 * HEAD_DIM
    weights = {
        "linear": [(HEADS, HEAD_DIM, HEAD_DIM), (HEADS, 1, HEAD_DIM)],
        "mlp": [(HEADS, HEAD_DIM, hidden), (HEADS, 1, hidden), (HEADS, hidden, HEAD_DIM), (HEADS, 1, HEAD_DIM)],
    }
    eta = np.full((batch, HEADS, tokens), 0.5 / HEAD_DIM / mini_batch, np.float32)
    norm = [weight(HEADS, HEAD_DIM, mean=1.0), weight(HEADS, HEAD_DIM)]
    clips = [clip(unit=True), clip(unit=True), clip(unit=False)]
    out = DeviceArray((batch, HEADS, tokens, HEAD_DIM), np.uint16, stream)
    return [*clips, to_device(eta, stream), *norm, *(weight(*shape) for shape in weights[op]), out]


def seconds_of_scan(
    stream: Stream, cubin: Cubin, code: bytes, arrays: list[DeviceArray], batch: int, num_mini_batches: int
) -> float:
    pointers = [array.buffer.pointer for array in arrays]
    with closing(LoadedKernel(cubin, code)) as kernel:
        sizes = (HEADS, num_mini_batches)
        return seconds_of(stream, lambda: kernel.launch(stream.handle, batch * HEADS, pointers, sizes))


def simple_cubin(like: Cubin, gpu: str) -> tuple[Cubin, bytes]:
    """The simple scan, compiled for the tensors and sizes of the optimised kernel."""
    types = {
        name: "*fp32" if name == "eta" else "i32" if name.startswith("num_") else "*bf16" for name in like.parameters
    }
    values = constants("linear", "bfloat16", like.mini_batch_size, like.head_dim)
    compiled = assemble(simple_linear, types, values, gpu=gpu, num_warps=4)
    metadata = compiled.metadata
    cubin = replace(like, entry=metadata.name, num_warps=metadata.num_warps, shared_memory=metadata.shared)
    return cubin, compiled.asm["cubin"]


def peak_bandwidth(stream: Stream) -> float:
    """Peak memory bandwidth: bytes per second, read and written, of a device-to-device copy."""
    size = 1 << 30
    with closing(DeviceBuffer(size, stream)) as source, closing(DeviceBuffer(size, stream)) as target:

        def copy() -> None:
            (status,) = driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, size, stream.handle)
            assert status == driver.CUresult.CUDA_SUCCESS, status.name

        return 2 * size / seconds_of(stream, copy)


def peak_matmul(stream: Stream, gpu: str) -> float:
    """Peak of matrix products: operations per second of a large bfloat16 product in Triton."""
    tiles = {"SIZE": MATRIX, "M": 128, "N": 128, "K": 64}
    types = {"A": "*bf16", "B": "*bf16", "out": "*bf16", "size": "i32"}
    compiled = assemble(matmul, types, tiles, gpu=gpu, num_warps=8, num_stages=3)
    random = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), dtype=np.float32)
    factor = (random.view(np.uint32) >> 16).astype(np.uint16)
    arrays = [to_device(factor, stream), to_device(factor, stream), DeviceArray((MATRIX, MATRIX), np.uint16, stream)]
    cubin = Cubin(
        op="linear",
        gpu=gpu,
        dtype="bfloat16",
        mini_batch_size=0,
        head_dim=0,
        entry=compiled.metadata.name,
        num_warps=compiled.metadata.num_warps,
        shared_memory=compiled.metadata.shared,
        registers=0,
        spills=0,
        parameters=(*types, "global_scratch", "profile_scratch"),
        file="matmul",
        sha256="",
        source_sha256="",
        triton=triton.__version__,
    )
    pointers = [array.buffer.pointer for array in arrays]
    blocks = (MATRIX // tiles["M"]) * (MATRIX // tiles["N"])
    with closing(LoadedKernel(cubin, compiled.asm["cubin"])) as kernel:
        seconds = seconds_of(stream, lambda: kernel.launch(stream.handle, blocks, pointers, (MATRIX,)))
    return 2 * MATRIX**3 / seconds


def seconds_of(stream: Stream, launch: Launch) -> float:
    """Median seconds of a launch, by CUDA events. The first two launches are not counted."""
    timed = EventOptions(timing_enabled=True)
    taken: list[float] = []
    for _ in range(REPETITIONS + 2):
        start = stream.core.record(options=timed)
        launch()
        end = stream.core.record(options=timed)
        stream.synchronize("a kernel")
        taken.append((end - start) / 1e3)  # from ms
    return median(taken[2:])


if __name__ == "__main__":
    main()
