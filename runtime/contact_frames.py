"""Which frames stand for a video on its contact sheet, picked as they are decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_SCENE = 4

DrawContactSheet = Callable[[Path, NDArray[np.uint8], Sequence[str], str], None]
"""(target, frames [S, C, H, W, 3], a caption for each scene, a footer) → writes the picture, whole or not at all."""


def contact_indices(num_frames: int, num_scenes: int, per_scene: int = FRAMES_PER_SCENE) -> NDArray[np.int64]:
    """Indices [S, C] of frames, the middles of `per_scene` equal parts of each scene, scenes being equally long."""
    parts = num_scenes * per_scene
    middles = (2 * np.arange(parts) + 1) * num_frames // (2 * parts)
    return middles.reshape(num_scenes, per_scene)


class FramePicker:
    """Keeps the frames of `indices` [S, C] from windows that come one after the other."""

    def __init__(self, indices: NDArray[np.int64]) -> None:
        self._indices = indices
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._seen = 0

    def see(self, window: NDArray[np.uint8]) -> None:
        """Takes the next window, [T, H, W, 3]."""
        for index in np.unique(self._indices):
            if self._seen <= index < self._seen + len(window):
                self._kept[int(index)] = window[index - self._seen].copy()
        self._seen += len(window)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """[S, C, H, W, 3], once all windows were seen."""
        return np.stack([np.stack([self._kept[int(index)] for index in scene]) for scene in self._indices])
