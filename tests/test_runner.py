"""Engines at run time: what is checked before a GPU is touched, and what is said of one that does not fit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from messages import holds, names, refusal, refused_with
from msgspec.structs import replace
from numpy.typing import NDArray
from packages import tensorrt_rtx

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.tensorrt.checks import check_engine, choose_profile, usable_engine
from ttt_video_engine.engines.tensorrt.deserialise import deserialise_engine
from ttt_video_engine.engines.tensorrt.engine import (
    FOLDER,
    KERNELS,
    EngineEntry,
    EngineFile,
    Profile,
    ShapeRange,
    engine_name,
    entry_path,
)
from ttt_video_engine.engines.tensorrt.memory import MemoryNeeds, parse_memory, weight_budget
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BackendError, ConfigError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.runner import TensorSpec, check_inputs

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
Floats = NDArray[np.float32]

GRAPH, GPU = "transformer-3s", "sm_89"
CURE = f"ttt-video export --engine tensorrt --gpu {GPU}"


def has_gpu() -> bool:
    try:
        return bool(cuda.device())
    except BackendError:
        return False


without_gpu = pytest.mark.skipif(has_gpu(), reason="shows what is said where no GPU is")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or not Path("/proc/self/task").is_dir(), reason="Linux only")
def test_threads_keep_to_the_cores_of_their_process(shared_bundle: Path) -> None:
    """As Slurm, Kubernetes and taskset give a process some of the cores."""
    code = """if True:
        import os, sys
        from pathlib import Path
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
        from ttt_video_engine.runtime.bundle import open_bundle
        with OnnxRuntimeLoader(open_bundle(Path(sys.argv[1])))("text_encoder"):
            cores = set().union(*(os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")))
        assert cores == os.sched_getaffinity(0), cores
    """
    ended = subprocess.run([sys.executable, "-c", code, str(shared_bundle)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def package() -> Any:
    return tensorrt_rtx()


def add_engine(root: Path, version: str, content: bytes = b"an engine", **changes: Any) -> EngineFile:
    """Puts an engine with its JSON into a bundle, of the bundle's own graph unless `changes` say otherwise."""
    manifest = open_bundle(root).manifest
    name = changes.get("graph", GRAPH)
    graph = manifest.graphs[name]
    entry = EngineEntry(
        graph=name,
        gpu=GPU,
        dtype=manifest.dtype,
        package="tensorrt_rtx",
        package_version=version,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=(),
        plugins={},
        size=len(content),
        weights=0,
        sha256="",
        seconds=1.0,
        key={
            "graph": manifest.files[graph.file].sha256,
            "weights": manifest.files[graph.weights].sha256,
            "precision": manifest.dtype,
        },
    )
    entry = replace(entry, **changes)
    path = root / FOLDER / engine_name(name, entry.dtype, entry.package, entry.package_version, entry.gpu)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    entry = replace(entry, sha256=sha256_of(path))
    entry_path(path).write_bytes(msgspec.json.encode(entry))
    return EngineFile(path, entry)


# The command line


@pytest.fixture
def refused(run: Run, shared_bundle: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs `sample`, which must refuse in one line and write nothing."""

    def refuse(*options: object) -> str:
        board = tmp_path / "bear.json"
        board.write_text(json.dumps([{"text": "A bear."}]))
        out = tmp_path / "out"
        result = run("sample", board, "--bundle", shared_bundle, "--output-dir", out, "--num-steps", 1, *options)
        assert not out.exists()
        return refusal(result)

    return refuse


@without_gpu
def test_without_a_driver_one_line_says_so(refused: Callable[..., str]) -> None:
    pytest.importorskip("cuda.core")
    names(refused("--engine", "tensorrt"), "NVIDIA", "--engine onnxruntime")


def test_without_cuda_core_one_line_says_so(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    names(refused("--engine", "tensorrt"), "cuda-core", "pip install 'ttt-video-engine[tensorrt]'")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ("--engine tensorrt --provider cuda", ("--provider", "--engine onnxruntime")),
        ("--gpu-memory 20GB", ("--gpu-memory", "--engine tensorrt")),
        ("--engine tensorrt --gpu-memory 20", ("--gpu-memory", 20, "GiB", "MiB", "GB", "MB")),
        ("--engine tensorrtx", ("--engine", "tensorrtx")),
        ("--provider gpu", ("--provider", "gpu")),
    ],
)
def test_options_that_do_not_go_together(refused: Callable[..., str], options: str, values: tuple[object, ...]) -> None:
    names(refused(*options.split()), *values)


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("20GiB", 20 << 30), ("1.5GiB", 3 << 29), ("512MB", 512 * 10**6)]
)
def test_an_amount_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "20", "GB", "-1GB", "0GB", "20 GB", "20gb", "1.2.3GB", "1e3GB", "٣GB", "20KB", "."]
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with refused_with(ConfigError, "--gpu-memory", repr(text), "20GB"):
        parse_memory(text)


# Engines


def test_the_engine_of_the_graph_and_the_gpu(bundle: Path, package: Any) -> None:
    add_engine(bundle, package.version, gpu="sm_120")
    add_engine(bundle, package.version, graph="vae_decoder-next")
    expected = add_engine(bundle, package.version)
    assert usable_engine(open_bundle(bundle), GRAPH, GPU) == (expected, package)


@pytest.mark.parametrize("gpus", [(), ("sm_86", "sm_120")])
def test_a_bundle_without_an_engine_for_the_gpu(bundle: Path, gpus: tuple[str, ...]) -> None:
    for gpu in gpus:
        add_engine(bundle, "1.0", gpu=gpu)
    with refused_with(BackendError, bundle, GRAPH, GPU, *gpus, CURE):
        usable_engine(open_bundle(bundle), GRAPH, GPU)


@pytest.mark.parametrize("damage", ["changed", "cut", "longer", "missing"])
def test_an_engine_that_is_not_what_was_built(bundle: Path, package: Any, damage: str) -> None:
    engine = add_engine(bundle, package.version)
    if damage == "missing":
        engine.path.unlink()
    else:
        engine.path.write_bytes({"changed": b"a flan", "cut": b"a pla", "longer": b"a engines"}[damage])
    with refused_with(BackendError, engine.path, CURE):
        usable_engine(open_bundle(bundle), GRAPH, GPU)


def test_an_engine_of_another_version(bundle: Path, package: Any) -> None:
    """It is refused, unless one of this version lies beside it."""
    old = add_engine(bundle, "1.0.0.1")
    versions = ("tensorrt_rtx", "1.0.0.1", package.version)
    with refused_with(BackendError, old.path, *versions, CURE, "pip install tensorrt-rtx==1.0.0.1"):
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    new = add_engine(bundle, package.version)
    assert usable_engine(open_bundle(bundle), GRAPH, GPU)[0] == new


def test_an_engine_of_a_package_that_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_package.cache_clear()
    add_engine(bundle, "10.0", package="tensorrt")
    with refused_with(BackendError, "tensorrt", "pip install tensorrt"):
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    load_package.cache_clear()


def test_an_engine_whose_json_is_damaged(bundle: Path) -> None:
    engine = add_engine(bundle, "1.0")
    entry_path(engine.path).write_text('{"graph": "transformer-3s"')
    with refused_with(BackendError, entry_path(engine.path), "export", "--engine tensorrt"):
        usable_engine(open_bundle(bundle), GRAPH, GPU)


def renamed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (replace(specs[0], name="noise"), *specs[1:])


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda e: {"key": {**e.key, "weights": "0"}}, ("weights",)),
        (lambda e: {"key": {**e.key, "graph": "0"}}, ("graph",)),
        (lambda e: {"key": {}}, ("graph",)),
        (lambda e: {"dtype": "float16", "key": {**e.key, "precision": "float16"}}, ("precision",)),
        (lambda e: {"inputs": renamed(e.inputs)}, ("noise float32['batch', 13, 16, 8, 12]", "latents")),
        (lambda e: {"outputs": renamed(e.outputs)}, ("noise float32['batch', 13, 16, 8, 12]", "velocity")),
    ],
)
def test_an_engine_of_another_export(
    bundle: Path, change: Callable[[EngineEntry], dict[str, Any]], values: tuple[object, ...]
) -> None:
    engine = add_engine(bundle, "1.0")
    changed = EngineFile(engine.path, replace(engine.entry, **change(engine.entry)))
    check_engine(engine, open_bundle(bundle), "1.0")
    with refused_with(BackendError, engine.path, *values, CURE):
        check_engine(changed, open_bundle(bundle), "1.0")


def test_an_engine_without_its_kernels(bundle: Path) -> None:
    engine = add_engine(bundle, "1.0", plugins={"layer 1": "ttt_linear-sm_89", "layer 2": "ttt_linear-sm_89"})
    with refused_with(BackendError, engine.path, "ttt_linear-sm_89", bundle / KERNELS, CURE):
        check_engine(engine, open_bundle(bundle), "1.0")
    (bundle / KERNELS).mkdir()
    (bundle / KERNELS / "ttt_linear-sm_89.cubin").write_bytes(b"cubin")
    check_engine(engine, open_bundle(bundle), "1.0")


def test_bytes_that_are_no_engine(bundle: Path, package: Any) -> None:
    """TensorRT itself refuses them, with or without a GPU."""
    engine = add_engine(bundle, package.version, content=b"no engine at all" * 100)
    with refused_with(BackendError, engine.path, "tensorrt_rtx", "IRuntime::deserializeCudaEngine", CURE):
        deserialise_engine(package, package.api.Runtime(package.logger), engine)


# Shapes, memory, inputs

PROFILES: tuple[Profile, ...] = (
    {"x": ShapeRange((1, 4), (1, 4), (1, 4)), "t": ShapeRange((1,), (1,), (1,))},
    {"x": ShapeRange((1, 4), (2, 4), (4, 4)), "t": ShapeRange((1,), (2,), (4,))},
    {"x": ShapeRange((1, 4), (3, 4), (4, 4)), "t": ShapeRange((1,), (3,), (4,))},
)


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 1), (3, 2), (4, 1)])
def test_the_profile_tuned_for_the_shapes_or_the_first_that_takes_them(batch: int, profile: int) -> None:
    assert choose_profile("g", PROFILES, {"x": (batch, 4), "t": (batch,), "fixed": (9,)}) == profile


def test_a_graph_without_free_axes_has_one_profile() -> None:
    assert choose_profile("g", (), {"x": (2, 4)}) == 0


def test_shapes_that_no_profile_takes() -> None:
    with refused_with(BackendError, "g", "x", [5, 4], [1, 4], [4, 4], "export"):
        choose_profile("g", PROFILES, {"x": (5, 4), "t": (1,)})


@pytest.mark.parametrize(
    ("weights", "streamable", "activations", "available", "budget"),
    [
        (10, 0, 5, 15, None),
        (10, 8, 5, 15, None),
        (10, 8, 5, 14, 7),
        (10, 8, 5, 7, 0),
    ],
)
def test_weights_that_stay_on_the_gpu(
    weights: int, streamable: int, activations: int, available: int, budget: int | None
) -> None:
    memory = MemoryNeeds(weights, activations, streamable or None)
    assert weight_budget("g", memory, available) == budget


@pytest.mark.parametrize(
    ("streamable", "low_memory", "needed", "weights", "cures"),
    [
        (0, False, 15_000, 10_000, {"--weight-streaming", "--low-memory"}),
        (0, True, 15_000, 10_000, {"--weight-streaming"}),
        (8000, False, 7000, 2000, {"--low-memory"}),
        (8000, True, 7000, 2000, set()),
    ],
)
def test_too_little_memory(streamable: int, low_memory: bool, needed: int, weights: int, cures: set[str]) -> None:
    """The cure is what is not in use already."""
    with refused_with(BackendError, "g", needed, weights, 5000, 6000) as raised:
        weight_budget("g", MemoryNeeds(10_000, 5000, streamable or None), 6000, low_memory=low_memory)
    assert {option for option in ("--weight-streaming", "--low-memory") if holds(str(raised.value), option)} == cures


class Elsewhere:
    """An array that is not numpy's, as those on a GPU are not."""

    def __init__(self, host: NDArray[Any]) -> None:
        self.host, self.shape, self.dtype, self.ndim = host, host.shape, host.dtype, host.ndim

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.host, dtype)


def test_inputs_may_lie_elsewhere(shared_bundle: Path) -> None:
    """They are held to the graph as numpy's are, and ONNX Runtime fetches them."""
    specs = (TensorSpec("cache_in.0", "bfloat16", (1, "n")),)
    check_inputs("g", specs, {"cache_in.0": Elsewhere(np.zeros((1, 3), np.uint16))})
    with refused_with(BackendError, "g", "cache_in.0", "float32[1, 3]", specs[0]):
        check_inputs("g", specs, {"cache_in.0": Elsewhere(np.zeros((1, 3), np.float32))})

    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    with OnnxRuntimeLoader(open_bundle(shared_bundle))("text_encoder") as engine:
        here, there = (engine.run({"ids": array})["embeddings"] for array in (ids, Elsewhere(ids)))
    np.testing.assert_array_equal(here, there)
