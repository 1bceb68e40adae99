"""Engines on a GPU: the same numbers as ONNX Runtime's, from batch to batch and from graph to graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import numbers, refused_with
from numpy.typing import NDArray
from real_engines import build_graphs, skip_without_package

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.stages import decode

Floats = NDArray[np.float32]

GRAPH = "transformer-3s"
GRAPHS = ("text_encoder", GRAPH, "vae_decoder-first", "vae_decoder-next")


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
    with refused_with(BackendError, total + 1, "--low-memory") as caught:
        cuda.DeviceBuffer(total + 1, cuda.Stream())
    assert [number for number in numbers(str(caught.value)) if number <= total], "what is free"
    cuda.DeviceBuffer(1, cuda.Stream()).close()  # and the error is not reported again


@pytest.fixture
def on_gpu(bundle: Path) -> Iterator[tuple[Bundle, TensorRTLoader]]:
    """The tiny bundle with an engine of every graph that a video of 3s needs, TTT layers as standard operators."""
    gpu = cuda.device().gpu
    skip_without_package(gpu)
    opened = open_bundle(bundle)
    build_graphs(opened, GRAPHS, gpu, plugins=False)
    loader = TensorRTLoader(opened)
    loader.check(GRAPHS)
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
    with refused_with(BackendError, graph):
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
