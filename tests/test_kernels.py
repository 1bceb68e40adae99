"""The kernels in Triton's interpreter against the sequential scan; their cubins; and on a GPU, where there is one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import refused_with
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ttt_video_engine.engines.kernels.compile import compile_kernel, compile_staged_mlp
from ttt_video_engine.engines.kernels.cubin import Cubin, cubin_name, read_cubin
from ttt_video_engine.engines.kernels.sizes import SHARED_MEMORY, NoKernel
from ttt_video_engine.reference.ttt import ttt_linear, ttt_mlp
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError

GOLDEN = Path(__file__).parent / "golden"
SCANS: dict[TTTKind, Callable[..., Tensor]] = {"linear": ttt_linear, "mlp": ttt_mlp}
WEIGHTS: dict[TTTKind, tuple[str, ...]] = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest value: parity, then one rounding of the output. In the interpreter all arithmetic is float32."""
DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ON_CHIP = {"float32": 1e-4, "float16": 1.5e-3, "bfloat16": 1.5e-2}
"""Of the largest value, with the products of `compile.PRECISIONS`; about three times what `benchmarks/precision.py`
finds when it rounds the factors so."""


class Interpreter:
    """Runs kernels in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._source, self._target = folder / "in.safetensors", folder / "out.safetensors"
        script = Path(__file__).with_name("interpret_kernels.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(self._source), str(self._target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, op: TTTKind, inputs: Mapping[str, Tensor], chunk: int | None = None) -> Tensor:
        """The output of version 1, or with `chunk`, the most tokens of a chunk, that of version 2."""
        return self.outputs(op, inputs, 1 if chunk is None else 2, chunk or 0)["XQW"]

    def outputs(self, op: TTTKind, inputs: Mapping[str, Tensor], version: int, chunk: int) -> dict[str, Tensor]:
        """All outputs of a version; those of version 3 also have the inner weights, by their names."""
        assert self._process.stdin is not None and self._process.stdout is not None
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, self._source)
        self._process.stdin.write(f"{op} {version} {chunk}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
        return load_file(self._target)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with closing(Interpreter(tmp_path_factory.mktemp("interpreter"))) as interpreter:
        yield interpreter


def random_inputs(op: TTTKind, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Sizes as in a model: unit queries and keys, learning rates of the public code's order."""
    _, heads, _, mini_batch_size, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(dtype)

    hidden = 4 * head_dim
    weights = {
        "linear": {"W1": (heads, head_dim, head_dim), "b1": (heads, 1, head_dim)},
        "mlp": {
            "W1": (heads, head_dim, hidden),
            "b1": (heads, 1, hidden),
            "W2": (heads, hidden, head_dim),
            "b2": (heads, 1, head_dim),
        },
    }
    return {
        "XQ": functional.normalize(normal(*shape).float(), dim=-1).to(dtype),
        "XK": functional.normalize(normal(*shape).float(), dim=-1).to(dtype),
        "XV": normal(*shape),
        "eta": torch.rand(*shape[:-1], generator=generator) / head_dim / mini_batch_size,
        "norm_weight": (1 + 0.1 * normal(heads, head_dim).float()).to(dtype),
        "norm_bias": normal(heads, head_dim, std=0.1),
        **{name: normal(*size, std=0.1) for name, size in weights[op].items()},
    }


