"""Storyboards that are typed instead of read from a file, and the prompts of one as text."""

import hashlib
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from ttt_video_engine.runtime.config import MAX_SCENES
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.storyboard import Scene, Storyboard, check_text
from ttt_video_engine.runtime.tokenizer import SCENE_END_TOKEN, SCENE_START_TOKEN

PROMPTS = "prompt.txt"
"""Name of the file beside a video."""


def storyboard_of_prompts(prompts: Sequence[str], negative_prompt: str = "") -> Storyboard:
    """One scene for each prompt, without transitions, all guided away from `negative_prompt`.

    It is named after its content, `prompt-` and 8 hexadecimal digits, so that the same prompts make the same folder.
    Raises StoryboardError, which names the option, for a text that no storyboard can hold.
    """
    if not 1 <= len(prompts) <= MAX_SCENES:
        raise StoryboardError(
            f"--prompt: given {len(prompts)} times; must be 1 … {MAX_SCENES} times, once for each scene"
        )
    negative = check_text(negative_prompt, "--negative-prompt")
    scenes = tuple(
        Scene(text=check_text(prompt, f"--prompt, scene {number}"), neg_text=negative)
        for number, prompt in enumerate(prompts, 1)
    )
    name = f"prompt-{hashlib.sha256(msgspec.json.encode(scenes)).hexdigest()[:8]}"
    return Storyboard(name=name, scenes=scenes, source="--prompt")


def with_negative_prompt(storyboard: Storyboard, negative_prompt: str) -> Storyboard:
    """`negative_prompt` for every scene that has no `neg_text`. Raises StoryboardError as `storyboard_of_prompts`."""
    negative = check_text(negative_prompt, "--negative-prompt")
    scenes = (scene if scene.neg_text else replace(scene, neg_text=negative) for scene in storyboard.scenes)
    return replace(storyboard, scenes=tuple(scenes))


def without_transitions(storyboard: Storyboard) -> tuple[Storyboard, list[str]]:
    """The storyboard for a model that knows no scene tokens, as CogVideoX, and a line where it asked for some."""
    asked = [str(number) for number, scene in enumerate(storyboard.scenes, 1) if scene.requires_scene_transition]
    if not asked:
        return storyboard, []
    scenes = tuple(replace(scene, requires_scene_transition=False) for scene in storyboard.scenes)
    line = "requires_scene_transition: no effect, as the bundle's model has no scene tokens"
    return replace(storyboard, scenes=scenes), [f"{storyboard.source}: scene {', '.join(asked)}, {line}"]


def prompt_text(storyboard: Storyboard) -> str:
    """The content of `prompt.txt` as the public code writes it: scenes with their scene tokens, a blank line between.

    Negative prompts are not in it.
    """
    texts = [scene.text for scene in storyboard.scenes]
    for index, scene in enumerate(storyboard.scenes):
        if index > 0 and scene.requires_scene_transition:
            texts[index - 1] += SCENE_END_TOKEN
            texts[index] = SCENE_START_TOKEN + texts[index]
    return "\n\n".join(texts)
