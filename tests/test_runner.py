"""Engines at run time: what is checked before a GPU is touched, and on a GPU, the same numbers as ONNX Runtime."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.tensorrt.checks import (
    EngineMemory,
    check_engine,
    choose_profile,
    parse_memory,
    usable_engine,
    weight_budget,
)
from ttt_video_engine.engines.tensorrt.deserialise import deserialised
from ttt_video_engine.engines.tensorrt.engine import (
    FOLDER,
    KERNELS,
    BuildSettings,
    EngineEntry,
    EngineFile,
    Profile,
    ShapeRange,
    engine_name,
    entry_path,
)
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.errors import BackendError, ConfigError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.pipeline import decode
from ttt_video_engine.runtime.runner import TensorSpec, check_inputs

Run = Callable[..., tuple[int, str, str]]
Floats = NDArray[np.float32]

GRAPH, GPU = "transformer-3s", "sm_89"
CURE = f"run: ttt-video export --engine tensorrt --gpu {GPU}"


def has_gpu() -> bool:
    try:
        return bool(cuda.device())
    except BackendError:
        return False


without_gpu = pytest.mark.skipif(has_gpu(), reason="shows what is said where no GPU is")


@pytest.fixture
def package() -> Any:
    pytest.importorskip("tensorrt_rtx")
    return load_package("tensorrt_rtx")


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
        code, out, err = run(
            "sample", board, "--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--num-steps", 1, *options
        )
        assert (code, out) == (2, "") and err.count("\n") == 1 and not (tmp_path / "out").exists(), err
        return err.removeprefix("error: ").rstrip("\n")

    return refuse


@without_gpu
def test_without_a_driver_one_line_says_so(refused: Callable[..., str]) -> None:
    pytest.importorskip("cuda.core")
    found = refused("--engine", "tensorrt")
    assert found.startswith("no NVIDIA ") and found.endswith(
        "; run on a machine with an NVIDIA GPU, or use --engine onnxruntime"
    )


def test_without_cuda_core_one_line_says_so(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    expected = "cuda-core is not installed; run: pip install 'ttt-video-engine[tensorrt]'"
    assert refused("--engine", "tensorrt") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--engine tensorrt --provider cuda", "--provider is for --engine onnxruntime: leave out one of the two"),
        ("--gpu-memory 20GB", "--gpu-memory is for --engine tensorrt: leave it out, or name that engine"),
        ("--engine tensorrt --gpu-memory 20", "--gpu-memory is '20': must be a number above 0 and one of GiB"),
        ("--engine tensorrtx", "Invalid value for '--engine'"),
        ("--provider gpu", "Invalid value for '--provider'"),
    ],
)
def test_options_that_do_not_go_together(refused: Callable[..., str], options: str, expected: str) -> None:
    assert expected in refused(*options.split())


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("20GiB", 20 << 30), ("1.5GiB", 3 << 29), ("512MB", 512 * 10**6)]
)
def test_an_amount_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "20", "GB", "-1GB", "0GB", "20 GB", "20gb", "1.2.3GB", "1e3GB", "٣GB", "20KB", "."]
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory is .*such as 20GB$"):
        parse_memory(text)


# Engines


def test_the_engine_of_the_graph_and_the_gpu(bundle: Path, package: Any) -> None:
    add_engine(bundle, package.version, gpu="sm_120")
    add_engine(bundle, package.version, graph="vae_decoder-next")
    expected = add_engine(bundle, package.version)
    assert usable_engine(open_bundle(bundle), GRAPH, GPU) == (expected, package)


@pytest.mark.parametrize(("gpus", "expected"), [((), "no GPU"), (("sm_86", "sm_120"), "sm_120, sm_86")])
def test_a_bundle_without_an_engine_for_the_gpu(bundle: Path, gpus: tuple[str, ...], expected: str) -> None:
    for gpu in gpus:
        add_engine(bundle, "1.0", gpu=gpu)
    with pytest.raises(BackendError) as raised:
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    assert str(raised.value) == f"{bundle}: {GRAPH} is built for {expected}, not for {GPU}; {CURE}"


@pytest.mark.parametrize("damage", ["changed", "cut", "longer", "missing"])
def test_an_engine_that_is_not_what_was_built(bundle: Path, package: Any, damage: str) -> None:
    engine = add_engine(bundle, package.version)
    if damage == "missing":
        engine.path.unlink()
    else:
        engine.path.write_bytes({"changed": b"a flan", "cut": b"a pla", "longer": b"a engines"}[damage])
    with pytest.raises(BackendError) as raised:
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    what = "is missing" if damage == "missing" else "has changed since it was built"
    assert str(raised.value) == f"{engine.path}: {what}; {CURE}"


def test_an_engine_of_another_version(bundle: Path, package: Any) -> None:
    """It is refused, unless one of this version lies beside it."""
    old = add_engine(bundle, "1.0.0.1")
    with pytest.raises(BackendError) as raised:
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    assert str(raised.value) == (
        f"{old.path}: was built with tensorrt_rtx 1.0.0.1, installed is {package.version}; {CURE} "
        "(or pip install tensorrt-rtx==1.0.0.1)"
    )
    new = add_engine(bundle, package.version)
    assert usable_engine(open_bundle(bundle), GRAPH, GPU)[0] == new


def test_an_engine_of_a_package_that_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_package.cache_clear()
    add_engine(bundle, "10.0", package="tensorrt")
    with pytest.raises(BackendError, match=r"^tensorrt is not installed; run: pip install tensorrt$"):
        usable_engine(open_bundle(bundle), GRAPH, GPU)
    load_package.cache_clear()


def test_an_engine_whose_json_is_damaged(bundle: Path) -> None:
    engine = add_engine(bundle, "1.0")
    entry_path(engine.path).write_text('{"graph": "transformer-3s"')
    with pytest.raises(BackendError, match="export the bundle again with --engine tensorrt"):
        usable_engine(open_bundle(bundle), GRAPH, GPU)


def renamed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (replace(specs[0], name="noise"), *specs[1:])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: {"key": {**e.key, "weights": "0"}}, "is from another export (weights differs)"),
        (lambda e: {"key": {**e.key, "graph": "0"}}, "is from another export (graph differs)"),
        (lambda e: {"key": {}}, "is from another export (graph differs)"),
        (lambda e: {"dtype": "float16", "key": {**e.key, "precision": "float16"}}, "(precision differs)"),
        (lambda e: {"inputs": renamed(e.inputs)}, "has inputs noise float32['batch', 13, 16, 8, 12]"),
        (
            lambda e: {"outputs": renamed(e.outputs)},
            "has outputs noise float32['batch', 13, 16, 8, 12]; the bundle lists v",
        ),
    ],
)
def test_an_engine_of_another_export(
    bundle: Path, change: Callable[[EngineEntry], dict[str, Any]], expected: str
) -> None:
    engine = add_engine(bundle, "1.0")
    changed = EngineFile(engine.path, replace(engine.entry, **change(engine.entry)))
    check_engine(engine, open_bundle(bundle), "1.0")
    with pytest.raises(BackendError) as raised:
        check_engine(changed, open_bundle(bundle), "1.0")
    found = str(raised.value)
    assert found.startswith(f"{engine.path}: ") and expected in found and found.endswith(CURE) and "\n" not in found


def test_an_engine_without_its_kernels(bundle: Path) -> None:
    engine = add_engine(bundle, "1.0", plugins={"layer 1": "ttt_linear-sm_89", "layer 2": "ttt_linear-sm_89"})
    with pytest.raises(BackendError) as raised:
        check_engine(engine, open_bundle(bundle), "1.0")
    assert str(raised.value) == f"{engine.path}: its kernel ttt_linear-sm_89 is not in {bundle / KERNELS}; {CURE}"
    (bundle / KERNELS).mkdir()
    (bundle / KERNELS / "ttt_linear-sm_89.cubin").write_bytes(b"cubin")
    check_engine(engine, open_bundle(bundle), "1.0")


def test_bytes_that_are_no_engine(bundle: Path, package: Any) -> None:
    """TensorRT itself refuses them, with or without a GPU."""
    engine = add_engine(bundle, package.version, content=b"no engine at all" * 100)
    with pytest.raises(BackendError) as raised:
        deserialised(package, package.api.Runtime(package.logger), engine)
    found = str(raised.value)
    assert found.startswith(f"{engine.path}: tensorrt_rtx cannot load it (IRuntime::deserializeCudaEngine: ")
    assert found.endswith(CURE) and "\n" not in found


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
    with pytest.raises(BackendError) as raised:
        choose_profile("g", PROFILES, {"x": (5, 4), "t": (1,)})
    assert str(raised.value).startswith(
        "g: input x is [5, 4]; the engine was built for [1, 4] … [1, 4] or [1, 4] … [4, 4] or [1, 4] … [4, 4]; "
    )


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
    memory = EngineMemory(weights, activations, streamable or None)
    assert weight_budget("g", memory, available) == budget


@pytest.mark.parametrize(
    ("streamable", "low_memory", "expected"),
    [
        (
            0,
            False,
            "g: needs 15,000 bytes of GPU memory (10,000 for weights, 5,000 for activations), 6,000 are available; "
            "export with --weight-streaming, or use --low-memory",
        ),
        (0, True, "6,000 are available; export with --weight-streaming"),
        (8000, False, "g: needs 7,000 bytes of GPU memory even with weights streamed (2,000 for weights, "),
        (8000, True, "6,000 are available; take a larger GPU"),
    ],
)
def test_too_little_memory(streamable: int, low_memory: bool, expected: str) -> None:
    with pytest.raises(BackendError) as raised:
        weight_budget("g", EngineMemory(10_000, 5000, streamable or None), 6000, low_memory=low_memory)
    assert expected in str(raised.value)


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
    with pytest.raises(BackendError, match=r"input cache_in.0 is float32\[1, 3\]; must be cache_in.0 bfloat16"):
        check_inputs("g", specs, {"cache_in.0": Elsewhere(np.zeros((1, 3), np.float32))})

    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    with OnnxRuntimeLoader(open_bundle(shared_bundle))("text_encoder") as engine:
        here, there = (engine.run({"ids": array})["embeddings"] for array in (ids, Elsewhere(ids)))
    np.testing.assert_array_equal(here, there)


# On a GPU


@pytest.mark.gpu
def test_an_array_on_the_gpu() -> None:
    stream = cuda.Stream()
    host = np.arange(12, dtype=np.float16).reshape(3, 4)
    array = cuda.to_device(host.T, stream)
    stream.close()
    assert (array.shape, array.dtype, array.ndim) == ((4, 3), np.dtype(np.float16), 2)
    np.testing.assert_array_equal(np.asarray(array), host.T)
    np.testing.assert_array_equal(np.asarray(array, np.float32), host.T.astype(np.float32))


@pytest.mark.gpu
def test_more_memory_than_the_gpu_has() -> None:
    total = cuda.device().total_memory
    with pytest.raises(
        BackendError, match=f"^{total + 1:,} bytes of GPU memory are needed, [0-9,]+ are free; use --low"
    ):
        cuda.DeviceBuffer(total + 1, cuda.Stream())
    cuda.DeviceBuffer(1, cuda.Stream()).close()  # and the error is not reported again


@pytest.fixture
def on_gpu(bundle: Path) -> Iterator[tuple[Bundle, TensorRTLoader]]:
    """The tiny bundle with an engine of every graph that a video of 3s needs, TTT layers as standard operators."""
    from ttt_video_engine.engines.tensorrt.builder import BuildRequest, build_engine
    from ttt_video_engine.engines.tensorrt.package import package_for
    from ttt_video_engine.export.engines import profiles

    gpu = cuda.device().gpu
    try:
        load_package(package_for(gpu))
    except BackendError as error:
        pytest.skip(str(error))
    opened = open_bundle(bundle)
    manifest = opened.manifest
    (bundle / FOLDER).mkdir(exist_ok=True)
    for name in ("text_encoder", GRAPH, "vae_decoder-first", "vae_decoder-next"):
        graph = manifest.graphs[name]
        key = {
            "graph": manifest.files[graph.file].sha256,
            "weights": manifest.files[graph.weights].sha256,
            "precision": manifest.dtype,
        }
        request = BuildRequest(
            graph=name,
            onnx=bundle / graph.file,
            gpu=gpu,
            dtype=manifest.dtype,
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=profiles(manifest.model, manifest.lengths, graph.inputs, name),
            settings=BuildSettings(plugins=False),
            kernels=bundle / KERNELS,
            weights=manifest.files[graph.weights].size,
            key=key,
        )
        build_engine(request, bundle / FOLDER, lambda phase, done, total: None)
    loader = TensorRTLoader(opened)
    loader.check(["text_encoder", GRAPH, "vae_decoder-first", "vae_decoder-next"])
    yield opened, loader


def close(found: Any, expected: Any) -> None:
    """Up to 1e-3 of the largest value: TensorRT may multiply float32 in TF32."""
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-3 * np.abs(expected).max()


def random_inputs(specs: tuple[TensorSpec, ...], sizes: dict[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        whole = spec.dtype == "int64"
        inputs[spec.name] = (
            random.integers(0, 100, shape) if whole else random.standard_normal(shape).astype(spec.dtype)
        )
    return inputs


@pytest.mark.gpu
@pytest.mark.parametrize(("graph", "tokens"), [("text_encoder", 136), (GRAPH, 0)])
def test_a_graph_gives_what_onnx_runtime_gives(on_gpu: tuple[Bundle, TensorRTLoader], graph: str, tokens: int) -> None:
    """Batches of one and two in turn, each with other numbers, so that no buffer and no recording may be stale."""
    opened, load = on_gpu
    entry = opened.graph(graph)
    batches = (1, 1, 1) if graph == "text_encoder" else (2, 2, 2, 1, 1, 1, 2, 2)
    with load(graph) as engine, OnnxRuntimeLoader(opened, provider="cpu")(graph) as expected:
        for seed, batch in enumerate(batches):
            inputs = random_inputs(entry.inputs, {"batch": batch, "tokens": tokens}, seed)
            found, wanted = engine.run(inputs), expected.run(inputs)
            assert set(found) == set(wanted)
            for name in wanted:
                close(found[name], wanted[name])
    with pytest.raises(BackendError, match="has been freed"):
        engine.run(inputs)


@pytest.mark.gpu
def test_caches_stay_on_the_gpu_and_the_frames_are_the_same(on_gpu: tuple[Bundle, TensorRTLoader]) -> None:
    opened, load = on_gpu
    latents: Floats = np.random.default_rng(0).standard_normal((1, 13, 16, 8, 12), dtype=np.float32)
    with load("vae_decoder-first") as engine:
        outputs = engine.run({"latents": latents[:, :3]})
    caches = {name: array for name, array in outputs.items() if name.startswith("cache_out.")}
    assert caches and all(isinstance(array, cuda.DeviceArray) for array in caches.values())
    assert all(np.isfinite(np.asarray(array)).all() for array in caches.values()), "they outlive their engine"
    found, expected = (
        np.concatenate(list(decode(opened, loader, latents))).astype(int)
        for loader in (load, OnnxRuntimeLoader(opened, provider="cpu"))
    )
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1
