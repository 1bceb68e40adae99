"""`ttt-video devices`, and the choice of ONNX Runtime's provider."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from messages import names, refusal

from ttt_video_engine.engines import plugin_providers
from ttt_video_engine.engines.devices import survey
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, execution_providers
from ttt_video_engine.engines.plugin_providers import plugin_devices
from ttt_video_engine.engines.tensorrt.package import load_package
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, open_bundle
from ttt_video_engine.runtime.errors import BackendError

Run = Callable[..., tuple[int, str, str]]
PROVIDERS = ["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx", "openvino"]
NAMES = [*(f"onnxruntime {name}" for name in PROVIDERS), "tensorrt", "tensorrt_rtx", "torch"]

has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
without_cuda = pytest.mark.skipif(has_cuda, reason="this ONNX Runtime has the CUDA provider")


def test_devices_as_a_table(run: Run) -> None:
    code, out, err = run("devices")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines.pop(0).split() == ["backend", "version", "usable", "reason"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[: len(NAMES)]] == NAMES
    assert lines[0].split() == ["onnxruntime", "cpu", ort.__version__, "yes"]
    assert all(line.startswith("GPU ") for line in lines[len(NAMES) :])
    for line in lines[: len(NAMES)]:
        _, _, usable, *reason = re.split(r"\s{2,}", line, maxsplit=3)
        assert (usable == "yes" and not reason) or (usable == "no" and reason)


def test_devices_as_json(run: Run) -> None:
    code, out, err = run("devices", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [backend["name"] for backend in found["backends"]] == NAMES
    assert all(backend["usable"] == (backend["reason"] == "") for backend in found["backends"])
    assert bool(found["gpus"]) != bool(found["no_gpu"])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_package.cache_clear()
    found = survey()
    load_package.cache_clear()
    reasons = {backend.name: backend.reason for backend in found.backends}
    assert found.gpus == ()
    names(found.no_gpu, "cuda-core", "pip install 'ttt-video-engine[tensorrt]'")
    names(reasons["tensorrt"], "tensorrt", "pip install tensorrt")
    names(reasons["tensorrt_rtx"], "tensorrt_rtx", "pip install tensorrt-rtx")
    assert reasons["onnxruntime cpu"] == ""


@pytest.mark.gpu
def test_the_gpu_of_this_machine() -> None:
    found = survey()
    (gpu, *_) = found.gpus
    assert gpu.gpu.startswith("sm_") and gpu.name and 0 < gpu.free_memory <= gpu.total_memory
    assert float(gpu.driver) >= 12


# Providers


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """A package of a plugin provider, as pip installs one; the calls to ONNX Runtime that register it.

    Its library is not loaded, and the CPU of ONNX Runtime stands for its device."""
    calls: list[tuple[str, ...]] = []
    folder = tmp_path / "onnxruntime_ep_openvino"
    folder.mkdir()
    code = (
        'def get_ep_name():\n    return "CPUExecutionProvider"\n\n\ndef get_library_path():\n    return "plugin.so"\n'
    )
    (folder / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *at: calls.append(at))
    plugin_devices.cache_clear()
    yield calls
    plugin_devices.cache_clear()
    sys.modules.pop("onnxruntime_ep_openvino", None)


def test_a_plugin_provider_runs_on_its_devices(plugin: list[tuple[str, ...]], shared_bundle: Path) -> None:
    loader = OnnxRuntimeLoader(open_bundle(shared_bundle), provider="openvino")
    with loader(TEXT_ENCODER) as runner:
        inputs = {
            spec.name: np.ones([axis if isinstance(axis, int) else 2 for axis in spec.shape], np.int64)
            for spec in runner.inputs
        }
        assert all(np.isfinite(value).all() for value in runner.run(inputs).values())
    assert plugin == [("CPUExecutionProvider", "plugin.so")]
    assert loader.environment()["provider"] == "CPUExecutionProvider"


def test_a_plugin_provider_without_a_device(plugin: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_ep_devices", list)
    with pytest.raises(BackendError) as refused:
        plugin_devices("openvino")
    names(str(refused.value), "openvino", "--provider cpu")


@pytest.mark.parametrize("provider", ["nv-tensorrt-rtx", "openvino"])
def test_a_plugin_provider_that_is_not_installed(run: Run, shared_bundle: Path, tmp_path: Path, provider: str) -> None:
    if plugin_providers.is_installed(provider):  # type: ignore[arg-type]
        pytest.skip(f"{provider} is installed")
    board = tmp_path / "bear.json"
    board.write_text('[{"text": "A bear."}]')
    found = run("sample", board, "--bundle", shared_bundle, "--output-dir", tmp_path / "o", "--provider", provider)
    assert not (tmp_path / "o").exists()
    names(refusal(found), provider, f"pip install onnxruntime-ep-{provider}")


@without_cuda
@pytest.mark.parametrize(
    ("provider", "missing"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_missing_provider(run: Run, shared_bundle: Path, tmp_path: Path, provider: str, missing: str) -> None:
    board = tmp_path / "bear.json"
    board.write_text('[{"text": "A bear."}]')
    out = tmp_path / "out"
    found = refusal(run("sample", board, "--bundle", shared_bundle, "--output-dir", out, "--provider", provider))
    assert not out.exists()
    names(found, f"--provider {provider}", ort.__version__, missing)
    names(found, "pip uninstall onnxruntime", "pip install onnxruntime-gpu")


def test_the_provider_that_was_asked_for_is_the_one_that_runs(shared_bundle: Path) -> None:
    assert execution_providers("cpu") == ("CPUExecutionProvider",)
    with OnnxRuntimeLoader(open_bundle(shared_bundle), provider="cpu")("text_encoder") as engine:
        assert engine.providers == ["CPUExecutionProvider"]


def test_bfloat16_is_not_for_onnx_runtime(run: Run, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "dtype": "bfloat16"}))
    with pytest.raises(BackendError) as raised:
        OnnxRuntimeLoader(open_bundle(bundle))
    found = str(raised.value)
    names(found, bundle, "bfloat16", "--engine tensorrt", "--dtype float16")

    board = tmp_path / "bear.json"
    board.write_text('[{"text": "A bear."}]')
    assert refusal(run("sample", board, "--bundle", bundle, "--output-dir", tmp_path / "out")) == found
    assert not (tmp_path / "out").exists()
