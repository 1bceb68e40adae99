"""The staged TTT-MLP kernel: its own code on a CPU against the sequential scan, and its cubins."""

from pathlib import Path

import pytest
import torch
from emulate_gluon import emulate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_kernels import GOLDEN, ON_CHIP, TOLERANCES, WEIGHTS, check, random_inputs
from torch import Tensor

from ttt_video_engine.engines.kernels.compile import compile_kernel, compile_staged_mlp
from ttt_video_engine.engines.kernels.cubin import read_cubin
from ttt_video_engine.engines.kernels.sizes import SHARED_MEMORY
from ttt_video_engine.engines.kernels.ttt_mlp_staged import ttt_mlp


def run(inputs: dict[str, Tensor], slopes_shared: bool, rounds: bool) -> Tensor:
    batch, heads, num_mini_batches, mini_batch_size, head_dim = inputs["XQ"].shape
    out = torch.full_like(inputs["XQ"], float("nan"))
    sizes = {"num_heads": heads, "num_mini_batches": num_mini_batches, "C": mini_batch_size, "F": head_dim}
    arguments = {**inputs, "XQW": out, **sizes, "SLOPES_SHARED": slopes_shared}
    emulate(ttt_mlp, batch * heads, arguments, rounds=rounds)
    return out


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)),
    slopes_shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_staged_kernel_equals_the_scan(sizes: tuple[int, int, int], slopes_shared: bool, seed: int) -> None:
    """Without its roundings to the last digits of float32, with them as closely as bfloat16 products allow."""
    inputs = random_inputs("mlp", (*sizes, 64, 64), torch.bfloat16, seed)
    check(run(inputs, slopes_shared, rounds=True), inputs, "mlp", ON_CHIP["bfloat16"])
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    check(run(inputs, slopes_shared, rounds=False), inputs, "mlp", TOLERANCES[torch.float32])


@pytest.mark.parametrize("slopes_shared", [False, True])
def test_the_staged_kernel_gives_what_was_recorded(slopes_shared: bool) -> None:
    recorded = {name: tensor.float() for name, tensor in load_file(GOLDEN / "op_ttt_mlp.safetensors").items()}
    names = ("XQ", "XK", "XV", "eta", "norm_weight", "norm_bias", *WEIGHTS["mlp"])
    inputs = {name: recorded[f"input.{name}"] for name in names}
    for index, expected in enumerate(recorded["output.XQW"]):  # each of the recorded batch has weights of its own
        one = {
            name: value[index : index + 1] if value.ndim > 3 or name == "eta" else value
            for name, value in inputs.items()
        }
        one |= {name: inputs[name][index] for name in WEIGHTS["mlp"]}
        one = {name: value.contiguous() for name, value in one.items()}
        assert (run(one, slopes_shared, rounds=False)[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("gpu", "most_stack"), [("sm_89", 256), ("sm_90", 128)])
def test_a_staged_cubin(tmp_path: Path, gpu: str, most_stack: int) -> None:
    """Launched like the other kernel of the operator: same name, arguments and threads."""
    cubin = compile_staged_mlp(gpu=gpu, folder=tmp_path / "staged")
    found, code = read_cubin(tmp_path / "staged", Path(cubin.file).stem)
    assert found == cubin and code[:4] == b"\x7fELF"
    assert cubin.registers <= 255 and cubin.spills <= most_stack
    assert cubin.shared_memory <= SHARED_MEMORY[gpu] << 10
    sizes = {"mini_batch_size": 64, "head_dim": 64}
    other = compile_kernel("mlp", gpu=gpu, dtype="bfloat16", folder=tmp_path, **sizes)
    for field in ("file", "entry", "parameters", "num_warps", "op", "gpu", "dtype", "mini_batch_size", "head_dim"):
        assert getattr(cubin, field) == getattr(other, field)
    assert cubin.source_sha256 != other.source_sha256
