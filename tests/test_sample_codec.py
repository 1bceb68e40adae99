"""`sample --codec` and `--crf`: what is recorded, and that another mp4 of finished latents needs no new render."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
from messages import names, refusal
from stand_in import DONE, StandInLoader, board, files_in, products, render, storyboard_file

from ttt_video_engine.runtime import video
from ttt_video_engine.runtime.bundle import Bundle, open_bundle
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.jobs import prepare_jobs, space_needed
from ttt_video_engine.runtime.run_record import RECORD
from ttt_video_engine.runtime.settings import Settings

Run = Callable[..., tuple[int, str, str]]
Sample = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sample(run: Run, shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """`ttt-video sample` of one video in 2 steps, with the stand-in; `decode` has it too."""

    def loader(bundle: Bundle, *_: object, **__: object) -> StandInLoader:
        return StandInLoader(bundle)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # embeddings of the stand-in, not of the real encoder
    monkeypatch.setattr("ttt_video_engine.commands.replica.make_loader", loader)
    monkeypatch.setattr("ttt_video_engine.commands.decode.make_loader", loader)
    boards = storyboard_file(tmp_path / "bear.json", [{"text": "A bear."}])

    def run_sample(*options: object, bundle: Path = shared_bundle) -> tuple[int, str, str]:
        fixed = ("--bundle", bundle, "--output-dir", tmp_path / "out", "--num-steps", 2)
        return run("sample", boards, *fixed, *options)

    return run_sample


def settings_in(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_bytes())["settings"]
    return settings


def codec_of(path: Path) -> str:
    with av.open(path) as container:
        return container.streams.video[0].codec_context.name


def test_codec_and_crf_arrive_and_are_recorded(sample: Sample, tmp_path: Path) -> None:
    folder = tmp_path / "out/bear"
    assert sample("--codec", "hevc", "--crf", 45)[0] == 0
    assert codec_of(folder / "video.mp4") == "hevc"
    for name in (RECORD, "video.json"):
        assert (settings_in(folder / name)["codec"], settings_in(folder / name)["crf"]) == ("hevc", 45)
    coarse = (folder / "video.mp4").stat().st_size
    assert sample("--codec", "hevc", "--crf", 5, "--overwrite")[0] == 0
    assert (folder / "video.mp4").stat().st_size > coarse


def test_the_default_quality_is_recorded_as_the_number_it_is(sample: Sample, tmp_path: Path) -> None:
    assert sample()[0] == 0
    settings = settings_in(tmp_path / "out/bear/video.json")
    assert (settings["codec"], settings["crf"]) == ("h264", 18)
    assert sample("--codec", "h264", "--crf", 18)[:2] == (0, ""), "the same video, which is done"


def test_another_codec_of_a_finished_video_is_a_decode(
    sample: Sample, run: Run, shared_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out/bear"
    assert sample()[0] == 0
    before = products(folder)
    message = refusal(sample("--codec", "hevc", "--fps", 24))
    names(message, folder, "settings.fps", 16, 24, "settings.codec", "h264 → hevc")
    assert products(folder) == before and files_in(folder) == DONE

    command = shlex.split(message.partition("run: ")[2])
    assert command[0] == "ttt-video"
    code, out, err = run(*[str(shared_bundle) if word == "BUNDLE" else word for word in command[1:]])
    assert code == 0, err
    assert out == f"video: {folder / 'video-24fps-hevc.mp4'}\n"
    assert codec_of(folder / "video-24fps-hevc.mp4") == "hevc"
    assert products(folder) == before, "video.json describes video.mp4"


@pytest.mark.parametrize(("options", "then_decode"), [(("--crf", 30), True), (("--crf", 30, "--seed", 1), False)])
def test_a_begun_video_is_finished_with_its_own_codec_first(
    sample: Sample, tmp_path: Path, options: tuple[object, ...], then_decode: bool
) -> None:
    folder = tmp_path / "out/bear"
    assert sample("--stop-after", 1)[0] == 0
    message = refusal(sample(*options))
    names(message, folder, "settings.crf", "18 → 30")
    assert ("ttt-video decode" in message) == then_decode


def test_without_latents_only_a_new_render_helps(sample: Sample) -> None:
    assert sample("--no-keep-latents")[0] == 0
    message = refusal(sample("--crf", 30))
    names(message, "18 → 30", "--overwrite")
    assert "ttt-video decode" not in message


def test_decode_repeats_the_mp4_that_sample_wrote(
    sample: Sample, run: Run, shared_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out/bear"
    assert sample("--codec", "av1", "--crf", 50)[0] == 0
    decode = ("decode", folder, "--bundle", shared_bundle)
    assert run(*decode)[:2] == (0, f"video: {folder / 'video.mp4'}\n")
    assert sha256_of(folder / "video.mp4") == json.loads((folder / "video.json").read_bytes())["sha256"]
    for options, name in (
        (("--codec", "h264"), "video-h264.mp4"),
        (("--crf", 60, "--frames", "0:9"), "video-0-9-crf60.mp4"),
    ):
        assert run(*decode, *options)[:2] == (0, f"video: {folder / name}\n")
        assert codec_of(folder / name) == ("h264" if "h264" in options else "libdav1d")


def test_a_crf_of_the_bundle_is_that_of_its_codec(sample: Sample, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    manifest["defaults"] |= {"codec": "hevc", "crf": 44}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    for options, expected in (((), ("hevc", 44)), (("--codec", "h264"), ("h264", 18)), (("--crf", 9), ("hevc", 9))):
        assert sample(*options, "--overwrite", bundle=bundle)[0] == 0
        settings = settings_in(tmp_path / "out/bear/video.json")
        assert (settings["codec"], settings["crf"]) == expected


def test_a_render_begun_before_these_options_is_resumed(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "whole")
    render(shared_bundle, tmp_path / "old", stop_after=2)
    path = tmp_path / "old/bear" / RECORD
    record = json.loads(path.read_bytes())
    del record["settings"]["codec"], record["settings"]["crf"]
    path.write_text(json.dumps(record))
    render(shared_bundle, tmp_path / "old")
    assert json.loads((tmp_path / "old/bear/video.json").read_bytes())["resumed"] == [2]
    assert products(tmp_path / "old/bear") == products(tmp_path / "whole/bear")


def test_latents_do_not_depend_on_the_codec(shared_bundle: Path, tmp_path: Path) -> None:
    render(shared_bundle, tmp_path / "one")
    render(shared_bundle, tmp_path / "two", settings=Settings(num_steps=4, codec="hevc", crf=40))
    one, two = products(tmp_path / "one/bear"), products(tmp_path / "two/bear")
    assert one["latents.safetensors"] == two["latents.safetensors"]
    assert one["video.mp4"] != two["video.mp4"]


@pytest.mark.parametrize("settings", [Settings(crf=52), Settings(codec="av1", crf=64)])
def test_a_crf_that_the_codec_lacks_is_refused_before_the_first_step(
    shared_bundle: Path, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(ConfigError) as caught:
        render(shared_bundle, tmp_path, settings=settings)
    names(str(caught.value), "crf", settings.crf, settings.codec)
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_cannot_be_opened_is_refused_before_the_first_step(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(video._ENCODERS["av1"], options={"preset": "99"})
    monkeypatch.setitem(video._ENCODERS, "av1", broken)
    with pytest.raises(ConfigError) as caught:
        render(shared_bundle, tmp_path, settings=Settings(codec="av1"))
    names(str(caught.value), "av1")
    assert list(tmp_path.iterdir()) == []


def test_a_finer_video_needs_more_space(shared_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(shared_bundle)

    def needed(settings: Settings) -> int:
        jobs = prepare_jobs(bundle, [board()], settings, tmp_path, environment={})
        return space_needed(bundle, jobs)["videos"]

    assert needed(Settings(crf=12)) == 2 * needed(Settings()) == 2 * needed(Settings(crf=40))
    model = bundle.manifest.model
    assert needed(Settings(crf=1)) <= 49 * model.width * model.height * 12 / 8, "that of uncompressed frames"
