"""`parity --bundle --polygraphy`: what Polygraphy says of a bundle's graphs, and that it reads what was saved."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from polygraphy.comparator import RunResults
from real_engines import skip_without_package

from ttt_video_engine.engines import cuda
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, OnnxRuntimeRunner
from ttt_video_engine.export.build import ExportOptions, export_bundle
from ttt_video_engine.export.engines import EngineRequest
from ttt_video_engine.export.parity import second_opinion
from ttt_video_engine.export.parity.gate import TOLERANCES
from ttt_video_engine.export.sources.source import SeededSource
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, VAE_FIRST, Bundle, open_bundle
from ttt_video_engine.runtime.errors import BackendError
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.runner import Array, HostOrDeviceArray

Run = Callable[..., tuple[int, str, str]]

GRAPHS = ["text_encoder", "transformer-3s", "vae_decoder-first", "vae_decoder-next"]
POLYGRAPHY = Path(sys.executable).with_name("polygraphy")


def polygraphy_run(model: Path, files: Path) -> subprocess.CompletedProcess[str]:
    """The command of docs/tensorrt.md."""
    loads: list[str | Path] = ["--load-inputs", files / "inputs.json", "--load-outputs", files / "outputs.json"]
    command: list[str | Path] = [
        POLYGRAPHY,
        "run",
        model,
        "--onnxrt",
        *loads,
        "--check-error-stat",
        "max",
        "--atol",
        "1e-4",
    ]
    return subprocess.run(command, capture_output=True, text=True)


def change_outputs(monkeypatch: pytest.MonkeyPatch, output: str, change: Callable[[Array], Array]) -> None:
    """From here on, our runner gives a changed `output` wherever a graph has it."""
    run = OnnxRuntimeRunner.run

    def changed(runner: OnnxRuntimeRunner, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, Array]:
        return {name: change(value) if name == output else value for name, value in run(runner, inputs).items()}

    monkeypatch.setattr(OnnxRuntimeRunner, "run", changed)


def test_polygraphy_agrees_and_reads_what_was_saved(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    code, out, err = run("parity", "--bundle", shared_bundle, "--polygraphy", tmp_path / "files", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [(row["graph"], row["runner"], row["passed"]) for row in rows] == [(g, "polygraphy", True) for g in GRAPHS]
    # Not 0: the two compute in different orders, so that each is an opinion of its own.
    assert all(0 < row["max_error"] < row["tolerance"] == TOLERANCES["float32"] for row in rows)
    files = {path.relative_to(tmp_path / "files").as_posix() for path in (tmp_path / "files").rglob("*.json")}
    assert files == {f"{graph}/{name}.json" for graph in GRAPHS for name in ("inputs", "outputs")}

    model, saved = shared_bundle / "text_encoder/model.onnx", tmp_path / "files" / TEXT_ENCODER
    done = polygraphy_run(model, saved)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
    results = RunResults.load(str(saved / "outputs.json"))
    (ours,) = results["onnxruntime"]
    ours["embeddings"] = ours["embeddings"] + np.float32(0.1)
    results.save(str(saved / "outputs.json"))
    assert polygraphy_run(model, saved).returncode == 1


@pytest.mark.parametrize("value", [0.01, np.nan, np.inf])
def test_what_differs_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, shared_bundle: Path, tmp_path: Path, value: float
) -> None:
    def change(frames: Array) -> Array:
        changed: NDArray[np.float32] = frames.astype(np.float32)
        changed.flat[7] += value
        return changed

    change_outputs(monkeypatch, "frames", change)
    code, out, err = run("parity", "--bundle", shared_bundle, "--polygraphy", tmp_path / "files")
    assert code == 1 and err.startswith("error: 2 of 4 ") and err.count("\n") == 1
    assert "vae_decoder-first in polygraphy" in err and "vae_decoder-next in polygraphy" in err
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[graph, "polygraphy"] for graph in GRAPHS]


@dataclass
class OtherLoader:
    """In place of TensorRT's, which needs a GPU: ONNX Runtime, whose frames are turned around."""

    bundle: Bundle

    def __call__(self, graph: str) -> Any:
        runner = OnnxRuntimeLoader(self.bundle)(graph)
        run = runner.run
        runner.run = lambda inputs: {name: np.negative(value) for name, value in run(inputs).items()}  # type: ignore[method-assign]
        return runner


def test_an_engine_for_this_gpu_is_compared_as_well(
    monkeypatch: pytest.MonkeyPatch, shared_bundle: Path, tmp_path: Path
) -> None:
    engines = [
        SimpleNamespace(entry=SimpleNamespace(graph=graph, gpu=gpu))
        for graph, gpu in ((VAE_FIRST, "sm_89"), (TEXT_ENCODER, "sm_120"))
    ]
    monkeypatch.setattr(second_opinion, "list_engines", lambda root: engines)
    monkeypatch.setattr(second_opinion, "_gpu", lambda: "sm_89")
    monkeypatch.setattr(second_opinion, "TensorRTLoader", OtherLoader)
    opinions = list(second_opinion.second_opinions(open_bundle(shared_bundle), tmp_path))
    assert [(o.graph, o.passed) for o in opinions if o.runner == "polygraphy"] == [(graph, True) for graph in GRAPHS]
    ((other),) = [o for o in opinions if o.runner == "tensorrt"]
    assert (other.graph, other.passed) == (VAE_FIRST, False) and other.max_error == pytest.approx(2, rel=1e-3)


@pytest.mark.gpu
def test_engines_agree(bundle: Path, tmp_path: Path) -> None:
    gpu = cuda.device().gpu
    skip_without_package(gpu)
    opened = export_bundle(
        SeededSource(tiny("linear"), 0),
        bundle,
        ["3s"],
        "float32",
        lambda line: None,
        ExportOptions(EngineRequest((gpu,))),
    )
    opinions = list(second_opinion.second_opinions(opened, tmp_path))
    assert [(o.graph, o.passed) for o in opinions if o.runner == "tensorrt"] == [(graph, True) for graph in GRAPHS]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), ("--golden", "--bundle")),
        (("--golden", "golden", "--bundle", "bundle", "--polygraphy", "new"), ("--golden", "--bundle")),
        (("--bundle", "bundle"), ("--bundle", "--polygraphy")),
        (("--golden", "golden", "--polygraphy", "new"), ("--bundle", "--polygraphy")),
        (("--bundle", "missing", "--polygraphy", "new"), ("missing", "bundle.json")),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], named: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("parity", *options)
    assert code == 2 and all(name in err for name in named)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, out, err = run("parity", "--bundle", shared_bundle, "--polygraphy", tmp_path)
    assert (code, out) == (2, "") and str(tmp_path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bfloat16_is_refused_before_anything_is_written(shared_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(shared_bundle)
    narrow = Bundle(opened.root, replace(opened.manifest, dtype="bfloat16"))
    with pytest.raises(BackendError, match="bfloat16"):
        second_opinion.second_opinions(narrow, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_changed_graph_is_not_run(run: Run, bundle: Path, tmp_path: Path) -> None:
    with (bundle / "vae_decoder/first.onnx").open("ab") as file:
        file.write(b"\0")
    code, _, err = run("parity", "--bundle", bundle, "--polygraphy", tmp_path / "new")
    assert code == 2 and "vae_decoder/first.onnx" in err and not (tmp_path / "new").exists()


def test_without_polygraphy_the_cure_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, shared_bundle: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    code, _, err = run("parity", "--bundle", shared_bundle, "--polygraphy", tmp_path / "new")
    assert code == 2 and "ttt-video-engine[polygraphy]" in err and not (tmp_path / "new").exists()
