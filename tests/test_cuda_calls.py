"""The calls that engines make of CUDA, with a driver in place of NVIDIA's whose GPU is the memory of the host."""

import json
from pathlib import Path
from typing import Any

import pytest
from driver import HERE, build_driver, needs_driver, run_with

pytestmark = needs_driver


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def found(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calls")
    done = run_with(driver, folder, [str(HERE / "cuda_calls.py")])
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return content


def test_the_gpu_is_found(found: dict[str, Any]) -> None:
    assert found["gpu"] == ["Fake GPU", "sm_89", "13.0", 1 << 30, 128 * 1536]
    assert "GPU 1" in found["device"] and "--engine onnxruntime" in found["device"]


def test_copies_are_whole_and_all_memory_is_given_back(found: dict[str, Any]) -> None:
    assert found["copied"] and found["as float32"] == "float32"
    assert found["while it lives"] == 1 and found["after it"] == [0, 0]


def test_too_little_memory_names_both_sizes_and_the_cure(found: dict[str, Any]) -> None:
    said = found["too much"]
    assert f"{(1 << 30) + 1:,}" in said and f"{1 << 30:,}" in said and "--low-memory" in said


def test_a_graph_is_recorded_for_this_thread_and_a_failure_ends_the_recording(found: dict[str, Any]) -> None:
    assert found["mode while recording"] == [1 + 1], "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"
    assert found["refused"] == "refused by the engine" and found["capturing"] == 0


def test_a_kernel_is_launched_as_its_cubin_says(found: dict[str, Any]) -> None:
    assert found["launched"]
    assert "XQ" in found["misaligned"] and "16" in found["misaligned"]
    assert all(found[name].startswith("ttt_linear.cubin: ") for name in ("misaligned", "closed", "damaged"))


@pytest.mark.parametrize(
    ("settings", "named"), [({"FAKE_CUDA_VERSION": "12040"}, "12.4"), ({"FAKE_GPUS": "0"}, "no NVIDIA GPU")]
)
def test_a_driver_that_cannot_be_used(driver: Path, tmp_path: Path, settings: dict[str, str], named: str) -> None:
    done = run_with(driver, tmp_path, ["-c", "from ttt_video_engine.engines import cuda; cuda.device()"], **settings)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "BackendError: " in last and named in last


def test_a_kernel_that_does_not_unload_hides_no_error(driver: Path, tmp_path: Path) -> None:
    """After a failed launch every call of the driver fails as well."""
    call = "cuda_calls.an_error_comes_before_what_close_would_say()"
    code = f"import sys; sys.path.append({str(HERE)!r}); import cuda_calls; {call}"
    done = run_with(driver, tmp_path, ["-c", code], FAKE_UNLOAD="719")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'first'", done.stderr
