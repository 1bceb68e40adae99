"""Keeps the frames for a contact sheet while a video is decoded window by window."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class FramePicker:
    """Keeps the frames with the numbers `indices` [S, C]."""

    def __init__(self, indices: Sequence[Sequence[int]]) -> None:
        self._indices = np.asarray(indices)
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._seen = 0

    def see(self, window: NDArray[np.uint8]) -> None:
        """Reads the next window [T, H, W, 3]; keeps copies of the frames that are wanted."""
        for index in np.unique(self._indices):
            if self._seen <= index < self._seen + len(window):
                self._kept[int(index)] = window[index - self._seen].copy()
        self._seen += len(window)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """The frames [S, C, H, W, 3], after the last window."""
        return np.stack([np.stack([self._kept[int(index)] for index in scene]) for scene in self._indices])
