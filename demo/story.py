"""What happens in a clip, scene by scene, drawn from a seed. Positions are those of the figure's centre, in pixels."""

from dataclasses import dataclass

from numpy.random import Generator, default_rng

from demo.backgrounds import HEIGHT, PLACES, WIDTH
from demo.figures import COLOURS, FIGURES, extent

MOTIONS = ("right", "left", "up", "down", "still", "jumps")
LEFT, CENTRE, RIGHT = 22.0, 48.0, 74.0
TOP, MIDDLE, BOTTOM = 20.0, 32.0, 44.0
JUMP = 20.0
"""Height of a jump."""
_CHANGE = 0.5
"""Share of later scenes that a cut leads to."""
_NEW_FIGURE = 0.3
"""Share of cuts that bring another figure."""


@dataclass(frozen=True)
class SceneScript:
    """Three seconds: a figure goes from `start` to `end`, each (y, x). `cut`: the scene begins with a change."""

    figure: str
    colour: str
    place: str
    night: bool
    motion: str
    cut: bool
    new_figure: bool
    mirrored: bool
    start: tuple[float, float]
    end: tuple[float, float]


Script = tuple[SceneScript, ...]


def random_script(seed: int, index: int, num_scenes: int) -> Script:
    """Clip number `index` of the endless series that `seed` stands for."""
    rng = default_rng([seed, index, num_scenes])
    scenes: list[SceneScript] = []
    for number in range(num_scenes):
        before = scenes[-1] if number else None
        scenes.append(_scene(rng, before, cut=before is not None and rng.random() < _CHANGE))
    return tuple(scenes)


def _scene(rng: Generator, before: SceneScript | None, *, cut: bool) -> SceneScript:
    new_figure = before is None or (cut and rng.random() < _NEW_FIGURE)
    if before is None or new_figure:
        figure, colour = str(rng.choice(FIGURES)), str(rng.choice(list(COLOURS)))
    else:
        figure, colour = before.figure, before.colour
    if before is not None and not cut:
        place, night = before.place, before.night
        motion = str(rng.choice([motion for motion in MOTIONS if _possible(motion, before.end)]))
        start, mirrored = before.end, before.mirrored
    else:
        place, night = _new_background(rng, before)
        motion, mirrored = str(rng.choice(MOTIONS)), False
        start = _inside(figure, _first_position(rng, motion))
    mirrored = motion == "left" or (mirrored and motion != "right")
    return SceneScript(
        figure=figure,
        colour=colour,
        place=place,
        night=night,
        motion=motion,
        cut=cut,
        new_figure=new_figure,
        mirrored=mirrored,
        start=start,
        end=_inside(figure, _end(motion, start)),
    )


def _new_background(rng: Generator, before: SceneScript | None) -> tuple[str, bool]:
    """A place and whether it is night; a cut never leads to the background that was there."""
    while True:
        place, night = str(rng.choice(PLACES)), bool(rng.random() < 0.4)
        if before is None or (place, night) != (before.place, before.night):
            return place, night


def _first_position(rng: Generator, motion: str) -> tuple[float, float]:
    """Where a motion starts that has the whole picture before it."""
    y, x = MIDDLE + rng.uniform(-8, 8), CENTRE + rng.uniform(-16, 16)
    starts = {"right": (y, LEFT), "left": (y, RIGHT), "up": (BOTTOM, x), "down": (TOP, x), "jumps": (BOTTOM, x)}
    return starts.get(motion, (y, x))


def _possible(motion: str, start: tuple[float, float]) -> bool:
    """Whether there is room for a motion that can be seen."""
    y, x = start
    room = {
        "right": RIGHT - x >= 26,
        "left": x - LEFT >= 26,
        "up": y - TOP >= 12,
        "down": BOTTOM - y >= 12,
        "jumps": y - TOP >= 12,
    }
    return room.get(motion, True)


def _end(motion: str, start: tuple[float, float]) -> tuple[float, float]:
    y, x = start
    ends = {"right": (y, RIGHT), "left": (y, LEFT), "up": (TOP, x), "down": (BOTTOM, x)}
    return ends.get(motion, start)


def _inside(figure: str, position: tuple[float, float]) -> tuple[float, float]:
    """The nearest position at which the whole figure is in the picture."""
    half_height, half_width = extent(figure)
    y, x = position
    return (
        min(max(y, half_height), HEIGHT - half_height),
        min(max(x, half_width), WIDTH - half_width),
    )
