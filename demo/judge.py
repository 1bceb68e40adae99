"""How well clips show what their storyboards tell: shares of scenes, 0 … 1."""

from collections.abc import Iterable
from dataclasses import dataclass

from demo.measure import Seen, has_cut, look
from demo.scenes import Frames
from demo.story import SceneScript, Script


@dataclass(frozen=True)
class Scores:
    """`colour` counts scenes whose caption names it. `carried` counts scenes that continue with the figure of the scene
    before and do not name it: whether figure and colour are those that were seen there. `cuts` counts changes of scene,
    wanted or not."""

    background: float
    direction: float
    figure: float
    colour: float
    carried: float
    cuts: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in vars(self).items())


def judge(clips: Iterable[tuple[Script, list[str], Frames]]) -> Scores:
    """Scores of clips, each with the script and the captions it was rendered from."""
    hits: dict[str, list[bool]] = {name: [] for name in Scores.__dataclass_fields__}
    for script, captions, frames in clips:
        before: Seen | None = None
        for number, (scene, caption) in enumerate(zip(script, captions, strict=True)):
            seen = look(frames, number)
            words = caption.lower().rstrip(".").replace(",", "").split()
            hits["background"].append((seen.place, seen.night) == (scene.place, scene.night))
            hits["direction"].append(seen.motion == scene.motion)
            hits["figure"].append(seen.figure == scene.figure)
            if scene.colour in words:
                hits["colour"].append(seen.colour == scene.colour)
            if before is not None:
                hits["cuts"].append(has_cut(frames, number) == scene.cut)
                if _is_unnamed(scene, words):
                    hits["carried"].append((seen.figure, seen.colour) == (before.figure, before.colour))
            before = seen
    return Scores(**{name: sum(found) / len(found) if found else float("nan") for name, found in hits.items()})


def _is_unnamed(scene: SceneScript, words: list[str]) -> bool:
    return not scene.new_figure and scene.figure not in words
