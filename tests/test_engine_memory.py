"""What a runner asks of TensorRT and of the GPU's memory, with stand-ins for what exists only on a GPU."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import stand_in_engine as stand_in
from messages import refused_with
from packages import tensorrt_rtx
from stand_in_engine import ACTIVATIONS, STREAMABLE, Buffer, Engine

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.kernels.cubin import Cubin, cubin_name
from ttt_video_engine.engines.tensorrt.engine import KERNELS, BuildSettings
from ttt_video_engine.engines.tensorrt.memory import GRAPH_RESERVE, MemoryLimit, kernel_stacks
from ttt_video_engine.engines.tensorrt.package import StatedMemory
from ttt_video_engine.engines.tensorrt.runner import TensorRTRunner
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import BackendError

WEIGHTS = 800
STREAMING = {"settings": BuildSettings(weight_streaming=True)}
Load = Callable[..., TensorRTRunner]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on a GPU whose memory is enough for anything, unless a test says how much is free."""
    found = Engine()
    monkeypatch.setattr(cuda, "Stream", stand_in.Stream)
    monkeypatch.setattr(cuda, "Graph", stand_in.Graph)
    monkeypatch.setattr(cuda, "DeviceBuffer", lambda size, stream: Buffer(size, stream, found.memory))
    monkeypatch.setattr(cuda, "free_memory", lambda: 1 << 40)
    return found


@pytest.fixture
def load(engine: Engine, tmp_path: Path) -> Load:
    def load(limit: int | None = None, *, low_memory: bool = False, **changes: Any) -> TensorRTRunner:
        file = stand_in.engine_file(tmp_path, **changes)
        file.path.write_bytes(b"e")
        bundle = Bundle(tmp_path, manifest=None)  # type: ignore[arg-type]  # only its folder is used
        package = stand_in.package(tensorrt_rtx(), engine)
        return TensorRTRunner(bundle, file, package, MemoryLimit(limit, low_memory), stand_in.GPU)

    return load


def run(runner: TensorRTRunner, batch: int) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, 4), dtype=np.float32)
    np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (stand_in.Engine, "ICudaEngine"),
        (stand_in.Context, "IExecutionContext"),
        (stand_in.Config, "IRuntimeConfig"),
        (stand_in.Cache, "IRuntimeCache"),
    ],
)
def test_the_stand_ins_have_no_name_that_tensorrt_lacks(ours: type, theirs: str) -> None:
    own = {"memory", "scratch", "compiled", "owner", "cache", "runtime_cache", "kernels"}
    names = {name for name in dir(ours) if not name.startswith("_")} | {f.name for f in dataclasses.fields(ours)}
    assert names - own <= set(dir(getattr(tensorrt_rtx().api, theirs)))


def test_each_batch_has_its_profile_and_the_scratch_memory_of_it(load: Load, engine: Engine) -> None:
    with load() as runner:
        for batch in (1, 1, 2, 1):
            run(runner, batch)
    # The larger buffer serves the smaller batch as well.
    assert engine.scratch == [ACTIVATIONS[0], ACTIVATIONS[1], ACTIVATIONS[1]]
    assert all(buffer.closed for buffer in engine.memory)


@pytest.mark.parametrize(("low_memory", "reserve"), [(True, 0), (False, GRAPH_RESERVE)])
def test_low_memory_needs_the_memory_of_one_branch(load: Load, low_memory: bool, reserve: int) -> None:
    needed = WEIGHTS + reserve + ACTIVATIONS[0 if low_memory else 1]
    batch = 1 if low_memory else 2
    with load(needed, low_memory=low_memory) as runner:
        run(runner, batch)
    with pytest.raises(BackendError):
        load(needed - 1, low_memory=low_memory)


def test_a_batch_that_low_memory_has_no_room_for_is_refused(load: Load) -> None:
    with load(WEIGHTS + ACTIVATIONS[0], low_memory=True) as runner:
        run(runner, 1)
        with refused_with(BackendError, "transformer-3s", ACTIVATIONS[1], ACTIVATIONS[0]):
            run(runner, 2)


@pytest.mark.parametrize(("low_memory", "reserve"), [(True, 0), (False, GRAPH_RESERVE)])
def test_streamed_weights_leave_room_for_the_batch_that_runs(
    load: Load, engine: Engine, low_memory: bool, reserve: int
) -> None:
    activations = ACTIVATIONS[0 if low_memory else 1]
    fixed = WEIGHTS - STREAMABLE
    with load(fixed + activations + reserve + 100, low_memory=low_memory, **STREAMING) as runner:
        run(runner, 1 if low_memory else 2)
    assert engine.weight_streaming_budget_v2 == 100
    with pytest.raises(BackendError):
        load(fixed + activations + reserve - 1, low_memory=low_memory, **STREAMING)


