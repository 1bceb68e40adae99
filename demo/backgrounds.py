"""The backgrounds: a sky, a ground and one simple feature, by day and at night."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 64, 96
PLACES = ("meadow", "sea", "desert", "snow", "city")

_Colour = tuple[int, int, int]
_DAY_SKY: _Colour = (200, 226, 245)
_NIGHT_SKY: _Colour = (30, 34, 72)
_NIGHT_LIGHT = (0.42, 0.46, 0.56)
"""What of the red, green and blue of a thing is seen at night."""


@cache
def background(place: str, night: bool) -> NDArray[np.float32]:
    """A picture [64, 96, 3] of the place, 0 … 255."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    layers: dict[str, list[tuple[NDArray[np.bool_], _Colour]]] = {
        "meadow": [
            (((x - 68) / 34) ** 2 + ((y - 46) / 18) ** 2 < 1, (118, 164, 104)),
            (y >= 42, (160, 196, 120)),
        ],
        "sea": [(y >= 28, (96, 172, 190)), (y >= 54, (216, 200, 160))],
        "desert": [(abs(x - 26) < (y - 12) * 0.85, (196, 160, 112)), (y >= 40, (232, 204, 156))],
        "snow": [
            ((abs(x - 24) < (y - 8) * 0.7) | (abs(x - 70) < (y - 16) * 0.8), (150, 164, 184)),
            (y >= 44, (240, 244, 248)),
        ],
        "city": [(y >= _skyline(x), (138, 138, 142)), (y >= 52, (96, 96, 100))],
    }
    picture = np.empty((HEIGHT, WIDTH, 3), dtype=np.float32)
    picture[:] = _NIGHT_SKY if night else _DAY_SKY
    for where, colour in layers[place]:
        picture[where] = np.multiply(colour, _NIGHT_LIGHT) if night else colour
    return picture


def _skyline(x: NDArray[np.int_]) -> NDArray[np.int_]:
    """Where the roofs of the city stand: rows counted from the top."""
    roofs = np.array([30, 16, 36, 22, 40, 12, 28, 20, 34, 24, 38, 26])
    heights: NDArray[np.int_] = roofs[x // 8]
    return heights
