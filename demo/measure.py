"""What is to be seen in a scene, measured without any learned model. Lengths are in pixels."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from demo.backgrounds import HEIGHT, PLACES, WIDTH, background
from demo.figures import COLOURS, FIGURES, placed
from demo.scenes import SCENE_FRAMES, Frames

_CONTRAST = 70.0
"""Summed over red, green and blue: a pixel that differs more from its background belongs to the figure."""
_CUT = 10.0
"""Mean difference of two frames in a row, 0 … 255, beyond which there is a cut between them."""
_LOOKED_AT = (1, *range(8, SCENE_FRAMES + 1, 8))
"""Frames of a scene that are measured, counted from 1: the ends of hops and their tops are among them."""
_PADDED = (HEIGHT + 48, WIDTH + 48)
"""Room for a mask beyond the right and the lower edge."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """`overlap`, 0 … 1, says how well the figure that fits best fits: its intersection with what is there, over the
    union."""

    place: str
    night: bool
    figure: str
    colour: str
    motion: str
    overlap: float


def look(clip: Frames, number: int) -> Seen:
    """What scene `number` of a clip [1 + 48·S, 64, 96, 3] shows."""
    frames = clip[[number * SCENE_FRAMES + step for step in _LOOKED_AT]].astype(np.float32)
    place, night = _place(frames)
    contrast = np.abs(frames - background(place, night)).sum(-1)
    pixels = frames[contrast > _CONTRAST]
    colour = _colour(pixels)
    # Nearer to the figure's colour than to the background's: what is blurred counts for the side it is on.
    figure, overlap, corners = _figure(np.abs(frames - COLOURS[colour]).sum(-1) < contrast)
    return Seen(place, night, figure, colour, _motion(corners), overlap)


def has_cut(clip: Frames, number: int) -> bool:
    """Whether a cut leads to scene `number`, 1 or later."""
    before, after = clip[number * SCENE_FRAMES : number * SCENE_FRAMES + 2].astype(np.float32)
    return bool(np.abs(after - before).mean() > _CUT)


def _place(frames: Array) -> tuple[str, bool]:
    """The background that most pixels are near to: the figure's count for no more than a limit."""
    candidates = [(place, night) for place in PLACES for night in (False, True)]
    errors = [np.abs(frames - background(*candidate)).sum(-1).clip(max=90).mean() for candidate in candidates]
    return candidates[int(np.argmin(errors))]


def _figure(there: NDArray[np.bool_]) -> tuple[str, float, NDArray[np.int_]]:
    """The figure that overlaps best in all frames [F, H, W]: its name, the overlap and its mask's corners [F, 2]."""
    seen = np.fft.rfft2(there, s=_PADDED)
    area = there.sum((1, 2))[:, None, None]
    found = []
    for figure in FIGURES:
        for mirrored in (False, True) if figure == "fish" else (False,):
            spectrum, inside = _template(figure, mirrored)
            common = np.fft.irfft2(seen * spectrum, s=_PADDED)
            overlaps = (common / (area + inside - common)).reshape(len(there), -1)
            places = overlaps.argmax(1)
            overlap = float(np.take_along_axis(overlaps, places[:, None], 1).mean())
            corners = np.stack(np.unravel_index(places, _PADDED), axis=1)
            # Corners left of the picture or above it come out on the far side.
            corners = np.where(corners > (HEIGHT, WIDTH), corners - np.array(_PADDED), corners)
            found.append((overlap, figure, corners))
    overlap, figure, corners = max(found, key=lambda one: one[0])
    return figure, overlap, corners


@cache
def _template(figure: str, mirrored: bool) -> tuple[NDArray[np.complex128], float]:
    """The conjugate spectrum of a figure's mask and its area."""
    mask = placed(figure, 0, 0, mirrored=mirrored)[0] > 0.5
    return np.fft.rfft2(mask, s=_PADDED).conj(), float(mask.sum())


def _colour(pixels: Array) -> str:
    """The named colour nearest to the median of the pixels [K, 3]; the first one where there are none."""
    median = np.median(pixels, axis=0) if len(pixels) else np.zeros(3)
    return min(COLOURS, key=lambda name: float(np.abs(median - COLOURS[name]).sum()))


def _motion(corners: NDArray[np.int_]) -> str:
    """From where the figure stands in each frame, [F, 2]."""
    y, x = (int(moved) for moved in corners[-1] - corners[0])
    if abs(x) >= 12 and abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    if abs(y) >= 7:
        return "down" if y > 0 else "up"
    return "jumps" if np.ptp(corners[:, 0]) >= 7 else "still"