def check(found: Tensor, inputs: Mapping[str, Tensor], op: TTTKind, tolerance: float) -> None:
    expected = SCANS[op](*inputs.values()).float()
    assert found.isfinite().all()
    error = (found.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_a_kernel_gives_what_was_recorded(interpreter: Interpreter, op: TTTKind, dtype: torch.dtype) -> None:
    recorded = {name: tensor.float() for name, tensor in load_file(GOLDEN / f"op_ttt_{op}.safetensors").items()}
    names = ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", *WEIGHTS[op])
    inputs = {name: recorded[f"input.{name}"] for name in names}
    outputs = []
    for index in range(len(inputs["XQ"])):  # the recording has weights for each of the batch, the operator has not
        one = {
            name: value[index : index + 1] if value.ndim > 3 or name == "eta" else value
            for name, value in inputs.items()
        }
        one |= {name: inputs[name][index] for name in WEIGHTS[op]}
        one = {name: (value if name == "eta" else value.to(dtype)).contiguous() for name, value in one.items()}
        outputs.append(interpreter.run(op, one).float())
    expected = recorded["output.XQW"]
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]  # inputs are rounded as well
    assert (torch.cat(outputs) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("op", ["linear", "mlp"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    mini_batch_size=st.sampled_from([16, 64]),
    head_dim=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**31),
)
def test_a_kernel_equals_the_scan(
    interpreter: Interpreter,
    op: TTTKind,
    sizes: tuple[int, int, int],
    mini_batch_size: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs = random_inputs(op, (*sizes, mini_batch_size, head_dim), dtype, seed)
    check(interpreter.run(op, inputs), inputs, op, TOLERANCES[dtype])


@pytest.mark.parametrize("op", ["linear", "mlp"])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-20, 1e4])
def test_values_at_the_ends_of_float32(interpreter: Interpreter, op: TTTKind, scale: float) -> None:
    """Zeros, denormals, values whose squares are denormal, and large ones: finite, and equal to the scan."""
    inputs = random_inputs(op, (1, 2, 3, 16, 16), torch.float32)
    for name in ("XQ", "XK", "XV", *WEIGHTS[op]):
        inputs[name] = inputs[name] * scale
    inputs["eta"] = inputs["eta"] / max(scale, 1) ** 2
    check(interpreter.run(op, inputs), inputs, op, TOLERANCES[torch.float32])


CASES: list[tuple[TTTKind, str, DType, int, int]] = [
    # op, gpu, dtype, mini-batch, most bytes of stack a thread
    ("linear", "sm_80", "bfloat16", 16, 0),
    ("linear", "sm_89", "bfloat16", 16, 0),
    ("linear", "sm_90", "float16", 16, 0),
    ("linear", "sm_120", "bfloat16", 16, 0),
    ("linear", "sm_89", "float32", 16, 128),
    ("mlp", "sm_89", "bfloat16", 64, 2400),
    ("mlp", "sm_90", "bfloat16", 64, 2400),
]


@pytest.mark.parametrize(("op", "gpu", "dtype", "mini_batch_size", "most_stack"), CASES)
def test_a_cubin_at_full_size(
    tmp_path: Path, op: TTTKind, gpu: str, dtype: DType, mini_batch_size: int, most_stack: int
) -> None:
    cubin = compile_kernel(op, gpu=gpu, dtype=dtype, mini_batch_size=mini_batch_size, head_dim=64, folder=tmp_path)
    name = cubin_name(op, gpu, dtype, mini_batch_size, 64)
    found, code = read_cubin(tmp_path, name)
    assert found == cubin and code[:4] == b"\x7fELF"
    assert cubin.registers <= 255 and cubin.spills <= most_stack
    assert cubin.shared_memory <= 99 << 10 or gpu == "sm_90"
    tensors = ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", *WEIGHTS[op], "XQW")
    assert cubin.parameters[: len(tensors)] == tensors
    assert cubin.parameters[len(tensors) :][:2] == ("num_heads", "num_mini_batches")
    assert cubin.entry == f"ttt_{op}" and cubin.num_warps == {"linear": 4, "mlp": 8}[op]


