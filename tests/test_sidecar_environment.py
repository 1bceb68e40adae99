"""The sidecar names what ran, as loaded: it does not depend on the name a package was installed under."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import onnxruntime
import pytest
import tokenizers

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import open_bundle

Run = Callable[..., tuple[int, str, str]]


def test_a_sidecar_where_onnxruntime_comes_from_another_distribution(
    run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with onnxruntime-gpu, whose module is onnxruntime too."""

    def installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr("ttt_video_engine.runtime.jobs.version", installed, raising=False)
    board = tmp_path / "bear.json"
    board.write_text(json.dumps([{"text": "A bear."}]))
    out = tmp_path / "out"
    code, _, err = run("sample", board, "--bundle", shared_bundle, "--output-dir", out, "--num-steps", 1)
    assert code == 0, err
    sidecar = json.loads((out / "bear/video.json").read_bytes())
    assert sidecar["environment"] == {
        "engine": "onnxruntime",
        "onnxruntime": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
    }
    for module in (av, np, tokenizers):
        assert sidecar["versions"][module.__name__] == module.__version__


def test_the_provider_is_the_one_that_ran(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --provider, ONNX Runtime takes the CPU where CUDA does not start."""
    asked = ("CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr("ttt_video_engine.engines.onnxruntime.available_providers", lambda: asked)
    loader = OnnxRuntimeLoader(open_bundle(shared_bundle))
    assert loader.environment()["provider"] == "CUDAExecutionProvider"
    with loader("text_encoder") as runner:
        (provider,) = runner.providers
    assert loader.environment()["provider"] == provider == "CPUExecutionProvider"


def test_tensorrt_names_gpu_and_package(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = cuda.Device(
        index=0, name="NVIDIA L4", gpu="sm_89", total_memory=1, free_memory=1, driver="13.0", resident_threads=1
    )
    package = TensorRT("tensorrt_rtx", None, "1.7.1", None)
    monkeypatch.setattr(cuda, "device", lambda: gpu)
    monkeypatch.setattr("ttt_video_engine.engines.tensorrt.runner.usable_engine", lambda *_: (None, package))
    loader = TensorRTLoader(open_bundle(shared_bundle))
    loader.check(["text_encoder"])
    assert loader.environment() == {
        "engine": "tensorrt",
        "tensorrt_rtx": "1.7.1",
        "gpu": "NVIDIA L4",
        "architecture": "sm_89",
        "driver": "CUDA 13.0",
    }
