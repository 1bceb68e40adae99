"""The two branches of guidance in two processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Run

from ttt_video_engine.engines.guidance_pair import PairLoader, second_gpu
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import BackendError, ConfigError
from ttt_video_engine.runtime.runner import Array, Runner

GRAPH = "transformer-3s"


@pytest.fixture(scope="module")
def pair(shared_bundle: Path) -> Iterator[Runner]:
    with _loader(shared_bundle)(GRAPH) as runner:
        yield runner


@pytest.fixture(scope="module")
def alone(shared_bundle: Path) -> Iterator[Runner]:
    with OnnxRuntimeLoader(open_bundle(shared_bundle), num_threads=1)(GRAPH) as runner:
        yield runner


def test_a_pair_gives_what_one_process_gives_branch_by_branch(pair: Runner, alone: Runner, shared_bundle: Path) -> None:
    for seed in (0, 1):
        inputs = _inputs(shared_bundle, seed)
        negative, positive = (_velocity(alone, {key: array[[row]] for key, array in inputs.items()}) for row in (0, 1))
        assert np.array_equal(_velocity(pair, inputs), np.concatenate([negative, positive]))
        assert not np.array_equal(negative, positive)


def test_a_pass_without_guidance_runs_here(pair: Runner, alone: Runner, shared_bundle: Path) -> None:
    inputs = {name: array[1:] for name, array in _inputs(shared_bundle, 2).items()}
    peer = _peer()
    peer.send_signal(signal.SIGSTOP)
    try:
        assert np.array_equal(_velocity(pair, inputs), _velocity(alone, inputs))
    finally:
        peer.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("busy", [False, True])
def test_a_dead_process_is_an_error_at_once_and_is_replaced(
    busy: bool, pair: Runner, alone: Runner, shared_bundle: Path
) -> None:
    inputs = _inputs(shared_bundle, 3)
    expected = _velocity(pair, inputs)
    peer = _peer()
    # Stopped, it is busy for ever: it dies while it is waited for.
    peer.send_signal(signal.SIGSTOP if busy else signal.SIGKILL)
    killer = threading.Timer(1, peer.kill if busy else peer.is_running)
    killer.start()
    start = time.monotonic()
    with pytest.raises(BackendError, match="exit code -9"):
        pair.run(inputs)
    assert time.monotonic() - start < 10
    killer.join()
    assert np.array_equal(_velocity(pair, inputs), expected)


def test_what_the_second_process_cannot_load_is_an_error_that_says_why(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(BackendError, match="--provider tensorrt"):
        # The first process loads the graph on the CPU, the second one finds no GPU.
        runner = PairLoader(opened, OnnxRuntimeLoader(opened), _OnlyHere(bundle))(GRAPH)
        with runner:
            runner.run(_inputs(bundle, 0))


def test_no_process_is_left(shared_bundle: Path) -> None:
    with _loader(shared_bundle)(GRAPH) as runner:
        runner.run(_inputs(shared_bundle, 0))
        peer = _peer(newest=True)
    assert not peer.is_running()


def test_two_gpus_must_be_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert second_gpu() == "7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    with pytest.raises(ConfigError):
        second_gpu()


def test_a_video_is_that_of_low_memory(shared_bundle: Path, run: Run, tmp_path: Path) -> None:
    videos = []
    for option in ("--guidance-parallel", "--low-memory"):
        options = ("--bundle", shared_bundle, "--output-dir", tmp_path / option, "--num-steps", 3, option)
        code, _, errors = run("sample", "--prompt", "A bear sleeps.", *options)
        assert code == 0, errors
        videos.append(next((tmp_path / option).glob("*/video.mp4")).read_bytes())
    assert videos[0] == videos[1]
    code, _, errors = run("sample", "--prompt", "A bear sleeps.", *options, "--guidance-parallel")
    assert code == 2 and errors.count("\n") == 1


class _OnlyHere:
    """Makes a loader in the process that created it, and none in any other."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._process = bundle, os.getpid()

    def __call__(self) -> OnnxRuntimeLoader:
        here = os.getpid() == self._process
        return OnnxRuntimeLoader(open_bundle(self._bundle), provider="cpu" if here else "tensorrt")


def _loader(bundle: Path) -> PairLoader:
    opened = open_bundle(bundle)
    return PairLoader(opened, OnnxRuntimeLoader(opened), partial(OnnxRuntimeLoader, opened, num_threads=1))


def _inputs(bundle: Path, seed: int) -> dict[str, Array]:
    """Of a batch of two branches: the same latents, other texts."""
    random = np.random.default_rng(seed)
    shapes = {spec.name: [int(size) for size in spec.shape[1:]] for spec in open_bundle(bundle).graph(GRAPH).inputs}
    latents = random.standard_normal(shapes["latents"]).astype(np.float32)
    text = random.standard_normal((2, *shapes["text"])).astype(np.float32)
    return {"latents": np.stack([latents, latents]), "text": text, "timestep": np.full(2, 700)}


def _velocity(runner: Runner, inputs: dict[str, Array]) -> Array:
    return np.asarray(runner.run(inputs)["velocity"])


def _peer(*, newest: bool = False) -> psutil.Process:
    """The second process of the pair that the tests share, or of the one that was made last."""
    spawned = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return (max if newest else min)(spawned, key=lambda child: child.create_time())
