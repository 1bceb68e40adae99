"""A plugin inside a TensorRT engine: built anywhere, run and held to the reference where there is a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from messages import refused_with
from packages import tensorrt_rtx
from real_engines import build_scan, skip_without_package
from test_kernels import DTYPES, ON_CHIP, WEIGHTS, check, random_inputs
from test_projections_op import Clip
from torch import Tensor

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import cubin_name, read_cubin
from ttt_video_engine.engines.tensorrt.deserialise import deserialise_engine
from ttt_video_engine.engines.tensorrt.engine import KERNELS
from ttt_video_engine.engines.tensorrt.memory import MemoryLimit
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.engines.tensorrt.plugin import registered_plugins
from ttt_video_engine.engines.tensorrt.runner import TensorRTRunner
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import BackendError

CASES: list[tuple[TTTKind, DType, int]] = [("linear", "float16", 16), ("mlp", "bfloat16", 64)]
HEAD_DIM = 16
VERSIONS = (1, 2, 3)


def inputs_of(op: TTTKind, dtype: DType, mini_batch_size: int, version: int, seed: int = 0) -> dict[str, Tensor]:
    if version == 1:
        return random_inputs(op, (2, 3, 4, mini_batch_size, HEAD_DIM), DTYPES[dtype], seed)
    clip = clip_of(op, mini_batch_size, seed)
    inputs = clip.inputs(DTYPES[dtype], backward=True)
    if version == 3:
        inputs |= {name: inputs[name].float().expand(len(clip.x), *inputs[name].shape) for name in WEIGHTS[op]}
    return {name: tensor.detach() for name, tensor in inputs.items()}


def clip_of(op: TTTKind, mini_batch_size: int, seed: int) -> Clip:
    return Clip(op, (2, 2, 3, HEAD_DIM), seed, mini_batch_size=mini_batch_size)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("op", "dtype", "mini_batch_size"), CASES)
def test_an_engine_of_one_node(tmp_path: Path, op: TTTKind, dtype: DType, mini_batch_size: int, version: int) -> None:
    package = tensorrt_rtx()
    inputs = inputs_of(op, dtype, mini_batch_size, version)
    engine = build_scan(tmp_path, op, dtype, inputs, "sm_89", version)
    engine.verify()
    name = cubin_name(op, "sm_89", dtype, mini_batch_size, HEAD_DIM, "scan" if version == 1 else "resume")
    assert list(engine.entry.plugins.values()) == [name] and engine.entry.fallback == ""
    assert [spec.name for spec in engine.entry.inputs] == [
        key for key, tensor in inputs.items() if tensor.is_floating_point()
    ]
    cubin, _ = read_cubin(tmp_path / KERNELS, name)
    assert (cubin.op, cubin.mini_batch_size, cubin.head_dim) == (op, mini_batch_size, HEAD_DIM)
    try:
        cuda.device()
    except BackendError:
        with registered_plugins(package, tmp_path / KERNELS, "sm_89"), refused_with(BackendError, engine.path):
            deserialise_engine(package, package.api.Runtime(package.logger), engine)


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("op", "dtype", "mini_batch_size"), [*CASES, ("linear", "float32", 16)])
def test_the_engine_gives_what_the_reference_gives(
    tmp_path: Path, op: TTTKind, dtype: DType, mini_batch_size: int, version: int, low_memory: bool
) -> None:
    """Three runs: the first, the launch of the captured graph, and one with other numbers. Without a graph as well.

    Of versions 2 and 3, inputs in half precision are further from the layer, which rounds more often than the plugin.
    """
    gpu = cuda.device()
    skip_without_package(gpu.gpu)
    engine = build_scan(tmp_path, op, dtype, inputs_of(op, dtype, mini_batch_size, version), gpu.gpu, version)
    if not engine.entry.plugins:
        pytest.skip(engine.entry.fallback)
    bundle = Bundle(tmp_path, manifest=None)  # type: ignore[arg-type]  # only its folder is used
    package, memory = load_package(package_for(gpu.gpu)), MemoryLimit(low_memory=low_memory)
    with TensorRTRunner(bundle, engine, package, memory, gpu) as runner:
        for seed in (0, 0, 1):
            inputs = inputs_of(op, dtype, mini_batch_size, version, seed)
            arrays = {
                name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
                for name, tensor in inputs.items()
                if tensor.is_floating_point()
            }
            found = torch.from_numpy(np.asarray(runner.run(arrays)["XQW"]))
            found = found.view(DTYPES[dtype])
            if version == 1:
                check(found, inputs, op, ON_CHIP[dtype])
            else:
                expected = clip_of(op, mini_batch_size, seed).expected(backward=True)
                error = (found.float() - expected).abs().max() / expected.abs().max()
                assert error < 10 * ON_CHIP[dtype], f"{error:.1e}"