def kernel(folder: Path, spills: int, head_dim: int) -> str:
    """A kernel's files, in a bundle; its name."""
    name = cubin_name("mlp", "sm_89", "bfloat16", 64, head_dim)
    code = b"\x7fELF"
    cubin = Cubin(
        op="mlp",
        gpu="sm_89",
        dtype="bfloat16",
        mini_batch_size=64,
        head_dim=head_dim,
        entry="ttt_mlp",
        num_warps=8,
        shared_memory=0,
        registers=255,
        spills=spills,
        parameters=(),
        file=f"{name}.cubin",
        sha256=hashlib.sha256(code).hexdigest(),
        source_sha256="",
        triton="",
    )
    (folder / KERNELS).mkdir(parents=True, exist_ok=True)
    (folder / KERNELS / cubin.file).write_bytes(code)
    (folder / KERNELS / f"{name}.json").write_bytes(msgspec.json.encode(cubin))
    return name


def test_the_stacks_of_spilling_kernels_are_reserved(tmp_path: Path) -> None:
    layers = {"layer 1": kernel(tmp_path, 2048, 64), "layer 2": kernel(tmp_path, 512, 32)}
    bundle = Bundle(tmp_path, manifest=None)  # type: ignore[arg-type]  # only its folder is used
    file = stand_in.engine_file(tmp_path, plugins=layers)
    assert kernel_stacks(bundle, file, resident_threads=128 * 1536) == 2048 * 128 * 1536
    assert kernel_stacks(bundle, stand_in.engine_file(tmp_path), resident_threads=128 * 1536) == 0


def test_what_cuda_will_allocate_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "free_memory", lambda: 1000)
    assert MemoryLimit().available(taken=300, pending=100) == 900
    assert MemoryLimit(700).available(taken=300, pending=100) == 300
    assert MemoryLimit(5000).available(taken=300, pending=100) == 900


# The compiled kernels


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cache"))


def test_a_second_start_compiles_nothing(load: Load, engine: Engine, tmp_path: Path) -> None:
    with load() as runner:
        run(runner, 2)
        (first,) = cache_files(tmp_path)
        content = first.read_bytes()
        run(runner, 2)
    assert engine.compiled == 1
    with load() as runner:
        run(runner, 2)
        assert (engine.compiled, first.read_bytes()) == (1, content)
        run(runner, 1)
    assert engine.compiled == 2 and len(first.read_bytes()) > len(content)
    with load() as runner:
        run(runner, 2)
        run(runner, 1)
    assert engine.compiled == 2 and cache_files(tmp_path) == [first]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "refused by TensorRT", "of another engine"])
def test_a_damaged_cache_is_ignored_and_replaced(load: Load, engine: Engine, tmp_path: Path, damage: str) -> None:
    with load(sha256="1" * 64 if damage == "of another engine" else "0" * 64) as runner:
        run(runner, 2)
    (path,) = cache_files(tmp_path)
    whole = path.read_bytes()
    if damage == "refused by TensorRT":
        other = b"of an older driver"
        path.write_bytes(b"0" * 64 + b" " + hashlib.sha256(other).hexdigest().encode() + b"\n" + other)
    elif damage != "of another engine":
        path.write_bytes({"cut": whole[:-1], "changed": whole[:-1] + b"?", "empty": b""}[damage])
    with load() as runner:
        run(runner, 2)
    assert engine.compiled == 2
    if damage != "of another engine":
        assert path.read_bytes() == whole
    with load() as runner:
        run(runner, 2)
    assert engine.compiled == 2 and len(list(tmp_path.iterdir())) == 2, "the engine and its cache"


def test_another_gpu_or_driver_has_its_own(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = stand_in.GPU
    for other in (gpu, dataclasses.replace(gpu, name="NVIDIA L40"), dataclasses.replace(gpu, driver="13.1")):
        monkeypatch.setattr(stand_in, "GPU", other)
        with load() as runner:
            run(runner, 1)
    assert len(cache_files(tmp_path)) == 3


def test_a_folder_that_cannot_be_written(
    load: Load, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)  # a test may run as root, whom no permission stops
    for _ in range(2):
        with load() as runner:
            run(runner, 2)
    assert engine.compiled == 2 and [path.name for path in tmp_path.iterdir()] == ["transformer-3s.engine"]


def test_sizes_in_the_log_of_a_build() -> None:
    stated = StatedMemory()
    for message in (
        "Total Device Persistent Memory: 7 bytes",
        "Max Scratch Memory: 32660319232 bytes",
        "Total Activation Memory: 32660319232 bytes",
        "Total Weights Memory: 422220160 bytes",
        "Total Activation Memory: 65312445952 bytes",
        "Total Weights Memory: 9 bytes",
    ):
        stated.read(message)
    assert (stated.activations, stated.weights) == ([32_660_319_232, 65_312_445_952], 422_220_160)
    stated.clear()
    assert (stated.activations, stated.weights) == ([], 0)
