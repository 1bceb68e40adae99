"""`ttt-video check`, and what is said of options that a bundle does not have."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import holds, names, refusal, refused_with

from ttt_video_engine.planning.bundle_options import explain_bundle_options
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Path]:
    def write(*scenes: object) -> Path:
        path = tmp_path / "v.json"
        path.write_text(json.dumps([scene if isinstance(scene, dict) else {"text": scene} for scene in scenes]))
        return path

    return write


def test_without_a_bundle_only_what_needs_none(run: Run, board: Callable[..., Path]) -> None:
    path = board(
        {"text": "a", "requires_scene_transition": True}, {"text": "b", "requires_scene_transition": True}, " "
    )
    code, out, err = run("check", path, "--json")
    assert (code, err) == (0, "")
    (video,) = json.loads(out)["videos"]
    assert (video["name"], video["length"], video["seconds"], video["problem"]) == ("v", "9s", 9, None)
    assert [(scene["starts"], scene["ends"]) for scene in video["scenes"]] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert video["text_limit"] is None and all(scene["text_tokens"] is None for scene in video["scenes"])
    assert any("scene 3" in warning for warning in video["warnings"])
    code, out, _ = run("check", path)
    assert code == 0 and all(holds(out, value) for value in ("v", "9s", 9, "scene 3"))


def test_tokens_are_counted_with_scene_tokens(run: Run, board: Callable[..., Path], shared_bundle: Path) -> None:
    moved = {"text": "b", "requires_scene_transition": True}
    counts = []
    for scenes in (("a", "b", "c"), ("a", moved, {"text": "c", "neg_text": "c"})):
        code, out, _ = run("check", board(*scenes), "--bundle", shared_bundle, "--json")
        (video,) = json.loads(out)["videos"]
        assert (code, video["text_limit"], video["problem"]) == (0, 152, None)
        counts.append([(scene["text_tokens"], scene["neg_tokens"]) for scene in video["scenes"]])
    (a, _), (b, _), (c, _) = counts[0]
    assert counts[1] == [(a + 1, 1), (b + 1, 1), (c, c)]


def test_a_text_that_is_cut_ends_with_1(run: Run, board: Callable[..., Path], shared_bundle: Path) -> None:
    long = "the old harbour " * 100 + "LIGHTHOUSE"
    path = board({"text": "a", "neg_text": long}, "b", long)
    code, out, _ = run("check", path, "--bundle", shared_bundle, "--json")
    (video,) = json.loads(out)["videos"]
    first, second, third = video["scenes"]
    assert code == 1 and not json.loads(out)["fine"]
    assert first["neg_tokens"] > 152 and first["text_cut"] is None and first["neg_text_cut"].endswith("LIGHTHOUSE")
    assert third["text_tokens"] > 152 and third["text_cut"].endswith("LIGHTHOUSE")
    assert second["text_cut"] is second["neg_text_cut"] is None
    code, out, _ = run("check", path, "--bundle", shared_bundle)
    assert code == 1
    assert all(
        holds(out, value) for value in ("scene 1, neg_text", "scene 3, text", "LIGHTHOUSE", third["text_tokens"])
    )


def test_a_length_without_a_graph_ends_with_1_and_the_export(
    run: Run, board: Callable[..., Path], shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("check", board("a", "b"), "--bundle", shared_bundle, "--json")
    (video,) = json.loads(out)["videos"]
    assert (code, video["text_limit"]) == (1, 148)
    names(video["problem"], "6s", "3s", "9s")
    # The command can be typed.
    from ttt_video_engine.export import build

    asked: list[object] = []
    monkeypatch.setattr(
        build, "export_bundle", lambda source, output, lengths, *_: asked.extend((source.model.name, output, lengths))
    )
    _, _, command = video["problem"].partition("ttt-video ")
    assert run(*shlex.split(command))[0] == 0
    assert asked == ["tiny", shared_bundle, ("6s",)]


def test_a_length_that_cannot_be_exported_says_which_can(
    run: Run, board: Callable[..., Path], shared_bundle: Path
) -> None:
    code, out, _ = run("check", board(*["a"] * 16), "--bundle", shared_bundle)
    assert code == 1 and all(holds(out, value) for value in ("48s", 16, "45s", "51s"))


def test_every_video_of_a_file_is_checked(run: Run, tmp_path: Path, shared_bundle: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('[{"text": "a"}]\n[{"text": "a"}, {"text": "b"}]\n')
    code, out, _ = run("check", path, "--bundle", shared_bundle, "--json")
    videos = json.loads(out)["videos"]
    assert code == 1
    assert [(video["name"], video["problem"] is None) for video in videos] == [("many-001", True), ("many-002", False)]


def test_wrong_input_ends_with_2(run: Run, board: Callable[..., Path], tmp_path: Path) -> None:
    names(refusal(run("check", tmp_path / "absent.json")), tmp_path / "absent.json")
    names(refusal(run("check", board("a"), "--bundle", tmp_path)), tmp_path)
    names(refusal(run("check", board({"txt": "a"}))), "scene 1", "txt")


# Options that belong to a bundle


def test_what_a_bundle_has_is_taken(shared_bundle: Path) -> None:
    bundle = open_bundle(shared_bundle)
    assert explain_bundle_options(bundle) is None
    assert explain_bundle_options(bundle, width=96, height=64, dtype="fp32") is None
    assert explain_bundle_options(bundle, num_frames=37, dtype="float32") == "9s"


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"num_frames": 25}, ("--num-frames 25", "--preset tiny", "--length 6s")),
        ({"num_frames": 36}, ("--num-frames", 36, 25, 37)),
        ({"dtype": "fp16"}, ("--dtype fp16", "float32", "--precision float16", "--length 3s", "--length 9s")),
        ({"width": 224, "num_frames": 13}, ("--width 224", "96x64", "export", "--length 3s")),
        ({"width": 224, "num_frames": 25}, ("--width 224", "--num-frames 25", "export", "--length 6s")),
        ({"width": 100}, ("--width 100", "96x64", 16)),
        ({"height": 128}, ("--height 128", "96x64")),
    ],
)
def test_what_a_bundle_lacks_is_explained(
    shared_bundle: Path, options: dict[str, object], values: tuple[object, ...]
) -> None:
    with refused_with(ConfigError, *values) as caught:
        explain_bundle_options(open_bundle(shared_bundle), **options)  # type: ignore[arg-type]
    renders = "num_frames" in options and options["num_frames"] == 36
    assert renders or holds(str(caught.value), "3s or 9s")
    own = f"--output {shared_bundle}"
    assert holds(str(caught.value), own) == (options == {"num_frames": 25})
