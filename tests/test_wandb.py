"""`sample --wandb`: what it logs, read back from its offline files, and that nothing of it can stop a render."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from messages import WARNING, holds, names, refusal, where
from stand_in import StandInLoader, files_in, products, render, storyboard_file
from wandb_files import offline_runs

from ttt_video_engine.commands.wandb_log import section
from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.events import Event, StepDone
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.schedule import guidance_scales, make_schedule
from ttt_video_engine.runtime.settings import Settings

Run = Callable[..., tuple[int, str, str]]
NUM_STEPS = 4


@pytest.fixture
def sample(run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`ttt-video sample` in 4 steps with the stand-in, offline, with all that wandb writes in `tmp_path`."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def loader(bundle: Bundle, *_: object, **__: object) -> StandInLoader:
        return StandInLoader(bundle)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # embeddings of the stand-in, not of the real encoder
    monkeypatch.setattr("ttt_video_engine.commands.replica.make_loader", loader)

    def run_sample(*options: object, videos: tuple[str, ...] = ("bear",)) -> tuple[int, str, str]:
        boards = [storyboard_file(tmp_path / f"{name}.json", [{"text": f"A {name}."}]) for name in videos]
        fixed = ("--bundle", shared_bundle, "--output-dir", tmp_path / "out", "--num-steps", NUM_STEPS)
        return run("sample", *boards, *fixed, *options)

    yield run_sample
    monkeypatch.undo()
    wandb.teardown()  # it keeps the environment of its first run


def test_what_is_logged_is_what_was_rendered(sample: Run, shared_bundle: Path, tmp_path: Path) -> None:
    options = ("--wandb", "films", "--preview-every", 2, "--guidance-scale", 5, "--seed", 9)
    code, out, err = sample(*options, videos=("bear", "a.fox"))
    assert code == 0, err
    assert out.splitlines() == [f"video: {tmp_path / 'out' / name / 'video.mp4'}" for name in ("bear", "a.fox")]
    (logged,) = offline_runs(tmp_path)
    assert (logged.project, logged.exit_code) == ("films", 0)

    sidecar = json.loads((tmp_path / "out/bear/video.json").read_bytes())
    for name, value in sidecar["settings"].items():
        assert logged.config[name] == value
    assert logged.config["bundle"] == sidecar["bundle"]
    assert logged.config["bear"]["length"] == "3s"
    assert [scene["text"] for scene in logged.config["bear"]["scenes"]] == ["A bear."]

    settings = Settings(num_steps=NUM_STEPS, guidance_scale=5, seed=9)
    steps: list[StepDone] = []

    def keep(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event)

    render(shared_bundle, tmp_path / "again", settings=settings, on_event=keep)
    diffusion = open_bundle(shared_bundle).manifest.model.diffusion
    scales = guidance_scales("dynamic", 5, make_schedule(diffusion, NUM_STEPS).timesteps)
    assert logged.series("bear/step")[:2] == [1, 2]
    assert logged.series("bear/guidance") == pytest.approx(list(scales))
    for key, arrays in (
        ("latents_norm", [step.latents for step in steps]),
        ("x0_norm", [step.denoised for step in steps]),
        ("velocity_norm", [step.velocity for step in steps]),
    ):
        expected = [float(np.sqrt((array.astype(float) ** 2).sum())) for array in arrays]
        assert logged.series(f"bear/{key}") == pytest.approx(expected, rel=1e-4)
    assert len(set(logged.series("bear/velocity_norm"))) == NUM_STEPS
    assert sum(logged.series("bear/step_seconds")) == pytest.approx(sidecar["seconds"]["denoise"], rel=0.5)
    for stage, seconds in sidecar["seconds"].items():
        assert logged.series(f"bear/{stage}_seconds") == [seconds]

    for name, key in (("bear", "bear"), ("a.fox", section("a.fox"))):
        folder = tmp_path / "out" / name
        assert sha256_of(logged.file(f"{key}/video")) == sha256_of(folder / "video.mp4")
        for image, file in (("contact_sheet", "contact.png"), ("preview", "preview.png")):
            assert sha256_of(logged.file(f"{key}/{image}")) == sha256_of(folder / file)
        assert len(logged.series(f"{key}/guidance")) == NUM_STEPS


def test_a_resumed_render_logs_the_steps_that_it_does(sample: Run, tmp_path: Path) -> None:
    assert sample("--wandb", "films", "--stop-after", 1)[0] == 0
    assert sample("--wandb", "films")[0] == 0
    assert sample("--wandb", "films")[0] == 0, "it is done, so nothing is logged"
    first, second = sorted(offline_runs(tmp_path), key=lambda one: len(one.series("bear/guidance")))
    assert len(first.series("bear/guidance")) == 1
    assert [row["bear/step"] for row in second.rows if "bear/guidance" in row] == [2, 3, 4]
    assert first.file("bear/preview").exists() and second.file("bear/video").exists()


def test_a_video_that_fails_is_logged(sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(graph: str, number: int, outputs: Any) -> Any:
        return {"velocity": outputs["velocity"] * np.nan} if graph.startswith("transformer") else outputs

    def loader(bundle: Bundle, *_: object, **__: object) -> StandInLoader:
        return StandInLoader(bundle, spoil)

    monkeypatch.setattr("ttt_video_engine.commands.replica.make_loader", loader)
    assert sample("--wandb", "films")[0] == 1
    (logged,) = offline_runs(tmp_path)
    assert logged.exit_code == 1
    failure = json.loads((tmp_path / "out/bear/error.json").read_bytes())["message"]
    names(logged.summary["bear/failure"], "bear", failure)


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_what_fails_in_wandb_is_one_warning(
    sample: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Of every call, as without a network or an account."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no\nnetwork")

    if broken == "init":
        monkeypatch.setattr(wandb, broken, fail)
    else:
        monkeypatch.setattr(wandb.Run, broken, fail)
    code, out, err = sample("--wandb", "films")
    assert (code, out) == (0, f"video: {tmp_path / 'out/bear/video.mp4'}\n")
    (warning,) = [line for line in err.splitlines() if line.startswith(WARNING)]
    names(warning, "wandb")
    assert holds(warning, "no\\nnetwork")
    render(shared_bundle, tmp_path / "alone", settings=Settings(num_steps=NUM_STEPS))
    assert products(tmp_path / "out/bear") == products(tmp_path / "alone/bear")


def test_a_package_that_is_missing_is_refused_before_anything_is_written(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    names(refusal(sample("--wandb", "films")), "pip install 'ttt-video-engine[wandb]'")
    assert files_in(tmp_path) == ["bear.json"]


def test_a_folder_named_wandb_is_not_the_package(sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here/wandb").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    names(refusal(sample("--wandb", "films")), "pip install 'ttt-video-engine[wandb]'")


def test_without_the_option_it_is_not_even_imported(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    code, _, err = sample()
    assert code == 0, err
    assert where(err.splitlines(), "wandb") == [] == offline_runs(tmp_path)


def test_sections_are_plain_and_different() -> None:
    assert section("bear-001") == "bear-001"
    found = [section(name) for name in ("a.b", "a_b", "a/b", "a*b", "a b")]
    assert len(set(found)) == 5
    assert not any(character in name for name in found for character in "./* ")
