"""Compiles the kernels ahead of time, with Triton. Needs no GPU."""

import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from ttt_video_engine.engines.kernels import ttt_mlp_staged
from ttt_video_engine.engines.kernels.cubin import Cubin, cubin_name
from ttt_video_engine.engines.kernels.sizes import SHARED_MEMORY, NoKernel, check_size
from ttt_video_engine.engines.kernels.ttt_linear import ttt_linear
from ttt_video_engine.engines.kernels.ttt_mlp import ttt_mlp
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.files import atomic_write

MAX_REGISTERS = 255
"""Per thread. Without this limit the assembler reserves registers for a second block, which has no shared memory."""

KERNELS: dict[TTTKind, Any] = {"linear": ttt_linear, "mlp": ttt_mlp}
PRECISIONS: dict[TTTKind, dict[DType, str]] = {
    "linear": {"float32": "tf32x3", "float16": "tf32", "bfloat16": "bf16"},
    "mlp": {"float32": "tf32x3", "float16": "tf32", "bfloat16": "bf16"},
}
"""Precision of the factors of matrix products, by tensor dtype. Sums and inner weights are always float32. In the
larger tiles of the MLP, wider factors would spill more registers and exceed the shared memory of smaller GPUs."""

STAGED_SIZE = (64, 64)
"""Tokens of a mini-batch and head dimension of the staged kernel."""
SLOPES_SHARED = 131 << 10
"""Bytes of shared memory that the staged kernel takes with its slopes; without, 99 KiB."""

_DTYPES: dict[DType, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_OWN_TYPES = dict.fromkeys(("eta", "rate_scale", "cos", "sin", "state"), "*fp32")
_OWN_TYPES |= dict.fromkeys(("tokens", "rate_tokens"), "*i32")
"""Of tensors that do not have the dtype of the model."""
_SCRATCH = ("global_scratch", "profile_scratch")
"""Pointers that Triton appends to the parameters of every kernel; null here."""


def num_warps(op: TTTKind, head_dim: int) -> int:
    """Warps of a block: one per 16 rows of W1 transposed (TTT-Linear), or of half the hidden layer (TTT-MLP).

    A tensor core processes 16 rows; more warps would repeat the same work.
    """
    return {"linear": head_dim, "mlp": 2 * head_dim}[op] // 16


def compile_kernel(op: TTTKind, *, gpu: str, dtype: DType, mini_batch_size: int, head_dim: int, folder: Path) -> Cubin:
    """Compiles a kernel, writes it and its description into `folder`, and returns the description.

    Raises NoKernel where the size is not supported, or needs more shared memory than the GPU has.
    """
    check_size(op, gpu, mini_batch_size, head_dim)
    values = constants(op, dtype, mini_batch_size, head_dim)
    types = argument_types(KERNELS[op], values, dtype)
    compiled = assemble(KERNELS[op], types, values, gpu=gpu, num_warps=num_warps(op, head_dim))
    name = cubin_name(op, gpu, dtype, mini_batch_size, head_dim)
    sizes = {"op": op, "gpu": gpu, "dtype": dtype, "mini_batch_size": mini_batch_size, "head_dim": head_dim}
    return write_cubin(compiled, folder, name, tuple(types), source_digest(op), sizes)


def compile_staged_mlp(*, gpu: str, folder: Path) -> Cubin:
    """Like `compile_kernel`, for TTT-MLP in bfloat16, with the kernel of `ttt_mlp_staged.py`.

    Same name, arguments and launch. No GPU has run this kernel, and Triton's interpreter cannot; so the export does not
    use it.
    """
    mini_batch_size, head_dim = STAGED_SIZE
    check_size("mlp", gpu, mini_batch_size, head_dim)
    values = {"C": mini_batch_size, "F": head_dim, "SLOPES_SHARED": SHARED_MEMORY[gpu] << 10 >= SLOPES_SHARED}
    types = argument_types(ttt_mlp_staged.ttt_mlp, values, "bfloat16")
    compiled = assemble(ttt_mlp_staged.ttt_mlp, types, values, gpu=gpu, num_warps=ttt_mlp_staged.WARPS)
    name = cubin_name("mlp", gpu, "bfloat16", mini_batch_size, head_dim)
    sizes = {"op": "mlp", "gpu": gpu, "dtype": "bfloat16", "mini_batch_size": mini_batch_size, "head_dim": head_dim}
    return write_cubin(compiled, folder, name, tuple(types), source_digest("mlp", "ttt_mlp_staged.py"), sizes)


def write_cubin(
    compiled: Any, folder: Path, name: str, parameters: tuple[str, ...], source: str, sizes: Mapping[str, Any]
) -> Cubin:
    """Checks a compiled kernel, writes it and its description, and returns this."""
    gpu, code = sizes["gpu"], compiled.asm["cubin"]
    limit = SHARED_MEMORY[gpu] << 10
    if compiled.metadata.shared > limit:
        raise NoKernel(f"{name} needs {compiled.metadata.shared:,} bytes of shared memory, {gpu} has {limit:,}")
    registers, stack = _resources(code)
    cubin = Cubin(
        **sizes,
        entry=compiled.metadata.name,
        num_warps=compiled.metadata.num_warps,
        shared_memory=compiled.metadata.shared,
        registers=registers,
        spills=stack,
        parameters=(*parameters, *_SCRATCH),
        file=f"{name}.cubin",
        sha256=hashlib.sha256(code).hexdigest(),
        source_sha256=source,
        triton=triton.__version__,
    )
    with atomic_write(folder / cubin.file) as partial:
        partial.write_bytes(code)
    with atomic_write(folder / f"{name}.json") as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(cubin), indent=2) + b"\n")
    return cubin


def constants(op: TTTKind, dtype: DType, mini_batch_size: int, head_dim: int) -> dict[str, Any]:
    """The compile-time arguments of the scan of version 1 by name."""
    return {"C": mini_batch_size, "F": head_dim, "PRECISION": PRECISIONS[op][dtype], "RESUMED": False}


def assemble(
    kernel: Any, types: Mapping[str, str], values: Mapping[str, Any], *, gpu: str, num_warps: int, num_stages: int = 1
) -> Any:
    """Compiles a Triton or Gluon kernel for an architecture.

    `types` are Triton's types of the launch arguments, `values` the compile-time arguments. The compiler assumes that
    pointers are aligned to 16 bytes.
    """
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in values else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    places = {(names.index(name),): value for name, value in values.items()}
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(kernel, signature, constexprs=places, attrs=aligned)
    target = GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": MAX_REGISTERS, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def source_digest(op: TTTKind, file: str | None = None) -> str:
    """sha256 of the source files of a kernel, in `file` or its operator's."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("tiles.py", file or f"ttt_{op}.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


def argument_types(kernel: Any, values: Mapping[str, Any], dtype: DType) -> dict[str, str]:
    """Triton's type of each launch argument of a kernel whose compile-time arguments are `values`, by name."""
    names = (name for name in kernel.arg_names if name not in values)
    return {name: "i32" if name.startswith("num_") else _OWN_TYPES.get(name, f"*{_DTYPES[dtype]}") for name in names}


def _resources(code: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, reported by the cuobjdump in Triton's package."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        output = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if found is None:
        raise BackendError(f"cuobjdump printed no register count: {output[:100]!r}")
    return int(found[1]), int(found[2])
