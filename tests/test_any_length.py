"""Any number of scenes: which text length each gets, and a length that is added to a bundle and leaves the rest."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from messages import UNCHANGED, names, refusal, refused_with, subjects
from msgspec.structs import replace

from ttt_video_engine.planning.report import source_options
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import (
    MAX_SCENES,
    MIN_TEXT_LENGTH,
    SCENES_PER_LENGTH,
    ModelConfig,
    TTTKind,
    length_name,
    num_scenes,
)
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.presets import PRESETS, preset

Run = Callable[..., tuple[int, str, str]]
KINDS: tuple[TTTKind, ...] = ("linear", "mlp")


def tokens_of(model: ModelConfig, length: str) -> int:
    return model.clip_size(length).num_tokens(model.transformer.patch_size)


# Names


def test_a_length_is_named_by_its_seconds() -> None:
    assert [length_name(scenes) for scenes in (1, 2, 21, 100)] == ["3s", "6s", "63s", "300s"]
    assert all(num_scenes(length_name(scenes)) == scenes for scenes in range(1, MAX_SCENES + 1))
    assert all(num_scenes(length) == scenes for length, scenes in SCENES_PER_LENGTH.items())


@pytest.mark.parametrize(
    "length", ["", "s", "0s", "7s", "303s", "03s", "9", "9 s", "-3s", "9s\n", "٣s", "9" * 5000 + "s"]
)
def test_what_is_no_length_is_refused(length: str) -> None:
    with refused_with(ConfigError, "300s") as caught:
        num_scenes(length)
    assert len(str(caught.value)) < 200


def test_the_nearest_lengths_are_named() -> None:
    with refused_with(ConfigError, "length", "'7s'", "6s", "9s"):
        num_scenes("7s")


# Text lengths


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_text_lengths_follow_from_the_longest(kind: TTTKind) -> None:
    """All five of 5B are what the rule gives."""
    trained = preset("5B", kind)
    model = replace(trained, text_lengths={"9s": 502})
    assert model.stating(SCENES_PER_LENGTH).text_lengths == trained.text_lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_length_fills_whole_mini_batches_or_says_which_do(name: str, kind: TTTKind) -> None:
    model = preset(name, kind)
    most = max(model.text_lengths.values())
    refused = []
    for scenes in range(1, MAX_SCENES + 1):
        length = length_name(scenes)
        try:
            size = model.clip_size(length)
        except ConfigError as error:
            refused.append(scenes)
            near = [other for other in (scenes - 1, scenes + 1) if other <= MAX_SCENES]
            names(str(error), f"'{length}'", scenes, "mini_batch_size", *map(length_name, near))
            continue
        assert (size.num_scenes, size.num_frames) == (scenes, 12 * scenes + 1)
        assert MIN_TEXT_LENGTH <= size.text_length <= most
        assert tokens_of(model, length) % 64 == 0
        if length not in model.text_lengths:
            longer = range(size.text_length + 1, most + 1)
            assert all((tokens_of(model, length) + scenes * (n - size.text_length)) % 64 for n in longer)
    # S·(N + 12·p) + p is no multiple of 16 where gcd(S, 16) does not divide p: 1350 patches a frame, or 24.
    every = 4 if name == "5B" else 16
    assert refused == list(range(every, MAX_SCENES + 1, every))


@pytest.mark.parametrize("name", PRESETS)
def test_without_ttt_every_length_has_all_text(name: str) -> None:
    model = preset(name, "none")
    sizes = [model.clip_size(length_name(scenes)) for scenes in range(1, MAX_SCENES + 1)]
    assert {size.text_length for size in sizes} == {226}


def test_two_scenes_of_5b() -> None:
    size = preset("5B", "mlp").clip_size("6s")
    assert (size.num_scenes, size.num_frames, size.text_length, size.num_tokens(2)) == (2, 25, 501, 34752)


def test_a_mini_batch_that_64_cannot_hold_counts_alone() -> None:
    """8 scenes: 64 would need 8·N ≡ -97·4 (mod 64), which has no solution; 4 has."""
    base = preset("tiny", "linear")
    model = replace(
        base,
        width=32,
        height=32,
        text_lengths={"3s": 100},
        transformer=replace(base.transformer, mini_batch_size=4),
    )
    assert model.clip_size("24s").text_length == 100
    assert tokens_of(model, "24s") % 64 and tokens_of(model, "24s") % 4 == 0


def test_a_stated_text_length_stays() -> None:
    model = preset("tiny")
    assert {length: model.text_length(length) for length in model.text_lengths} == model.text_lengths
    assert model.stating(model.text_lengths) == model
    stating = model.stating(["6s", "12s"])
    assert stating.text_lengths == model.text_lengths | {"6s": 148, "12s": 154}
    assert all(stating.clip_size(length) == model.clip_size(length) for length in ("6s", "12s", "15s", "60s"))


@pytest.mark.parametrize(
    ("name", "kind", "digest"),
    [
        ("tiny", "linear", "43bf43757ca22df3"),
        ("tiny", "mlp", "93da77d7040cbdce"),
        ("5B", "linear", "6077fcfffa56fc4f"),
        ("5B", "mlp", "fe24d8743b7e4ee4"),
    ],
)
def test_the_config_that_keys_hold_is_as_before(name: str, kind: TTTKind, digest: str) -> None:
    encoded = msgspec.json.encode(preset(name, kind), order="deterministic")
    assert hashlib.sha256(encoded).hexdigest().startswith(digest)


# The commands


def test_export_and_plan_take_scenes(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ttt_video_engine.export import build

    asked: list[Any] = []
    monkeypatch.setattr(build, "export_bundle", lambda source, output, lengths, *_: asked.append(lengths))
    assert run("export", "--output", tmp_path / "b", "--scenes", 2, "--scenes", 4)[0] == 0
    assert run("export", "--output", tmp_path / "b", "--length", "12s", "--scenes", 2)[0] == 0
    assert run("export", "--output", tmp_path / "b")[0] == 0
    assert asked == [("6s", "12s"), ("12s", "6s"), ("9s",)]
    for option in ("--scenes 4", "--length 12s"):
        code, out, _ = run("plan", *option.split(), "--json")
        assert (code, json.loads(out)["asked"]["length"]) == (0, "12s")
    names(refusal(run("plan", "--scenes", 4, "--length", "9s")), "--length 9s", "--scenes 4", "12s")
    names(refusal(run("plan", "--preset", "5B", "--scenes", 4)), "'12s'", 4, "720x480", "9s", "15s")
    for command in (("export", "--output", tmp_path / "b"), ("plan",)):
        for scenes in (0, MAX_SCENES + 1):
            names(refusal(run(*command, "--scenes", scenes)), "--scenes")
        names(refusal(run(*command, "--length", "7s")), "length", "'7s'", "6s", "9s")


def test_a_file_states_any_length(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('length = ["6s", "12s"]\n')
    assert resolve_config(path).lengths == ("6s", "12s")
    path.write_text('text_lengths = { 3s = 136, 12s = 26 }\nlength = "12s"')
    assert resolve_config(path).model.clip_size("12s").text_length == 26


def test_a_bundle_that_states_more_lengths_is_still_its_preset() -> None:
    model = preset("tiny", "mlp")
    assert source_options(model.stating(["6s", "12s"]), None) == ["--preset", "tiny", "--ttt", "mlp"]
    other = replace(model, text_lengths=model.text_lengths | {"6s": 116})
    assert other.clip_size("6s") and "--config" in source_options(other, None)


def test_two_scenes_are_added_to_a_bundle_and_rendered(
    run: Run, bundle: Path, digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    before = open_bundle(bundle).manifest
    files = digests(bundle)
    board = tmp_path / "two.json"
    board.write_text('[{"text": "a cat"}, {"text": "a dog", "requires_scene_transition": true}]')
    rendering = ("sample", board, "--bundle", bundle, "--output-dir", tmp_path / "out", "--num-steps", 2)
    names(refusal(run(*rendering)), "two.json", 2, "3s", "9s", "--length 6s")

    code, out, err = run("export", "--output", bundle, "--scenes", 2)
    assert code == 0, err
    assert set(subjects((out + err).splitlines(), UNCHANGED)) >= set(before.graphs)
    after = open_bundle(bundle).manifest
    assert after.lengths == ("3s", "6s", "9s")
    assert after.model == before.model.stating(["6s"])
    assert after.weight_keys == before.weight_keys
    assert {name: after.graphs[name] for name in before.graphs} == before.graphs
    (added,) = after.graphs.keys() - before.graphs.keys()
    assert added == "transformer-6s"
    assert all(check.max_error <= check.tolerance for check in after.graphs[added].parity)
    changed = {name for name, digest in digests(bundle).items() if files.get(name) != digest}
    assert changed == {"bundle.json", "transformer/model-6s.onnx"}

    code, _, err = run(*rendering)
    assert code == 0, err
    sidecar = json.loads((tmp_path / "out/two/video.json").read_text())
    assert (sidecar["length"], sidecar["num_frames"], len(sidecar["storyboard"]["scenes"])) == ("6s", 97, 2)
    assert run("inspect", bundle)[0] == 0
