"""The kernels of versions 2 and 3 of the TTT operator: in Triton's interpreter, launched as by plugins; cubins."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_kernels import DTYPES, GOLDEN, SCANS, TOLERANCES, WEIGHTS, Interpreter
from test_projections_op import KINDS, SIZES, Clip
from torch import Tensor
from torch.nn import functional

from ttt_video_engine.engines.kernels.compile_chunk import compile_chunk_kernels
from ttt_video_engine.engines.kernels.cubin import CARRIED_PARTS, CHUNK_PARTS, KernelPart, cubin_name, read_cubin
from ttt_video_engine.export.graphs import projections_op, scan_parts
from ttt_video_engine.export.parity.recordings import compare_recordings
from ttt_video_engine.reference.attention import SeqModelingBlock
from ttt_video_engine.reference.rope import rotate
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.ttt_op import DOMAIN, OP_TYPES, PROJECTIONS_INPUTS

ONE_MINI_BATCH, ALL = 1, 1 << 20
"""The most tokens of a chunk: a chunk has at least one mini-batch."""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with closing(Interpreter(tmp_path_factory.mktemp("interpreter"))) as interpreter:
        yield interpreter


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all() and found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=SIZES, mini_batch_size=st.sampled_from([16, 64]), chunk=st.integers(1, 200), seed=st.integers(0, 2**32 - 1)
)
@example(sizes=(2, 1, 2, 16), mini_batch_size=16, chunk=48, seed=0)
@example(sizes=(2, 3, 2, 16), mini_batch_size=64, chunk=ALL, seed=1)
def test_the_launches_compute_the_layer(
    interpreter: Interpreter,
    kind: TTTKind,
    backward: bool,
    sizes: tuple[int, int, int, int],
    mini_batch_size: int,
    chunk: int,
    seed: int,
) -> None:
    clip = Clip(kind, sizes, seed, mini_batch_size=mini_batch_size)
    found = interpreter.run(kind, clip.inputs(torch.float32, backward=backward), chunk)
    assert error(found, clip.expected(backward=backward).detach()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_no_bit_of_the_mlp(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """The state between them is in float32, as it is on chip. The last chunk of 48 tokens is smaller."""
    clip = Clip("mlp", (1, 3, 2, 16), 2, patches=10)
    assert clip.layout.num_tokens % 48
    inputs = clip.inputs(dtype, backward=True)
    whole = interpreter.run("mlp", inputs, ALL)
    for chunk in (ONE_MINI_BATCH, 48):
        assert torch.equal(interpreter.run("mlp", inputs, chunk), whole)


@pytest.mark.parametrize("chunk", [ONE_MINI_BATCH, 48, ALL])
def test_the_linear_scan_stays_right_with_any_chunk(interpreter: Interpreter, chunk: int) -> None:
    """It centres the state at each chunk, so it is not equal to the bit. Within one, no mean of the weights grows."""
    clip = Clip("linear", (1, 3, 2, 16), 2, patches=10)
    found = interpreter.run("linear", clip.inputs(torch.float32, backward=True), chunk)
    assert error(found, clip.expected(backward=True).detach()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_what_the_scan_reads_once(
    interpreter: Interpreter, kind: TTTKind, dtype: torch.dtype
) -> None:
    """q, k and targets from the projections in float32, rounded; then the scan of the reference."""
    inputs = Clip(kind, (2, 3, 2, 32), 3).inputs(dtype, backward=True)
    heads, _ = inputs["norm_weight"].shape
    angles = (inputs["cos"].flatten(0, 1), inputs["sin"].flatten(0, 1))

    def in_order(name: str, table: str = "tokens") -> Tensor:
        taken = inputs[name].float()[:, inputs[table].flatten().long()]
        by_head: Tensor = taken.unflatten(-1, (heads, -1))
        return by_head.transpose(1, 2)

    q, k = (rotate(functional.normalize(in_order(name), dim=-1), angles).to(dtype) for name in ("XQ", "XK"))
    difference = in_order("XV") - k.float()
    std, mean = torch.std_mean(difference, dim=-1, keepdim=True)
    norm = [inputs[name].float().unsqueeze(1) for name in ("norm_weight", "norm_bias")]
    target = (norm[0] * (difference - mean) / (std + 1e-8) + norm[1] + k.float()).to(dtype)
    rates = in_order("rate_logits", "rate_tokens").squeeze(-1).sigmoid() * inputs["rate_scale"]
    cut = tuple(inputs["tokens"].shape)
    weights = [inputs[name] for name in ("norm_weight", "norm_bias", *WEIGHTS[kind])]
    scanned = SCANS[kind](*(tensor.unflatten(2, cut) for tensor in (q, k, target, rates)), *weights)
    expected = torch.empty_like(inputs["XQ"])
    expected[:, inputs["tokens"].flatten().long()] = scanned.flatten(2, 3).transpose(1, 2).flatten(2)
    assert error(interpreter.run(kind, inputs, 64), expected.detach()) <= TOLERANCES[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_are_the_whole(interpreter: Interpreter, kind: TTTKind) -> None:
    """The second continues from the state of the first. The scan of the MLP then changes no bit."""
    inputs = Clip(kind, (2, 3, 2, 16), 2, patches=10).inputs(torch.float32, backward=True)
    whole, found = interpreter.run(kind, inputs, ALL), torch.full_like(inputs["XQ"], float("nan"))
    mini_batches, states = inputs["tokens"].shape[0], WEIGHTS[kind]
    left = {name: inputs[name].expand(2, *inputs[name].shape).contiguous() for name in states}
    assert mini_batches > 5
    for first, end in ((0, 5), (5, mini_batches)):
        taken = inputs["tokens"][first:end].flatten().long()
        places = torch.arange(len(taken), dtype=torch.int32).view(end - first, -1)
        part = inputs | {name: inputs[name][:, taken] for name in ("XQ", "XK", "XV")}
        part["rate_logits"] = inputs["rate_logits"][:, inputs["rate_tokens"][first:end].flatten().long()]
        part |= {name: inputs[name][first:end] for name in ("cos", "sin")} | left
        outputs = interpreter.outputs(kind, part | {"tokens": places, "rate_tokens": places.clone()}, 3, 48)
        found[:, taken] = outputs["XQW"]
        left = {name: outputs[name] for name in states}
    assert torch.equal(found, whole) if kind == "mlp" else error(found, whole) < 2e-5


@pytest.mark.parametrize(
    ("name", "version"), [(path.name, 3 if "2scene" in path.name else 2) for path in sorted(GOLDEN.glob("dit_*"))]
)  # version 3 has several parts only of several scenes
def test_a_transformer_with_them_gives_what_was_recorded(
    interpreter: Interpreter, name: str, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def outputs(op: str, tensors: tuple[Tensor, ...], *_: Any, **__: Any) -> list[Tensor]:
        (kind,) = (kind for kind, op_type in OP_TYPES.items() if op == f"{DOMAIN}::{op_type}")
        calls.append(kind)
        inputs = dict(zip(PROJECTIONS_INPUTS[kind], tensors, strict=True))
        found = interpreter.outputs(kind, inputs, version, 48)
        return [found[name] for name in ("XQW", *WEIGHTS[kind]) if name in found]

    def test_time_training(block: SeqModelingBlock, attended: Tensor, layout: Any) -> Tensor:
        kind = block.config.ttt_kind
        assert kind is not None
        traced = {2: projections_op._test_time_training, 3: scan_parts._test_time_training}[version]
        return traced(block, kind, attended, layout)

    monkeypatch.setattr(torch.onnx.ops, "symbolic", lambda *given, **named: outputs(*given, **named)[0])
    monkeypatch.setattr(torch.onnx.ops, "symbolic_multi_out", outputs)
    monkeypatch.setattr(SeqModelingBlock, "_test_time_training", test_time_training)
    (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (comparison,) = compare_recordings(tmp_path, engine="torch")
    assert comparison.reference_error < 1e-5
    assert len(calls) >= (4 if version == 3 and "2scene" in name else 2), "in parts"


@pytest.mark.parametrize("parts", [CHUNK_PARTS, CARRIED_PARTS], ids=["version 2", "version 3"])
@pytest.mark.parametrize(("kind", "mini_batch_size", "dtype"), [("linear", 16, "float16"), ("mlp", 64, "bfloat16")])
def test_cubins(tmp_path: Path, kind: TTTKind, mini_batch_size: int, dtype: Any, parts: tuple[KernelPart, ...]) -> None:
    sizes: dict[str, Any] = {"mini_batch_size": mini_batch_size, "head_dim": 16, "parts": parts}
    cubins = compile_chunk_kernels(kind, gpu="sm_89", dtype=dtype, folder=tmp_path, **sizes)
    assert tuple(cubin.part for cubin in cubins) == parts and dtype in DTYPES
    for cubin in cubins:
        found, code = read_cubin(tmp_path, cubin_name(kind, "sm_89", dtype, mini_batch_size, 16, cubin.part))
        assert found == cubin and code[:4] == b"\x7fELF"
        entries = {"resume": f"ttt_{kind}", "carry": "ttt_start"}
        assert cubin.entry == entries.get(cubin.part, f"ttt_{cubin.part}")
        assert cubin.part == "resume" or (cubin.spills, cubin.shared_memory) == (0, 0), "they only read and write"
