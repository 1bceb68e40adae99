"""From a script to pictures: clips of 96x64 pixels at 16 frames a second, 1 + 48·S frames for S scenes."""

import math

import numpy as np
from numpy.typing import NDArray

from demo.backgrounds import HEIGHT, WIDTH, background
from demo.figures import COLOURS, placed
from demo.story import JUMP, TOP, SceneScript, Script

SCENE_FRAMES = 48

Frames = NDArray[np.uint8]


def render(script: Script) -> Frames:
    """The clip [1 + 48·S, 64, 96, 3] of a script; its first frame shows the start of the first scene."""
    return render_part(script, 0, 1 + SCENE_FRAMES * len(script))


def render_part(script: Script, first: int, count: int) -> Frames:
    """`count` frames of the clip, from frame `first` on."""
    frames = np.empty((count, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for place, frame in enumerate(range(first, first + count)):
        number = _scene_of(frame)
        frames[place] = _frame(script[number], frame / SCENE_FRAMES - number)
    return frames


def background_frames(script: Script) -> Frames:
    """What `render` shows behind the figures."""
    pictures = [background(scene.place, scene.night).round().astype(np.uint8) for scene in script]
    return np.stack([pictures[_scene_of(frame)] for frame in range(1 + SCENE_FRAMES * len(script))])


def position(scene: SceneScript, progress: float) -> tuple[float, float]:
    """(y, x) of the figure's centre; `progress` runs from 0 to 1 through the scene.

    The figure slows down until it rests, so it spends most of a scene near the end of its way. At an even speed, where
    it stands on average would say nothing about where it goes: only place and time together would, and a network that
    sees noise alone has to find one of the two first.
    """
    (y, x), (end_y, end_x) = scene.start, scene.end
    if scene.motion == "jumps":
        return y - min(JUMP, y - TOP) * abs(math.sin(3 * math.pi * progress)), x
    way = 1 - (1 - progress) ** 3
    return y + (end_y - y) * way, x + (end_x - x) * way


def _scene_of(frame: int) -> int:
    return max(frame - 1, 0) // SCENE_FRAMES


def _frame(scene: SceneScript, progress: float) -> NDArray[np.float32]:
    picture = background(scene.place, scene.night).copy()
    y, x = position(scene, progress)
    mask, top, left = placed(scene.figure, y, x, mirrored=scene.mirrored)
    rows = slice(max(top, 0), min(top + mask.shape[0], HEIGHT))
    columns = slice(max(left, 0), min(left + mask.shape[1], WIDTH))
    cover = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    colour = np.array(COLOURS[scene.colour], dtype=np.float32)
    picture[rows, columns] += cover * (colour - picture[rows, columns])
    return picture.round()
