"""`decode`: what it makes of kept latents, that it repeats, and what it refuses before it writes."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from messages import last_refusal, names, refusal
from numpy.typing import NDArray
from PIL import Image

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, OnnxRuntimeRunner
from ttt_video_engine.runtime.bundle import VAE_FIRST, VAE_NEXT, latent_shape, open_bundle
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.frame_range import FrameRange
from ttt_video_engine.runtime.run_record import RECORD, BundleRecord, RunRecord, write_record
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.stages import decode as decode_windows
from ttt_video_engine.runtime.step_state import LATENTS
from ttt_video_engine.runtime.storyboard import Scene
from ttt_video_engine.runtime.tensor_file import save_tensors

Run = Callable[..., tuple[int, str, str]]
Frames = NDArray[np.uint8]

NUM_FRAMES = 49


@pytest.fixture(scope="module")
def kept(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with latents of 3 seconds."""
    bundle = open_bundle(shared_bundle)
    model = bundle.manifest.model
    shape = (1, *latent_shape(model, model.clip_size("3s")))
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    folder = tmp_path_factory.mktemp("kept")
    made_by = BundleRecord(sha256=bundle.sha256, preset="tiny", ttt="linear", dtype="float32")
    scenes, settings = (Scene("A bear bakes bread."),), Settings()
    record = RunRecord(length="3s", scenes=scenes, settings=settings, bundle=made_by, environment={}, versions={})
    write_record(folder, record)
    save_tensors(folder / LATENTS, {"latents": values}, {"run": record.digest})
    np.save(folder / "values.npy", values)
    return folder


@pytest.fixture(scope="module")
def whole(shared_bundle: Path, kept: Path) -> Frames:
    """Every frame that the latents come to."""
    bundle = open_bundle(shared_bundle)
    return np.concatenate(list(decode_windows(bundle, OnnxRuntimeLoader(bundle), np.load(kept / "values.npy"))))


@pytest.fixture
def render(kept: Path, tmp_path: Path) -> Path:
    """The folder, to change at will."""
    folder = tmp_path / "render"
    folder.mkdir()
    for name in (LATENTS, RECORD):
        shutil.copy(kept / name, folder / name)
    return folder


def read(path: Path) -> Frames:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_video_in_the_place_of_another_any_number_of_times(run: Run, shared_bundle: Path, render: Path) -> None:
    video = render / "video.mp4"
    video.write_bytes(b"the video before")
    digests = set()
    for _ in range(2):
        code, out, err = run("decode", render, "--bundle", shared_bundle)
        assert (code, out) == (0, f"video: {video}\n"), err
        digests.add(sha256_of(video))
    assert len(digests) == 1
    assert files_in(render) == [LATENTS, RECORD, "video.mp4"]
    with av.open(video) as container:
        stream = container.streams.video[0]
        assert isinstance(stream, VideoStream)
        assert (stream.codec_context.name, stream.frames, stream.average_rate) == ("h264", NUM_FRAMES, Fraction(16))


def test_every_option_of_the_mp4_arrives(run: Run, shared_bundle: Path, render: Path, tmp_path: Path) -> None:
    fine, coarse = tmp_path / "out/fine.mp4", tmp_path / "out/coarse.mp4"
    common = ("decode", render, "--bundle", shared_bundle, "--codec", "hevc", "--fps", 24)
    assert run(*common, "--output", fine, "--crf", 5)[:2] == (0, f"video: {fine}\n")
    assert run(*common, "--output", coarse, "--crf", 50)[0] == 0
    assert fine.stat().st_size > 2 * coarse.stat().st_size
    with av.open(fine) as container:
        stream = container.streams.video[0]
        assert isinstance(stream, VideoStream)
        assert (stream.codec_context.name, stream.frames, stream.average_rate) == ("hevc", NUM_FRAMES, Fraction(24))
    assert files_in(render) == [LATENTS, RECORD]


def test_some_frames_are_those_of_the_whole_video(run: Run, shared_bundle: Path, render: Path, whole: Frames) -> None:
    code, out, err = run("decode", render, "--bundle", shared_bundle, "--frames", "12:20", "--crf", 1)
    assert (code, out) == (0, f"video: {render / 'video-12-20-crf1.mp4'}\n"), err
    assert err.splitlines()[-1].endswith("3/3"), "frames 0 … 8, 9 … 16 and 17 … 24"
    found = read(render / "video-12-20-crf1.mp4").astype(float)
    assert len(found) == 8
    for index, frame in enumerate(found):
        distances = [np.abs(frame - other).mean() for other in whole]
        assert int(np.argmin(distances)) == 12 + index
    assert files_in(render) == [LATENTS, RECORD, "video-12-20-crf1.mp4"]


def test_png_files_hold_every_byte(run: Run, shared_bundle: Path, render: Path, whole: Frames, tmp_path: Path) -> None:
    folder = tmp_path / "new/frames"
    code, out, err = run("decode", render, "--bundle", shared_bundle, "--frames", "-5:", "--png-sequence", folder)
    assert (code, out) == (0, f"frames: {folder}\n"), err
    assert files_in(folder) == [f"{number:06}.png" for number in range(44, 49)]
    for number in range(44, 49):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{number:06}.png")), whole[number])
    message = refusal(run("decode", render, "--bundle", shared_bundle, "--png-sequence", folder))
    names(message, folder)
    assert files_in(render) == [LATENTS, RECORD]


