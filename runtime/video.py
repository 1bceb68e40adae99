"""Decoded frames into an mp4, a few at a time, which a player can watch as it grows.

The frames go to `video.partial.mp4` beside `video.mp4`, in fragments that each can be played without what follows. When
the last one is there, the packets move unchanged to an ordinary file with its index in front, which takes the name.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from msgspec.structs import replace
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import atomic_write
from ttt_video_engine.runtime.settings import Codec, Settings

MIN_FPS, MAX_FPS = 1, 240


@dataclass(frozen=True)
class _Encoder:
    """An encoder of FFmpeg, the CRF it has by default and the largest it takes, its other options, its tag in mp4."""

    name: str
    crf: int
    max_crf: int
    options: dict[str, str]
    tag: str


# The same frames must give the same bytes, so that nothing may depend on the number of processors. At these CRFs the
# codecs come within 1.3 dB of one another on the same frames; HEVC and AV1 take some 20 to 50 % of the bytes of H.264.
#
# x264 is transparent at CRF 18. It writes other bytes for another number of threads; and its AVX-512 code for
# macroblock trees gives others from run to run, even with one thread. Without these trees, looking ahead only chooses
# B-frames: a fixed pattern takes 1 % more bytes and shows a frame 8 frames after it came, not 12.
#
# x265: more frame threads than one, and slices in its look-ahead, would follow the number of processors. Apple's
# players want hvc1, the default is hev1.
#
# SVT-AV1 has a scale of its own, up to 63. It gives the same bytes for every `lp`, which is its number of threads;
# groups of 8 frames, not 32, show frames sooner.
_ENCODERS: dict[Codec, _Encoder] = {
    "h264": _Encoder(
        "libx264",
        18,
        51,
        {"preset": "medium", "x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0:b-adapt=0"},
        "avc1",
    ),
    "hevc": _Encoder(
        "libx265",
        20,
        51,
        {"preset": "medium", "x265-params": "log-level=error:info=0:pools=4:frame-threads=1:lookahead-slices=0"},
        "hvc1",
    ),
    "av1": _Encoder(
        "libsvtav1", 30, 63, {"preset": "8", "svtav1-params": "lp=2:hierarchical-levels=3:lookahead=0"}, "av01"
    ),
}
_THREADS = 4  # of x264
_BITS_PER_PIXEL = 0.5
"""Far more than the default CRFs make of what is no noise."""
# A header without frames, then each frame with its own index, in the file as soon as it is encoded.
_GROWING = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
# The index goes in front of the frames, so that a player can start before it has the whole file.
_FINISHED = {"movflags": "+faststart"}


@dataclass(frozen=True)
class VideoFormat:
    """Frames per second, quality (a lower CRF is better and larger; None is the codec's default) and codec of an mp4.

    Raises ConfigError for fps outside 1 … 240 or a CRF that the codec does not have.
    """

    fps: float | Fraction = 16
    crf: int | None = None
    codec: Codec = "h264"

    def __post_init__(self) -> None:
        frame_rate(self.fps)
        # 0 is left out: it is lossless in H.264, in a profile that browsers do not play, and means "unset" in AV1.
        top = _ENCODERS[self.codec].max_crf
        if self.crf is not None and not 1 <= self.crf <= top:
            raise ConfigError(f"crf is {self.crf!r}: must lie in 1 … {top} for {self.codec}")


def with_crf(settings: Settings) -> Settings:
    """Settings that state the CRF of their mp4, where they left it to the codec."""
    return settings if settings.crf is not None else replace(settings, crf=_ENCODERS[settings.codec].crf)


def bits_per_pixel(settings: Settings) -> float:
    """An upper estimate of the mp4's size. Some 6 of CRF double it; uncompressed frames take 12 bits."""
    finer = _ENCODERS[settings.codec].crf - (with_crf(settings).crf or 0)
    return min(12.0, _BITS_PER_PIXEL * 2 ** (max(0, finer) / 6))


def partial_path(target: Path) -> Path:
    """Where a video is while it grows: `video.partial.mp4` for `video.mp4`."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")


def write_video(
    target: Path, windows: Iterable[NDArray[np.uint8]], video_format: VideoFormat, *, width: int, height: int
) -> int:
    """Encodes windows of RGB frames, uint8 [T, height, width, 3], and returns the number of frames written.

    One window is held at a time. Until the last one, what was encoded can be played from `partial_path(target)`, which
    goes when this ends, however it ends. `target` appears when it is complete, replacing what was there; the same
    frames give the same bytes. Raises ConfigError for a size that the codec cannot hold, or a window of another size;
    OutputError where the disk is full, another process writes the same video, or no frames came.
    """
    _check_size(width, height)
    with atomic_write(target) as finished, _growing_file(target) as growing:
        num_frames = _encode(growing, windows, video_format, width, height)
        if num_frames == 0:
            raise OutputError(f"{target}: there are no frames to write; decode at least one")
        _copy_packets(growing, finished)
    return num_frames


def check_encoder(video_format: VideoFormat, *, width: int, height: int) -> None:
    """Raises ConfigError, as `write_video` does, for a size that the codec cannot hold."""
    _check_size(width, height)
    encoder = _ENCODERS[video_format.codec]
    context = av.CodecContext.create(encoder.name, "w")
    assert isinstance(context, VideoCodecContext)
    context.options = {"crf": str(video_format.crf or encoder.crf), **encoder.options}
    context.framerate = frame_rate(video_format.fps)
    _configure(context, encoder, width, height)
    _open(context, video_format.codec)


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction. Raises ConfigError outside 1 … 240."""
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ConfigError(f"fps is {fps!r}: must lie in {MIN_FPS} … {MAX_FPS}")
    # 1001 keeps the rates of television, such as 24000/1001, and mp4 counts time in small whole numbers.
    return Fraction(fps).limit_denominator(1001)


def to_frames(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """One decoded video [1, 3, T, H, W] in -1 … 1 as RGB frames [T, H, W, 3]: (x + 1) / 2, clamped, 255·x truncated.

    Raises OutputError where a value is NaN or infinite: such frames would be written as plain black or white.
    """
    if not np.isfinite(decoded).all():
        bad = f"{np.isnan(decoded).sum()} NaN and {np.isinf(decoded).sum()} infinite"
        raise OutputError(f"decoded frames have {bad} values of {decoded.size}; use a wider dtype, such as float32")
    unit = np.clip((decoded[0] + 1) / 2, 0, 1)
    return np.ascontiguousarray((255 * unit).astype(np.uint8).transpose(1, 2, 3, 0))


def _encode(
    growing: BinaryIO, windows: Iterable[NDArray[np.uint8]], video_format: VideoFormat, width: int, height: int
) -> int:
    """Writes frames to a file that can be played at any time, and returns their number."""
    encoder = _ENCODERS[video_format.codec]
    options = {"crf": str(video_format.crf or encoder.crf), **encoder.options}
    num_frames = 0
    with av.open(growing, "w", format="mp4", options=_GROWING) as container:
        stream = container.add_stream(encoder.name, rate=frame_rate(video_format.fps), options=options)
        assert isinstance(stream, VideoStream)
        _configure(stream.codec_context, encoder, width, height)
        with _own_scheduling():
            _open(stream.codec_context, video_format.codec)
        container.start_encoding()
        growing.flush()
        for window in windows:
            if window.dtype != np.uint8 or window.ndim != 4 or window.shape[1:] != (height, width, 3):
                found = f"{window.dtype} {list(window.shape)}"
                raise ConfigError(f"window of frames is {found}: must be uint8 [T, {height}, {width}, 3]")
            for pixels in window:
                container.mux(stream.encode(_to_yuv(pixels)))
            growing.flush()
            num_frames += len(window)
        container.mux(stream.encode(None))
    return num_frames


@contextmanager
def _own_scheduling() -> Iterator[None]:
    """The thread keeps its scheduling: for root, SVT-AV1 makes the one that opens it a real-time thread, for good.

    Such a thread that waits for another of the same core without sleeping keeps it from running.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _copy_packets(growing: BinaryIO, finished: Path) -> None:
    """The same packets in a file with one index, from time 0."""
    growing.seek(0)
    with av.open(growing, "r") as source, av.open(finished, "w", format="mp4", options=_FINISHED) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream, opaque=True)
        copy.codec_context.codec_tag = stream.codec_context.codec_tag
        start = stream.start_time or 0  # fragments have no edit list, so that B-frames delay the first frame
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None:  # the last, which is empty
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
            container.mux(packet)


@contextmanager
def _growing_file(target: Path) -> Iterator[BinaryIO]:
    """An empty file under the partial name, which goes in the end. Raises OutputError where another process has it."""
    path = partial_path(target)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{path}: another process writes this video; wait for it, or write elsewhere") from error
        try:
            if os.fstat(file.fileno()).st_size:  # of a process that was killed
                file.truncate(0)
            yield file
        finally:
            path.unlink(missing_ok=True)


def _configure(codec: VideoCodecContext, encoder: _Encoder, width: int, height: int) -> None:
    codec.width, codec.height, codec.pix_fmt, codec.codec_tag = width, height, "yuv420p", encoder.tag
    codec.thread_count, codec.thread_type = _THREADS, "FRAME"
    # Untagged, players guess the colours from the height, and guess wrong below 720 lines.
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _open(context: VideoCodecContext, codec: Codec) -> None:
    """Raises ConfigError for a size that the codec does not have."""
    os.environ.setdefault("SVT_LOG", "0")  # SVT-AV1 prints its settings otherwise
    try:
        with _own_scheduling():
            context.open()
    except av.FFmpegError as error:
        raise ConfigError(f"{codec} takes no {context.width} x {context.height} pixels; use another codec") from error


def _check_size(width: int, height: int) -> None:
    for name, pixels in (("width", width), ("height", height)):
        if pixels <= 0 or pixels % 2:
            raise ConfigError(f"{name} is {pixels!r}: must be even and positive, as colour is stored at half size")


def _to_yuv(pixels: NDArray[np.uint8]) -> VideoFrame:
    """RGB [H, W, 3], full range, as a planar frame with the matrix that `_configure` promises."""
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
