"""Prompts that are typed: the storyboard they make, the default negative prompt, and prompt.txt."""

import re

import pytest
from messages import refused_with

from ttt_video_engine.runtime.config import MAX_SCENES
from ttt_video_engine.runtime.errors import StoryboardError
from ttt_video_engine.runtime.prompts import prompt_text, storyboard_of_prompts, with_negative_prompt
from ttt_video_engine.runtime.storyboard import MAX_TEXT, Scene, Storyboard


def test_one_scene_for_each_prompt() -> None:
    board = storyboard_of_prompts(["a cat", "a dog"], "blur")
    assert board.scenes == (Scene("a cat", neg_text="blur"), Scene("a dog", neg_text="blur"))
    assert re.fullmatch("prompt-[0-9a-f]{8}", board.name)


def test_the_name_is_that_of_the_content() -> None:
    given = [(["a", "b"], ""), (["a b"], ""), (["b", "a"], ""), (["a", "b"], "c"), (["a", "bc"], "")]
    found = {storyboard_of_prompts(prompts, negative).name for prompts, negative in given}
    assert len(found) == len(given)
    # It is a folder that a later run finds again.
    assert storyboard_of_prompts(["a cat"]).name == "prompt-fb2b0ad2"


@pytest.mark.parametrize(
    ("prompts", "negative", "values"),
    [
        ([], "", ("--prompt", 0, MAX_SCENES)),
        (["a"] * (MAX_SCENES + 1), "", ("--prompt", MAX_SCENES + 1, MAX_SCENES)),
        (["a", "x" * (MAX_TEXT + 1)], "", ("--prompt", "scene 2", MAX_TEXT + 1, MAX_TEXT)),
        (["a\0"], "", ("--prompt", "scene 1", "NUL")),
        (["a\udc80"], "", ("--prompt", "scene 1")),
        (["a"], "\0", ("--negative-prompt", "NUL")),
    ],
)
def test_what_no_storyboard_can_hold_is_refused(prompts: list[str], negative: str, values: tuple[object, ...]) -> None:
    with refused_with(StoryboardError, *values):
        storyboard_of_prompts(prompts, negative)


def test_a_negative_prompt_is_for_scenes_without_one() -> None:
    board = Storyboard("v", (Scene("a", neg_text="own"), Scene("b", requires_scene_transition=True)), "v.json")
    found = with_negative_prompt(board, "blur")
    assert found.scenes == (board.scenes[0], Scene("b", requires_scene_transition=True, neg_text="blur"))
    assert (found.name, found.source) == ("v", "v.json")
    with refused_with(StoryboardError, "--negative-prompt"):
        with_negative_prompt(board, "\0")


def test_prompt_txt_is_the_public_codes() -> None:
    scenes = (Scene("a", True), Scene("b", True, "not this"), Scene("c"), Scene("d\n", True))
    text = prompt_text(Storyboard("v", scenes, "v.json"))
    assert text == "a<end_scene>\n\n<start_scene>b\n\nc<end_scene>\n\n<start_scene>d\n"
    assert prompt_text(storyboard_of_prompts(["only one"])) == "only one"
