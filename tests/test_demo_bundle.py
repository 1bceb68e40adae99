"""`sample` and `decode` without `--bundle`."""

from pathlib import Path

import pytest
from conftest import Run
from messages import names, refusal
from stand_in import DONE, files_in, storyboard_file

from ttt_video_engine.runtime import demo_bundle


@pytest.fixture
def storyboard(tmp_path: Path) -> Path:
    return storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])


def test_the_bundle_of_the_installation_is_the_default(
    monkeypatch: pytest.MonkeyPatch, run: Run, shared_bundle: Path, storyboard: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_bundle, "DEMO_BUNDLE", shared_bundle)
    code, _, err = run("sample", storyboard, "--output-dir", tmp_path / "out", "--num-steps", 1)
    assert code == 0, err
    assert files_in(tmp_path / "out/bear") == DONE
    code, _, err = run("decode", tmp_path / "out/bear", "--frames", "0:2", "--output", tmp_path / "two.mp4")
    assert code == 0 and (tmp_path / "two.mp4").is_file(), err


def test_an_installation_without_one_says_so(
    monkeypatch: pytest.MonkeyPatch, run: Run, storyboard: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_bundle, "DEMO_BUNDLE", tmp_path / "none")
    names(refusal(run("sample", storyboard, "--output-dir", tmp_path / "out")), "--bundle")
    names(refusal(run("decode", tmp_path)), "--bundle")
    assert not (tmp_path / "out").exists()
