"""A plugin inside a TensorRT engine: built anywhere, run and held to the reference where there is a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from messages import refused_with
from packages import tensorrt_rtx
from real_engines import build_scan, skip_without_package
from test_kernels import DTYPES, ON_CHIP, check, random_inputs

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


def shape(mini_batch_size: int) -> tuple[int, ...]:
    return (2, 3, 4, mini_batch_size, HEAD_DIM)


@pytest.mark.parametrize(("op", "dtype", "mini_batch_size"), CASES)
def test_an_engine_of_one_scan(tmp_path: Path, op: TTTKind, dtype: DType, mini_batch_size: int) -> None:
    package = tensorrt_rtx()
    inputs = random_inputs(op, shape(mini_batch_size), DTYPES[dtype])
    engine = build_scan(tmp_path, op, dtype, [tuple(tensor.shape) for tensor in inputs.values()], "sm_89")
    engine.verify()
    name = cubin_name(op, "sm_89", dtype, mini_batch_size, HEAD_DIM)
    assert list(engine.entry.plugins.values()) == [name] and engine.entry.fallback == ""
    assert [spec.name for spec in engine.entry.inputs] == list(inputs)
    cubin, _ = read_cubin(tmp_path / KERNELS, name)
    assert (cubin.op, cubin.mini_batch_size, cubin.head_dim) == (op, mini_batch_size, HEAD_DIM)
    try:
        cuda.device()
    except BackendError:
        with registered_plugins(package, tmp_path / KERNELS, "sm_89"), refused_with(BackendError, engine.path):
            deserialise_engine(package, package.api.Runtime(package.logger), engine)


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(("op", "dtype", "mini_batch_size"), [*CASES, ("linear", "float32", 16)])
def test_the_engine_gives_what_the_reference_gives(
    tmp_path: Path, op: TTTKind, dtype: DType, mini_batch_size: int, low_memory: bool
) -> None:
    """Three runs: the first, the launch of the captured graph, and one with other numbers. Without a graph as well."""
    gpu = cuda.device()
    skip_without_package(gpu.gpu)
    shapes = [tuple(tensor.shape) for tensor in random_inputs(op, shape(mini_batch_size), DTYPES[dtype]).values()]
    engine = build_scan(tmp_path, op, dtype, shapes, gpu.gpu)
    if not engine.entry.plugins:
        pytest.skip(engine.entry.fallback)
    bundle = Bundle(tmp_path, manifest=None)  # type: ignore[arg-type]  # only its folder is used
    package, memory = load_package(package_for(gpu.gpu)), MemoryLimit(low_memory=low_memory)
    with TensorRTRunner(bundle, engine, package, memory, gpu) as runner:
        for seed in (0, 0, 1):
            inputs = random_inputs(op, shape(mini_batch_size), DTYPES[dtype], seed)
            arrays = {
                name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
                for name, tensor in inputs.items()
            }
            found = torch.from_numpy(np.asarray(runner.run(arrays)["XQW"]))
            check(found.view(DTYPES[dtype]), inputs, op, ON_CHIP[dtype])
