"""Exports that are stopped, killed, or lack space: what is left, and what the next one makes of it."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from messages import RESUMED, WEIGHTS_WRITTEN, names, numbers, refused_with, where
from torch import Tensor

from ttt_video_engine.export import build
from ttt_video_engine.export.build import export_bundle
from ttt_video_engine.export.parity import gate
from ttt_video_engine.export.sources.source import Component, SeededSource
from ttt_video_engine.export.stage import Stage, export_lock
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import CheckFailed, OutputError
from ttt_video_engine.runtime.presets import tiny

Digests = Callable[[Path], dict[str, str]]
DiskUsage = namedtuple("DiskUsage", "total used free")


class OtherTextEncoder(SeededSource):
    """The shared bundle's model with a text encoder of another seed: one component differs, and so little is built.

    Reading the weight `stop` calls `end`.
    """

    stop = ""

    @staticmethod
    def end() -> None:
        raise KeyboardInterrupt

    def text_encoder(self) -> Component[TextEncoder]:
        component = SeededSource(self.model, self.seed + 1).text_encoder()
        weights = dict(component.weights)
        if self.stop:
            weights[self.stop] = replace(weights[self.stop], read=self._ended)
        return Component(component.build, weights, component.origin)

    def _ended(self) -> Tensor:
        self.end()
        raise AssertionError("the run went on")


class Stopped(OtherTextEncoder):
    stop = "t5.encoder.final_layer_norm.weight"


class Killed(Stopped):
    @staticmethod
    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def silent(line: str) -> None:
    pass


def export(source: type[SeededSource], bundle: Path, report: Callable[[str], None] = silent) -> None:
    export_bundle(source(tiny("linear"), seed=0), bundle, ["9s"], "float32", report)


def test_a_stopped_export_leaves_the_bundle_and_goes_on(bundle: Path, digests: Digests) -> None:
    before = digests(bundle)
    with pytest.raises(KeyboardInterrupt):
        export(Stopped, bundle)
    assert digests(bundle) == before
    export(OtherTextEncoder, bundle)
    open_bundle(bundle).verify()
    after = digests(bundle)
    assert {name for name in after if after[name] != before[name]} == {"text_encoder/model.onnx_data", "bundle.json"}
    assert os.listdir(bundle.parent) == ["bundle"]


def test_what_was_finished_is_not_built_again(bundle: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder's weights are written and its graph fails the gate: the next export has the weights already."""
    before = digests(bundle)
    report: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(CheckFailed):
        patch.setitem(gate.TOLERANCES, "float32", 0.0)
        export(OtherTextEncoder, bundle, report.append)
    assert digests(bundle) == before
    size = (bundle / "text_encoder/model.onnx_data").stat().st_size
    stage = bundle.with_name(".bundle.partial")
    (written,) = where(report, WEIGHTS_WRITTEN)
    names(written, "text_encoder", size)
    names(report[-1], stage, "export")
    assert numbers(report[-1])[0] >= size, "how much of it stays"
    assert not (stage / "bundle.json").exists()

    report.clear()
    export(OtherTextEncoder, bundle, report.append)
    names(report[0], RESUMED, stage.name)
    assert not where(report, WEIGHTS_WRITTEN)
    open_bundle(bundle).verify()
    assert os.listdir(bundle.parent) == ["bundle"]


def test_a_stopped_export_of_other_weights_leaves_the_bundle(
    bundle: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export before it, stopped as well, took files of the bundle over: what it left are second names of them."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    def write_and_stop(model: object, path: Path, *rest: object, **options: object) -> None:
        path.write_bytes(b"half a graph")
        raise KeyboardInterrupt

    before = digests(bundle)
    monkeypatch.setattr(Stage, "keep_only", stop)
    monkeypatch.setattr(build, "save", write_and_stop)
    for source in (SeededSource, OtherTextEncoder):
        with pytest.raises(KeyboardInterrupt):
            export(source, bundle)
        assert digests(bundle) == before
    left = bundle.with_name(".bundle.partial")
    assert (left / "text_encoder/model.onnx").read_bytes() == b"half a graph"
    assert (left / "transformer/model.onnx_data").samefile(bundle / "transformer/model.onnx_data")


def test_a_killed_export_leaves_nothing_that_looks_complete(bundle: Path, digests: Digests) -> None:
    before = digests(bundle)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_resume as t; "
        "t.export(t.Killed, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(bundle)]
    died = subprocess.run(command, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert digests(bundle) == before
    stage = bundle.with_name(".bundle.partial")
    assert stage.is_dir() and not (stage / "bundle.json").exists()
    export(OtherTextEncoder, bundle)
    open_bundle(bundle).verify()
    assert os.listdir(bundle.parent) == ["bundle"]


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    with export_lock(tmp_path / "bundle"), refused_with(OutputError, tmp_path / "bundle"):
        export(SeededSource, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_finished_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeededSource, "tokenizer", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(SeededSource, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 10**12, 2_000_000))
    with refused_with(OutputError, tmp_path / "bundle", "text_encoder", "transformer", "vae_decoder", 0.0):
        export(SeededSource, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
