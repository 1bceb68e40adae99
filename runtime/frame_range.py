"""Some of the frames of a video that is decoded window by window."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.config import ClipSize, ModelConfig
from ttt_video_engine.runtime.errors import ConfigError


@dataclass(frozen=True)
class FrameRange:
    """Frames `start` to `stop - 1` of a video, counted from 0."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str, num_frames: int) -> "FrameRange":
        """START:END with the meaning of Python's slices: either may be empty, negative ones count from the end.

        Raises ConfigError for another form, and where no frame is left.
        """
        match = re.fullmatch(r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?", text)
        if match is None:
            raise ConfigError(f"--frames is {text!r}: must be START:END, such as 0:48, :48 or -48:")
        ends = [int(end) if end is not None else None for end in match.groups()]
        start, stop, _ = slice(*ends).indices(num_frames)
        if start >= stop:
            raise ConfigError(f"--frames is {text!r}: holds no frame of a video of {num_frames}; END must follow START")
        return cls(start, stop)

    def num_windows(self, model: ModelConfig, size: ClipSize) -> int:
        """Windows to decode, those before the first frame too, as each needs what the one before it hands on."""
        window = model.vae.temporal_window
        frames = window * model.vae.temporal_factor  # the first window has one more
        return min((size.num_frames - 1) // window, max(1, -(-(self.stop - 1) // frames)))

    def select(self, windows: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """These frames of windows [T, H, W, 3]; no window is asked for after the last of them."""
        first = 0
        for window in windows:
            chosen = window[max(0, self.start - first) : self.stop - first]
            first += len(window)
            del window
            if len(chosen):
                yield chosen
            if first >= self.stop:
                return
