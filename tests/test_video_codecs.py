"""Each codec of an mp4: what a player finds, that the bytes repeat, and that the video can be watched as it grows."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace
from av.video.stream import VideoStream
from messages import refused_with
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.settings import Codec
from ttt_video_engine.runtime.video import VideoFormat, check_encoder, partial_path, write_video

WIDTH, HEIGHT = 96, 64
CODECS: tuple[Codec, ...] = get_args(Codec)
TAGS = {"h264": "avc1", "hevc": "hvc1", "av1": "av01"}
LAG = {"h264": 8, "hevc": 31, "av1": 24}
"""Frames that an encoder holds back at most."""

Frames = NDArray[np.uint8]


def moving(num_frames: int, width: int = WIDTH, height: int = HEIGHT) -> Frames:
    t, y, x = np.mgrid[:num_frames, :height, :width]
    waves = np.stack([np.sin((x + 3 * t) / 20), np.sin((y + t) / 13), np.sin((x + y - t) / 30)], axis=-1)
    return (127.5 + 100 * waves).astype(np.uint8)


def windows_of(frames: Frames) -> list[Frames]:
    """Nine frames, then eight at a time, as the decoder gives them."""
    return [frames[:9], *(frames[start : start + 8] for start in range(9, len(frames), 8))]


def write(target: Path, frames: Frames, video_format: VideoFormat) -> int:
    height, width = frames.shape[1:3]
    return write_video(target, windows_of(frames), video_format, width=width, height=height)


def read(path: Path) -> Frames:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("codec", CODECS)
def test_a_player_finds_every_frame_at_its_time(tmp_path: Path, codec: Codec) -> None:
    frames = moving(49)
    assert write(tmp_path / "video.mp4", frames, VideoFormat(24, codec=codec)) == 49
    with av.open(tmp_path / "video.mp4") as container:
        (stream,) = container.streams
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        assert (context.codec_tag, context.pix_fmt, context.width, context.height) == (
            TAGS[codec],
            "yuv420p",
            WIDTH,
            HEIGHT,
        )
        assert (context.colorspace, context.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
        assert context.color_primaries == ColorPrimaries.BT709
        assert (stream.frames, stream.average_rate, stream.start_time) == (49, Fraction(24), 0)
        decoded = list(container.decode(stream))
        assert [frame.time for frame in decoded] == pytest.approx([index / 24 for index in range(49)])
        error = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(float) - frames
    assert np.sqrt((error**2).mean()) < 5
    data = (tmp_path / "video.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat") and b"moof" not in data
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, codec: Codec) -> None:
    """Large enough for encoders to share the work among threads."""
    frames = moving(25, 480, 320)
    digests = set()
    for index in range(3):
        write(tmp_path / f"{index}.mp4", frames, VideoFormat(codec=codec))
        digests.add(sha256_of(tmp_path / f"{index}.mp4"))
    assert len(digests) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="a process is held to one processor as Linux does it")
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_do_not_depend_on_the_number_of_processors(tmp_path: Path, codec: Codec) -> None:
    np.save(tmp_path / "frames.npy", moving(17, 480, 320))
    program = (
        "import os, sys, numpy as np; from pathlib import Path; from ttt_video_engine.runtime.video import *\n"
        "target, codec = Path(sys.argv[1]), sys.argv[2]\n"
        "if target.name == 'one.mp4': os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "frames = np.load(target.with_name('frames.npy'))\n"
        "write_video(target, [frames], VideoFormat(codec=codec), width=480, height=320)\n"
    )
    for name in ("one.mp4", "all.mp4"):
        ended = subprocess.run(
            [sys.executable, "-c", program, tmp_path / name, codec], capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), "encoders are not to print"
    assert sha256_of(tmp_path / "one.mp4") == sha256_of(tmp_path / "all.mp4")


@pytest.mark.parametrize("codec", CODECS)
def test_a_video_can_be_watched_as_it_grows(tmp_path: Path, codec: Codec) -> None:
    """From the first window on there is a file that opens, with all frames but those that the encoder holds back."""
    target, frames = tmp_path / "video.mp4", moving(57)
    given, shown = 0, list[int]()

    def windows() -> Iterator[Frames]:
        nonlocal given
        for window in windows_of(frames):
            yield window
            given += len(window)
            assert not target.exists()
            with av.open(partial_path(target)) as container:
                assert container.streams.video[0].codec_context.width == WIDTH
                seen = list(container.decode(video=0))
            shown.append(len(seen))
            assert len(seen) >= given - LAG[codec]
            for frame in seen:  # of the last few, those between may be missing
                index = round(((frame.time or 0) - (seen[0].time or 0)) * 16)
                error = frame.to_ndarray(format="rgb24").astype(float) - frames[index]
                assert np.sqrt((error**2).mean()) < 5

    write_video(target, windows(), VideoFormat(codec=codec), width=WIDTH, height=HEIGHT)
    assert shown == sorted(shown) and len(shown) == 7 and shown[-1] >= 57 - LAG[codec]
    assert shown[0] > 0 or codec != "h264"
    assert len(read(target)) == 57
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    target, frames = tmp_path / "video.mp4", moving(9)
    write(target, frames, VideoFormat())
    clean = target.read_bytes()
    partial_path(target).write_bytes(clean * 100)

    def windows() -> Iterator[Frames]:
        yield frames
        assert partial_path(target).stat().st_size < 100 * len(clean)

    write_video(target, windows(), VideoFormat(), width=WIDTH, height=HEIGHT)
    assert target.read_bytes() == clean
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_two_processes_do_not_write_one_video(tmp_path: Path) -> None:
    target = tmp_path / "video.mp4"
    with partial_path(target).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"of the other")
        other.flush()
        with refused_with(OutputError, partial_path(target)):
            write(target, moving(9), VideoFormat())
        assert partial_path(target).read_bytes() == b"of the other"
    assert not target.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
def test_a_disk_that_is_full_as_the_video_grows_is_named(tmp_path: Path) -> None:
    partial_path(tmp_path / "video.mp4").symlink_to("/dev/full")
    with refused_with(OutputError, tmp_path / "video.mp4"):
        write(tmp_path / "video.mp4", moving(49), VideoFormat())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_lower_crf_is_nearer_and_larger(tmp_path: Path, codec: Codec) -> None:
    frames = moving(9)
    sizes, errors = [], []
    for crf in (10, 45):
        path = tmp_path / f"{crf}.mp4"
        write(path, frames, VideoFormat(crf=crf, codec=codec))
        sizes.append(path.stat().st_size)
        errors.append(np.abs(read(path).astype(int) - frames).mean())
    assert sizes[0] > sizes[1] and errors[0] < errors[1]


@pytest.mark.parametrize(("codec", "crf", "top"), [("h264", 0, 51), ("hevc", 52, 51), ("av1", 64, 63), ("av1", -1, 63)])
def test_a_crf_that_a_codec_lacks_is_refused(codec: Codec, crf: int, top: int) -> None:
    with refused_with(ConfigError, "crf", crf, top, codec):
        VideoFormat(crf=crf, codec=codec)


@pytest.mark.parametrize("codec", ["hevc", "av1"])
def test_a_size_that_a_codec_lacks_is_refused(tmp_path: Path, codec: Codec) -> None:
    with refused_with(ConfigError, codec, 2):
        write(tmp_path / "video.mp4", moving(1, 2, 2), VideoFormat(codec=codec))
    assert list(tmp_path.iterdir()) == []
    with refused_with(ConfigError, codec, 2):
        check_encoder(VideoFormat(codec=codec), width=2, height=2)


@pytest.mark.parametrize("codec", CODECS)
def test_a_size_that_a_codec_has_is_accepted(codec: Codec) -> None:
    check_encoder(VideoFormat(30, 5, codec), width=WIDTH, height=HEIGHT)
    with refused_with(ConfigError, "height", HEIGHT - 1):
        check_encoder(VideoFormat(codec=codec), width=WIDTH, height=HEIGHT - 1)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="the platform has no schedulers to choose from")
def test_an_encoder_leaves_the_scheduling_of_the_thread(tmp_path: Path) -> None:
    """For root, SVT-AV1 would make it a real-time thread."""
    before = os.sched_getscheduler(0)
    frames = np.zeros((9, 64, 96, 3), dtype=np.uint8)
    check_encoder(VideoFormat(16, None, "av1"), width=96, height=64)
    write_video(tmp_path / "video.mp4", [frames], VideoFormat(16, None, "av1"), width=96, height=64)
    assert os.sched_getscheduler(0) == before
