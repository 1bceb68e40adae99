"""Clips as one picture to look at: a row for each, frames from left to right."""

from collections.abc import Sequence

import numpy as np

from demo.scenes import Frames

_GAP = 4


def contact_sheet(clips: Sequence[Frames], per_scene: int = 3) -> Frames:
    """A picture [height, width, 3] of `per_scene` frames of every scene of each clip; clips are equally long."""
    num_scenes = (len(clips[0]) - 1) // 48
    shown = [
        48 * scene + round((step + 0.5) * 48 / per_scene) for scene in range(num_scenes) for step in range(per_scene)
    ]
    rows = []
    for clip in clips:
        padded = [np.pad(clip[frame], ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for frame in shown]
        rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows, axis=0)
