"""Frames into mp4 and back: what a player sees, and what is left when writing fails."""

import os
import sys
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from messages import numbers, refused_with
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.video import VideoFormat, frame_rate, to_frames, write_video

WIDTH, HEIGHT = 96, 64
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)

Frames = NDArray[np.uint8]


def flat(*colours: NDArray[np.uint8]) -> Frames:
    """One frame of each colour, [T, HEIGHT, WIDTH, 3]."""
    return np.broadcast_to(np.stack(colours)[:, None, None], (len(colours), HEIGHT, WIDTH, 3)).copy()


def moving(num_frames: int, width: int = WIDTH, height: int = HEIGHT) -> Frames:
    t, y, x = np.mgrid[:num_frames, :height, :width]
    return np.stack([x + 3 * t, y + t, (x + y) // 2 + 5 * t], axis=-1).astype(np.uint8)


def write(target: Path, *windows: Frames, fps: float | Fraction = 16) -> int:
    return write_video(target, windows, VideoFormat(fps), width=WIDTH, height=HEIGHT)


def read(path: Path) -> Frames:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("fps", [1, 16, 23.976, Fraction(30000, 1001), 240])
def test_a_player_finds_size_rate_and_colours(tmp_path: Path, fps: float | Fraction) -> None:
    assert write(tmp_path / "video.mp4", moving(9), moving(8), moving(8), fps=fps) == 25
    with av.open(tmp_path / "video.mp4") as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", WIDTH, HEIGHT)
        assert stream.average_rate == Fraction(fps).limit_denominator(1001)
        assert stream.frames == 25 == sum(1 for _ in container.decode(stream))
        assert (codec.colorspace, codec.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
        assert (codec.color_primaries, codec.color_trc) == (ColorPrimaries.BT709, ColorTrc.BT709)


def test_colours_and_their_order_survive(tmp_path: Path) -> None:
    write(tmp_path / "video.mp4", flat(*COLOURS[:4]), flat(*COLOURS[4:]))
    decoded = read(tmp_path / "video.mp4")
    assert decoded.shape == (len(COLOURS), HEIGHT, WIDTH, 3)
    assert_allclose(decoded.mean(axis=(1, 2)), COLOURS, atol=3)


def test_pictures_are_the_right_way_round(tmp_path: Path) -> None:
    frames = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, : HEIGHT // 2, : WIDTH // 2] = 255
    write(tmp_path / "video.mp4", frames)
    decoded = read(tmp_path / "video.mp4")[0].astype(int)
    assert decoded[8, 8].min() > 245
    assert max(decoded[8, -8].max(), decoded[-8, 8].max()) < 10


def test_the_index_comes_before_the_frames(tmp_path: Path) -> None:
    write(tmp_path / "video.mp4", moving(4))
    data = (tmp_path / "video.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    # Large enough, and moving enough, for the parts of x264 that differ from run to run with its own defaults.
    frames = moving(24, 480, 320)
    digests = set()
    for index in range(3):
        path = tmp_path / f"{index}.mp4"
        write_video(path, [frames[:9], frames[9:]], VideoFormat(), width=480, height=320)
        digests.add(sha256_of(path))
    assert len(digests) == 1


def test_windows_are_let_go_once_they_are_written(tmp_path: Path) -> None:
    alive: list[weakref.ref[Frames]] = []

    def windows() -> Iterator[Frames]:
        for _ in range(4):
            window = moving(2)
            alive.append(weakref.ref(window))
            yield window
            del window
            assert sum(ref() is not None for ref in alive) <= 1

    assert write_video(tmp_path / "video.mp4", windows(), VideoFormat(), width=WIDTH, height=HEIGHT) == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_windows", [0, 3])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException], num_windows: int) -> None:
    def windows() -> Iterator[Frames]:
        for _ in range(num_windows):
            yield moving(8)
        raise error

    with pytest.raises(error):
        write_video(tmp_path / "video.mp4", windows(), VideoFormat(), width=WIDTH, height=HEIGHT)
    assert list(tmp_path.iterdir()) == []


def test_the_name_appears_only_when_the_video_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "video.mp4"
    target.write_bytes(b"the video before")

    def windows() -> Iterator[Frames]:
        yield moving(8)
        assert target.read_bytes() == b"the video before"

    write_video(target, windows(), VideoFormat(), width=WIDTH, height=HEIGHT)
    assert len(read(target)) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a device of Linux")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    # The kernel's own error: the place beside the target leads to the device that is always full.
    (tmp_path / f".video.mp4.{os.getpid()}.partial.mp4").symlink_to("/dev/full")
    with refused_with(OutputError, tmp_path / "video.mp4"):
        write(tmp_path / "video.mp4", *[moving(16)] * 8)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_no_video(tmp_path: Path) -> None:
    with refused_with(OutputError, tmp_path / "video.mp4"):
        write(tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, 0.5, -16, 240.5, float("nan"), float("inf")])
def test_rates_out_of_range_are_refused(tmp_path: Path, fps: float) -> None:
    with refused_with(ConfigError, "fps", fps, 1, 240):
        write(tmp_path / "video.mp4", moving(1), fps=fps)


@given(fps=st.floats(1, 240))
def test_every_rate_in_range_is_kept_closely(fps: float) -> None:
    assert frame_rate(fps) == pytest.approx(fps, abs=1e-3)


@pytest.mark.parametrize(("width", "height", "name"), [(95, 64, "width"), (96, 63, "height"), (0, 64, "width")])
def test_sizes_that_h264_cannot_hold_are_refused(tmp_path: Path, width: int, height: int, name: str) -> None:
    with refused_with(ConfigError, name, {"width": width, "height": height}[name]):
        write_video(tmp_path / "video.mp4", [], VideoFormat(), width=width, height=height)


@pytest.mark.parametrize("window", [moving(2, 64, 96), moving(2)[0], moving(2).astype(np.float32)])
def test_windows_of_another_kind_are_refused(tmp_path: Path, window: Frames) -> None:
    with refused_with(ConfigError, list(window.shape), window.dtype, "[T, 64, 96, 3]"):
        write(tmp_path / "video.mp4", window)
    assert list(tmp_path.iterdir()) == []


def test_values_are_clamped_and_truncated() -> None:
    values = np.array([-3.0, -1.0, -0.5, 0.0, 0.999, 1.0, 7.0], np.float32)
    decoded = np.broadcast_to(values, (1, 3, 2, 4, 7)).copy()
    frames = to_frames(decoded)
    assert frames.shape == (2, 4, 7, 3)
    assert frames.dtype == np.uint8
    assert_array_equal(frames[1, 3, :, 2], [0, 0, 63, 127, 254, 255, 255])


@given(frames=st_numpy.arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 3, st.just(3))))
def test_every_byte_comes_back(frames: Frames) -> None:
    """Half a step above each byte, in -1 … 1, truncates to that byte, in its own place."""
    decoded = ((frames + 0.5) / 255.0 * 2 - 1).transpose(3, 0, 1, 2)[None].astype(np.float32)
    assert_array_equal(to_frames(decoded), frames)


@pytest.mark.parametrize(("value", "counts"), [(np.nan, [1, 0]), (np.inf, [0, 1]), (-np.inf, [0, 1])])
def test_values_that_are_no_numbers_are_refused(value: float, counts: list[int]) -> None:
    """How many are NaN and how many infinite is said, and of how many."""
    decoded = np.zeros((1, 3, 2, 4, 4), np.float32)
    decoded[0, 1, 1, 2, 3] = value
    with refused_with(OutputError, "NaN", decoded.size) as caught:
        to_frames(decoded)
    assert [number for number in numbers(str(caught.value)) if number in (0, 1)] == counts
