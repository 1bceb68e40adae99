"""Decoded frames into an mp4 that any browser plays, a few at a time."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray

from ttt_video_engine.runtime.errors import ConfigError, OutputError
from ttt_video_engine.runtime.files import atomic_write

MIN_FPS, MAX_FPS = 1, 240
# The same frames must give the same bytes. x264 writes others for another number of threads, and would take as many as
# the machine has; and its AVX-512 code for macroblock trees gives others from run to run, even with one thread.
ENCODER_THREADS = 4
ENCODER_OPTIONS = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}
# The index goes in front of the frames, so that a player can start before it has the whole file.
CONTAINER_OPTIONS = {"movflags": "+faststart"}


def write_mp4(
    target: Path, windows: Iterable[NDArray[np.uint8]], *, width: int, height: int, fps: float | Fraction
) -> int:
    """Encodes windows of RGB frames, uint8 [T, height, width, 3], as H.264 and returns the number of frames written.

    One window is held at a time. `target` appears when it is complete, replacing what was there; the same frames give
    the same bytes. Raises ConfigError for fps outside 1 … 240, an odd size, or a window of another size; OutputError
    where the disk is full or no frames came.
    """
    rate = frame_rate(fps)
    for name, pixels in (("width", width), ("height", height)):
        if pixels <= 0 or pixels % 2:
            raise ConfigError(f"{name} is {pixels!r}: must be even and positive, as H.264 stores colour at half size")
    num_frames = 0
    with (
        atomic_write(target) as partial,
        av.open(partial, "w", format="mp4", options=CONTAINER_OPTIONS) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options=ENCODER_OPTIONS)
        _configure(stream.codec_context, width, height)
        for window in windows:
            if window.dtype != np.uint8 or window.ndim != 4 or window.shape[1:] != (height, width, 3):
                found = f"{window.dtype} {list(window.shape)}"
                raise ConfigError(f"window of frames is {found}: must be uint8 [T, {height}, {width}, 3]")
            for pixels in window:
                container.mux(stream.encode(_to_yuv(pixels)))
            num_frames += len(window)
        if num_frames == 0:
            raise OutputError(f"{target}: there are no frames to write; decode at least one")
        container.mux(stream.encode(None))
    return num_frames


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


def _configure(codec: VideoCodecContext, width: int, height: int) -> None:
    codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
    codec.thread_count, codec.thread_type = ENCODER_THREADS, "FRAME"
    # Untagged, players guess the colours from the height, and guess wrong below 720 lines.
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _to_yuv(pixels: NDArray[np.uint8]) -> VideoFrame:
    """RGB [H, W, 3], full range, as a planar frame with the matrix that `_configure` promises."""
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