def test_only_what_is_wanted_is_decoded(shared_bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows before the first frame are, those after the last are not, and only the decoder is loaded."""
    bundle, loaded, runs = open_bundle(shared_bundle), list[str](), list[str]()
    real = OnnxRuntimeLoader(bundle)

    class Watched:
        environment = real.environment

        def __call__(self, graph: str) -> OnnxRuntimeRunner:
            runner = real(graph)
            run = runner.run

            def counted(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
                runs.append(graph)
                return run(inputs)

            loaded.append(graph)
            monkeypatch.setattr(runner, "run", counted)
            return runner

    wanted = FrameRange.parse("20:26", NUM_FRAMES)
    windows = decode_windows(bundle, Watched(), np.load(kept / "values.npy"))
    assert [len(window) for window in wanted.select(windows)] == [5, 1]
    assert loaded == [VAE_FIRST, VAE_NEXT]
    model = bundle.manifest.model
    assert len(runs) == 4 == wanted.num_windows(model, model.clip_size("3s"))


@pytest.mark.parametrize("num_frames", [49, 145])
def test_as_many_windows_are_counted_as_are_taken(shared_bundle: Path, num_frames: int) -> None:
    model = open_bundle(shared_bundle).manifest.model
    size = model.clip_size({49: "3s", 145: "9s"}[num_frames])
    for stop in range(1, num_frames + 1):
        taken = 0

        def windows() -> Iterator[Frames]:
            nonlocal taken
            for length in (9, *[8] * ((num_frames - 9) // 8)):
                taken += 1
                yield np.zeros((length, 1, 1, 3), np.uint8)

        wanted = FrameRange(stop - 1, stop)
        assert sum(map(len, wanted.select(windows()))) == 1
        assert taken == wanted.num_windows(model, size)


@pytest.mark.parametrize("text", [":", "0:48", ":48", "3:", "-48:", ":-1", "-9999:9999", "48:49"])
def test_a_range_is_a_slice(text: str) -> None:
    frames = np.arange(NUM_FRAMES, dtype=np.uint8)[:, None, None, None]
    start, stop = (int(end) if end else None for end in text.split(":"))
    wanted = FrameRange.parse(text, NUM_FRAMES)
    found = np.concatenate(list(wanted.select(iter([frames[:9], frames[9:30], frames[30:]]))))
    np.testing.assert_array_equal(found, frames[start:stop])


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3", "1.5:2", "5:5", "9:3", "49:", ":0", "٣:٥", "1 : 2"])
def test_what_is_no_range_or_holds_no_frame_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FrameRange.parse(text, NUM_FRAMES)
    names(str(caught.value), "--frames", repr(text))


def test_another_bundle_is_refused(run: Run, bundle: Path, render: Path) -> None:
    made_with = sha256_of(bundle / "bundle.json")
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    manifest["defaults"]["fps"] = 24
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    message = refusal(run("decode", render, "--bundle", bundle))
    names(message, render, made_with, bundle, sha256_of(bundle / "bundle.json"))
    assert files_in(render) == [LATENTS, RECORD]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--crf", 99), ("crf", 99, 51)),
        (("--fps", 0), ("fps", 0, 240)),
        (("--codec", "av1", "--crf", 64), ("crf", 64, 63)),
        (("--frames", "60:70"), ("--frames", "'60:70'", NUM_FRAMES)),
        (("--output", "video.mkv"), ("--output", ".mp4")),
        (("--png-sequence", "frames", "--crf", 3), ("--png-sequence", "--crf")),
        (("--png-sequence", "frames", "--output", "x.mp4"), ("--png-sequence", "--output")),
        (("--engine", "tensorrt", "--provider", "cpu"), ("--provider", "--engine onnxruntime")),
        (("--gpu-memory", "2GB"), ("--gpu-memory", "--engine tensorrt")),
        (("--codec", "vp9"), ("vp9",)),
    ],
)
def test_wrong_options_are_refused(
    run: Run,
    shared_bundle: Path,
    render: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    values: tuple[object, ...],
) -> None:
    monkeypatch.chdir(render)
    names(refusal(run("decode", render, "--bundle", shared_bundle, *options)), *values)
    assert files_in(render) == [LATENTS, RECORD]


def test_a_folder_without_latents_is_refused(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    names(refusal(run("decode", tmp_path / "none", "--bundle", shared_bundle)), tmp_path / "none", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_render_without_latents_is_refused(run: Run, shared_bundle: Path, render: Path) -> None:
    (render / LATENTS).unlink()
    names(refusal(run("decode", render, "--bundle", shared_bundle)), render / LATENTS, "--keep-latents")
    assert files_in(render) == [RECORD]


def test_a_decode_that_fails_leaves_the_video_before(
    run: Run, shared_bundle: Path, render: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = render / "video.mp4"
    video.write_bytes(b"the video before")
    monkeypatch.setattr("ttt_video_engine.runtime.stages.VAE_NEXT", "no-such-graph")
    code, out, err = run("decode", render, "--bundle", shared_bundle)
    assert (code, out) == (2, "")
    names(last_refusal(err), "no-such-graph")
    assert video.read_bytes() == b"the video before"
    assert files_in(render) == [LATENTS, RECORD, "video.mp4"]
