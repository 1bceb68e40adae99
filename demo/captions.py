"""Captions: a script in plain prose, one sentence a scene, from a small grammar of many wordings.

A scene says what is new. The first one names figure, colour and place; later ones name what a cut changes, and call the
figure "it" or "the figure" more often than by its name.
"""

from numpy.random import Generator, default_rng

from demo.story import SceneScript, Script

_MOVES = ("moves", "glides", "drifts", "slides", "travels", "floats", "goes", "heads", "wanders", "flies")
_RIGHT = ("to the right", "rightwards", "from left to right", "towards the right", "off to the right")
_LEFT = ("to the left", "leftwards", "from right to left", "towards the left", "off to the left")
_UP = ("rises", "climbs", "goes up", "moves up", "floats upwards", "drifts up", "glides upwards", "rises into the air")
_DOWN = ("sinks", "falls", "goes down", "moves down", "floats downwards", "drifts down", "comes down", "sinks lower")
_STILL = ("stays still", "does not move", "rests", "waits", "stands still", "stays where it is", "keeps still")
_JUMPS = ("jumps", "hops", "bounces", "jumps on the spot", "hops up and down", "bounces up and down", "keeps jumping")
_PLACES = {
    "meadow": ("in a green meadow", "over a meadow", "above the grass", "in a grassy field", "on a green hill"),
    "sea": ("over the sea", "above the ocean", "by the sea", "over the water", "at the beach"),
    "desert": ("in the desert", "over the desert", "above the sand", "by a pyramid", "among sandy dunes"),
    "snow": ("in the snow", "over the snow", "above snowy ground", "by white mountains", "in a land of snow"),
    "city": ("in the city", "over the town", "above the streets", "by tall houses", "among the city roofs"),
}
_DAY = ("by day", "in daylight", "on a clear day", "in the morning", "at noon")
_NIGHT = ("at night", "after dark", "in the dark", "by night", "at midnight", "late at night")
_ADVERBS = ("slowly", "quietly", "gently", "calmly", "happily", "smoothly")
_OPENERS = ("now", "then", "next", "after that", "again")
_SIZES = ("big", "large", "huge")


def captions(script: Script, seed: int) -> list[str]:
    """One sentence for every scene; the same script and seed give the same words."""
    rng = default_rng(seed)
    return [_sentence(scene, rng, first=number == 0) for number, scene in enumerate(script)]


def _sentence(scene: SceneScript, rng: Generator, *, first: bool) -> str:
    subject, predicate = _subject(scene, rng, first=first), _predicate(scene.motion, rng)
    where = _where(scene, rng) if first or scene.cut else ""
    opener = _one(rng, _OPENERS) + ", " if not first and rng.random() < 0.4 else ""
    if where and rng.random() < 0.4:
        words = f"{where}, {subject} {predicate}"
    else:
        words = f"{opener}{subject} {predicate} {where}".rstrip()
    return words[0].upper() + words[1:] + "."


def _subject(scene: SceneScript, rng: Generator, *, first: bool) -> str:
    if scene.new_figure:
        size = _one(rng, _SIZES) + " " if rng.random() < 0.3 else ""
        return f"a {size}{scene.colour} {scene.figure}"
    kind = rng.random()
    if kind < 0.45:
        return "it"
    if kind < 0.7:
        return "the figure"
    return f"the {scene.figure}" if kind < 0.85 else f"the {scene.colour} {scene.figure}"


def _predicate(motion: str, rng: Generator) -> str:
    if motion in ("right", "left"):
        words = f"{_one(rng, _MOVES)} {_one(rng, _RIGHT if motion == 'right' else _LEFT)}"
    else:
        words = _one(rng, {"up": _UP, "down": _DOWN, "still": _STILL, "jumps": _JUMPS}[motion])
    return f"{words} {_one(rng, _ADVERBS)}" if motion != "still" and rng.random() < 0.25 else words


def _where(scene: SceneScript, rng: Generator) -> str:
    """The place, and the time of the day: night is always told, day in every third caption."""
    place = _one(rng, _PLACES[scene.place])
    if scene.night:
        return f"{place} {_one(rng, _NIGHT)}"
    return f"{place} {_one(rng, _DAY)}" if rng.random() < 0.33 else place


def _one(rng: Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