@pytest.mark.parametrize(
    ("gpu", "mini_batch_size", "head_dim", "op", "values"),
    [
        ("sm_75", 16, 64, "linear", ("sm_75", *SHARED_MEMORY)),
        ("sm_89", 32, 64, "linear", (32, 16, 64)),
        ("sm_89", 16, 48, "linear", (48, 16, 32, 64, 128)),
        ("sm_89", 64, 128, "mlp", ("TTT-MLP", 128)),
    ],
)
def test_no_kernel_and_why(
    tmp_path: Path, gpu: str, mini_batch_size: int, head_dim: int, op: TTTKind, values: tuple[object, ...]
) -> None:
    with refused_with(NoKernel, *values):
        compile_kernel(
            op, gpu=gpu, dtype="float16", mini_batch_size=mini_batch_size, head_dim=head_dim, folder=tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_a_cubin_that_is_not_what_was_compiled(tmp_path: Path) -> None:
    compile_kernel("linear", gpu="sm_89", dtype="float16", mini_batch_size=16, head_dim=16, folder=tmp_path)
    name = cubin_name("linear", "sm_89", "float16", 16, 16)
    cure = "ttt-video export --engine tensorrt --gpu sm_89"

    def refused_naming(path: Path) -> None:
        with refused_with(BackendError, path, cure):
            read_cubin(tmp_path, name)

    description, code = tmp_path / f"{name}.json", tmp_path / f"{name}.cubin"
    whole, text = code.read_bytes(), description.read_text()
    code.write_bytes(whole[:-1] + b"\xff")
    refused_naming(code)
    code.unlink()
    refused_naming(code)
    code.write_bytes(whole)
    description.write_text(json.dumps({**json.loads(text), "op": "mlp"}))
    refused_naming(code)
    description.write_text(text[:50])
    refused_naming(description)
    description.unlink()
    refused_naming(description)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("op", "mini_batch_size"), [("linear", 16), ("linear", 64), ("mlp", 16), ("mlp", 64)])
def test_a_cubin_on_this_gpu(tmp_path: Path, op: TTTKind, mini_batch_size: int, dtype: DType) -> None:
    from ttt_video_engine.engines.cuda import device

    sizes = {"mini_batch_size": mini_batch_size, "head_dim": 64}
    try:
        cubin = compile_kernel(op, gpu=device().gpu, dtype=dtype, folder=tmp_path, **sizes)
    except NoKernel as reason:
        pytest.skip(str(reason))
    launch_and_check(tmp_path, cubin)


@pytest.mark.gpu
def test_the_staged_cubin_on_this_gpu(tmp_path: Path) -> None:
    from ttt_video_engine.engines.cuda import device

    try:
        cubin = compile_staged_mlp(gpu=device().gpu, folder=tmp_path)
    except NoKernel as reason:
        pytest.skip(str(reason))
    launch_and_check(tmp_path, cubin)


def launch_and_check(folder: Path, cubin: Cubin) -> None:
    """48 heads of 64, both branches of guidance in one launch, into an output that is NaN before."""
    from ttt_video_engine.engines.cuda import Stream, to_device
    from ttt_video_engine.engines.kernels.launch import LoadedKernel

    dtype, sizes = DTYPES[cubin.dtype], (48, 1024 // cubin.mini_batch_size)
    inputs = random_inputs(cubin.op, (2, *sizes, cubin.mini_batch_size, 64), dtype)
    poisoned = torch.full_like(inputs["XQ"], float("nan"))
    stream = Stream()
    arrays = [to_device(_bits(tensor), stream) for tensor in (*inputs.values(), poisoned)]
    kernel = LoadedKernel(*read_cubin(folder, Path(cubin.file).stem))
    pointers = [array.buffer.pointer for array in arrays]
    kernel.launch(stream.handle, 2 * 48, pointers, sizes)
    stream.synchronize("a TTT kernel")
    found = torch.from_numpy(np.asarray(arrays[-1])).view(dtype)
    check(found, inputs, cubin.op, ON_CHIP[cubin.dtype])
    with refused_with(BackendError, cubin.file, "XK", 16):
        kernel.launch(stream.handle, 2 * 48, [pointers[0], pointers[1] + 2, *pointers[2:]], sizes)
    with refused_with(BackendError, cubin.file, len(pointers) - 1, "XQ", "XK"):
        kernel.launch(stream.handle, 2 * 48, pointers[1:], sizes)
    kernel.close()


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
