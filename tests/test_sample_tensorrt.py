"""`sample --engine tensorrt`, whole where there is a GPU, and elsewhere up to where TensorRT loads the first engine."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from driver import HERE, build_driver, needs_driver, run_with
from messages import names
from packages import tensorrt_rtx
from real_engines import build_graphs, skip_without_package
from safetensors.numpy import load_file
from test_runner import add_engine

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.tensorrt.engine import find_engine
from ttt_video_engine.runtime.bundle import open_bundle

Run = Callable[..., tuple[int, str, str]]
GRAPHS = ("text_encoder", "transformer-3s", "vae_decoder-first", "vae_decoder-next")


def storyboard(folder: Path) -> Path:
    path = folder / "bear.json"
    path.write_text(json.dumps([{"text": "A bear bakes bread."}]))
    return path


def options(folder: Path, bundle: Path, output: str) -> list[str]:
    """Of a short render, whose seed is fixed."""
    places = [str(storyboard(folder)), "--bundle", str(bundle), "--output-dir", str(folder / output)]
    return [*places, "--num-steps", "2", "--seed", "1"]


@needs_driver[0]
@needs_driver[1]
def test_up_to_the_first_engine(bundle: Path, tmp_path: Path) -> None:
    """With a driver whose GPU is the memory of the host, on which TensorRT cannot load an engine."""
    package = tensorrt_rtx()
    opened = open_bundle(bundle)
    build_graphs(opened, GRAPHS[:2], "sm_89", plugins=True)
    for graph in GRAPHS[2:]:
        add_engine(bundle, package.version, graph=graph)
    driver = build_driver(tmp_path)
    arguments = [str(HERE.parent / "cli.py"), "sample", *options(tmp_path, bundle, "out"), "--engine", "tensorrt"]
    done = run_with(driver, tmp_path, arguments)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    names(last, find_engine(bundle, "text_encoder", "sm_89").path, "--gpu sm_89")


@pytest.mark.gpu
@pytest.mark.parametrize("saving", [(), ("--low-memory",)])
def test_a_video_is_that_of_onnx_runtime(run: Run, bundle: Path, tmp_path: Path, saving: tuple[str, ...]) -> None:
    """Twice: the second start finds the kernels that the first has compiled."""
    gpu = cuda.device().gpu
    skip_without_package(gpu)
    build_graphs(open_bundle(bundle), GRAPHS, gpu, plugins=True)
    code, _, err = run("sample", *options(tmp_path, bundle, "cpu"))
    assert code == 0, err
    expected = load_file(tmp_path / "cpu/bear/latents.safetensors")
    for output in ("first", "second"):
        code, _, err = run("sample", *options(tmp_path, bundle, output), "--engine", "tensorrt", *saving)
        assert code == 0, err
        found = load_file(tmp_path / output / "bear/latents.safetensors")
        assert set(found) == set(expected)
        for name, latents in expected.items():
            # TensorRT may multiply float32 in TF32.
            assert np.abs(found[name] - latents).max() <= 1e-2 * np.abs(latents).max()
        assert (tmp_path / output / "bear/video.mp4").stat().st_size > 1000
    assert len(list((bundle / "engines").glob("*.cache"))) == len(GRAPHS)
