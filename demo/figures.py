"""The figures: silhouettes, drawn once at every quarter of a pixel. Lengths are in pixels, y grows downwards."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

FIGURES = ("ball", "box", "ring", "star", "fish", "rocket")
COLOURS = {
    "red": (215, 25, 35),
    "yellow": (255, 228, 0),
    "green": (0, 160, 50),
    "blue": (0, 75, 235),
    "purple": (140, 0, 160),
    "pink": (255, 120, 190),
}
"""Name → RGB, 0 … 255."""
PHASES = 4
"""Steps that a pixel is divided into, each way."""
_SIZE = 48
"""Height and width of a mask: it holds the largest figure and a margin."""

Mask = NDArray[np.float32]
_Coordinates = NDArray[np.float64]
_Shape = NDArray[np.bool_]


@cache
def extent(figure: str) -> tuple[float, float]:
    """Half the height and half the width of a figure."""
    rows, columns = np.nonzero(_drawn(figure))
    centre = _SIZE * PHASES / 2
    return (
        float(max(centre - rows.min(), rows.max() + 1 - centre)) / PHASES,
        float(max(centre - columns.min(), columns.max() + 1 - centre)) / PHASES,
    )


def placed(figure: str, y: float, x: float, *, mirrored: bool) -> tuple[Mask, int, int]:
    """How much of each pixel the figure covers when its centre is at (y, x), and where the mask's corner stands.

    The centre is rounded to a quarter of a pixel. The mask [48, 48] may reach over the edge of the picture.
    """
    top, phase_y = divmod(round(y * PHASES), PHASES)
    left, phase_x = divmod(round(x * PHASES), PHASES)
    return _mask(figure, phase_y, phase_x, mirrored), top - _SIZE // 2, left - _SIZE // 2


@cache
def _mask(figure: str, phase_y: int, phase_x: int, mirrored: bool) -> Mask:
    fine = _drawn(figure)
    if mirrored:
        fine = fine[:, ::-1]
    shifted = np.roll(fine, (phase_y, phase_x), axis=(0, 1)).astype(np.float32)
    mask: Mask = shifted.reshape(_SIZE, PHASES, _SIZE, PHASES).mean(axis=(1, 3))
    return mask


@cache
def _drawn(figure: str) -> _Shape:
    """The figure around the middle of a grid of quarter pixels, [192, 192]."""
    axis = (np.arange(_SIZE * PHASES) + 0.5) / PHASES - _SIZE / 2
    return _SHAPES[figure](axis[:, None], axis[None, :])


def _ball(y: _Coordinates, x: _Coordinates) -> _Shape:
    return y**2 + x**2 < 15.5**2


def _box(y: _Coordinates, x: _Coordinates) -> _Shape:
    return np.maximum(abs(y), abs(x)) < 14


def _ring(y: _Coordinates, x: _Coordinates) -> _Shape:
    radius = np.hypot(y, x)
    return (radius > 8.5) & (radius < 17)


def _star(y: _Coordinates, x: _Coordinates) -> _Shape:
    """Five points, 19 from the centre, 7.5 in the notches; the edge between the two is straight."""
    step = np.pi / 5
    angle = np.arctan2(x, -y) % (2 * step)
    angle = np.minimum(angle, 2 * step - angle)
    # The edge from the tip (19, 0) to the notch at (7.5·cos, 7.5·sin), as a half-plane.
    notch_a, notch_b = 7.5 * np.cos(step), 7.5 * np.sin(step)
    along, across = np.hypot(y, x) * np.cos(angle), np.hypot(y, x) * np.sin(angle)
    inside: _Shape = (19 - along) * notch_b - across * (19 - notch_a) > 0
    return inside


def _fish(y: _Coordinates, x: _Coordinates) -> _Shape:
    """Swims to the right: the tail is on the left."""
    body = ((x - 4) / 17) ** 2 + (y / 12) ** 2 < 1
    tail = (x > -21) & (x < -6) & (abs(y) < 2 + (-6 - x) * 0.65)
    return body | tail


def _rocket(y: _Coordinates, x: _Coordinates) -> _Shape:
    nose = (y >= -19) & (y < -6) & (abs(x) < (y + 19) * 0.55)
    body = (y >= -6) & (y < 19) & (abs(x) < 7.15)
    fins = (y >= 7) & (y < 19) & (abs(x) < 7.15 + (y - 7) * 0.5)
    return nose | body | fins


_SHAPES = {"ball": _ball, "box": _box, "ring": _ring, "star": _star, "fish": _fish, "rocket": _rocket}
