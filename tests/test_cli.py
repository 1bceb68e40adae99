"""The command line: what every bad input says, and that it says it before anything is written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttt_video_engine.runtime.files import sha256_of

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

Run = Callable[..., tuple[int, str, str]]
Manifest = dict[str, Any]


def storyboard(folder: Path, content: object = None, name: str = "bear.json") -> Path:
    """A file with `content`, JSON where it is no string; one good scene where there is none."""
    path = folder / name
    content = [{"text": "A bear bakes bread."}] if content is None else content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def edit(bundle: Path, change: Callable[[Manifest], object]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def error_line(result: tuple[int, str, str]) -> str:
    """What a command said that ended for wrong input: nothing but one line on standard error."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def refused(run: Run, shared_bundle: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs `sample`, which must refuse and write nothing, and gives its message."""

    def refuse(board: Path | None = None, *options: object, bundle: Path | None = None) -> str:
        board = board or storyboard(tmp_path)
        out = tmp_path / "out"
        result = run("sample", board, "--bundle", bundle or shared_bundle, "--output-dir", out, *options)
        assert not out.exists()
        return error_line(result)

    return refuse


# Storyboards


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"', "bear.json: line 1, column 14: not JSON ("),
        ("a bear", "bear.json: line 1, column 1: not JSON ("),
        ("", "bear.json: the file is empty"),
        ({"text": "a"}, "bear.json: top level is an object; a video is a list of scenes"),
        ([], "bear.json: found an empty list"),
        ([{"neg_text": "a"}], "bear.json: scene 1, text: missing"),
        ([{"text": " "}], 'bear.json: scene 1, text: found " "'),
        ([{"text": "a", "txt": "b"}], 'bear.json: scene 1: unknown field "txt"; did you mean text?'),
        ([{"text": "a"}] * 2, "bear.json: 2 scenes, but the bundle renders 1 (3s) or 3 (9s)"),
        ([{"text": "a"}] * 6, "add or remove scenes, or export the bundle with `export --length 18s`"),
        ([[{"text": "a"}], [{"text": "b"}] * 2], "bear.json: video 2: 2 scenes, but"),
    ],
)
def test_a_storyboard_that_cannot_be_rendered_is_refused(
    refused: Callable[..., str], tmp_path: Path, content: object, expected: str
) -> None:
    assert expected in refused(storyboard(tmp_path, content))


def test_one_bad_line_stops_all_videos_of_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    lines = ['[{"text": "a"}]', '[{"text": "b"}]', '[{"text": }]']
    found = refused(storyboard(tmp_path, "\n".join(lines), "many.jsonl"))
    assert "many.jsonl: video 3, line 3, column 11: not JSON" in found


@pytest.mark.parametrize(("name", "expected"), [("absent.json", "cannot be read (No such file"), (".", "is a folder")])
def test_a_storyboard_that_is_not_there(refused: Callable[..., str], tmp_path: Path, name: str, expected: str) -> None:
    assert expected in refused(tmp_path / name)


# Options


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--num-steps", 0, "num_steps is 0: must lie in 1 … 1000"),
        ("--num-steps", 1001, "num_steps is 1001: must lie in 1 … 1000"),
        ("--guidance-scale", 0.5, "guidance scale is 0.5: must lie in 1 … 100"),
        ("--guidance-scale", 100.5, "guidance scale is 100.5: must lie in 1 … 100"),
        ("--guidance-scale", "nan", "guidance scale is nan: must lie in"),
        ("--fps", 0, "fps is 0.0: must lie in 1 … 240"),
        ("--fps", 241, "fps is 241.0: must lie in 1 … 240"),
        ("--length", "9s", "bear.json: has 1 scenes, a 9s video has 3; change the scenes or --length"),
    ],
)
def test_options_out_of_range_are_refused(
    refused: Callable[..., str], option: str, value: object, expected: str
) -> None:
    assert expected in refused(None, option, value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--seed", "-1"), "Invalid value for '--seed': Input should be greater than or equal to 0"),
        (("--guidance", "fixed"), "Invalid value for '--guidance': Value error, 'fixed' is not one of"),
        (("--steps", "4"), "No such option: --steps"),
        (("--num-steps",), "Option '--num-steps' requires an argument."),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    refused: Callable[..., str], options: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(None, *options)


def test_a_video_that_exists_is_not_replaced_unasked(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    many = storyboard(tmp_path, [[{"text": "a"}], [{"text": "b"}]], "many.json")
    video = tmp_path / "out/many-002/video.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"the video before")
    found = error_line(run("sample", many, "--bundle", shared_bundle, "--output-dir", tmp_path / "out"))
    assert found == f"{video}: exists; use --overwrite or another --output-dir"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [video]
    assert video.read_bytes() == b"the video before"


def test_an_output_folder_that_is_a_file_is_refused_before_the_first_step(
    run: Run, shared_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    found = error_line(run("sample", storyboard(tmp_path), "--bundle", shared_bundle, "--output-dir", tmp_path / "out"))
    assert found == f"{tmp_path / 'out'}: {tmp_path / 'out'} is not a folder that can be written; choose another"
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--width", 100), "width is 100: must be a multiple of 16 (patch 2 x VAE 8), such as 96"),
        (("--height", 63), "height is 63: must be a multiple of 16"),
        (("--width", -96), "width is -96: must be a multiple of 16"),
        (("--width", 0), "width is 0: must be a multiple of 16"),
        (("--width", 112), "tokens of a 3s video is 500: must be a multiple of mini_batch_size 16"),
        (("--preset", "huge"), "preset is 'huge': must be one of tiny, debug, 5B"),
        (("--preset", "5B"), "preset is '5B': has no weights of its own; give --checkpoint"),
        (("--config", "absent.toml"), "absent.toml: cannot be read (No such file or directory)"),
        (("--checkpoint", "absent"), "absent: is no folder"),
    ],
)
def test_an_export_that_cannot_be_made_is_refused(
    run: Run, tmp_path: Path, options: tuple[object, ...], expected: str
) -> None:
    assert expected in error_line(run("export", "--output", tmp_path / "bundle", *options))
    assert list(tmp_path.iterdir()) == []


# Bundles


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_a_bundle_that_is_not_there(run: Run, refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    folder = tmp_path / "absent"
    found = refused(bundle=folder) if command == "sample" else error_line(run("inspect", folder))
    assert found == f"{folder}: is not a bundle (bundle.json is missing); make one with ttt-video export"


@pytest.mark.parametrize(
    "name", ["transformer/model-9s.onnx", "vae_decoder/model.onnx_data", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(refused: Callable[..., str], bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refused(bundle=bundle) == f"{bundle}: {name} is missing; export the bundle again"


@pytest.mark.parametrize(
    "name", ["transformer/model-3s.onnx", "text_encoder/model.onnx_data", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["changed", "cut", "longer"])
def test_a_changed_file_is_named(refused: Callable[..., str], bundle: Path, name: str, damage: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    (bundle / name).write_bytes({"changed": content, "cut": content[:-1], "longer": content + b" "}[damage])
    assert refused(bundle=bundle) == f"{bundle}: {name} has changed since the export; export the bundle again"


def lead_out(manifest: Manifest, name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("transformer/model-3s.onnx")
    manifest["graphs"]["transformer-3s"]["file"] = name


def other_text_length(manifest: Manifest) -> None:
    """Fits the mini-batches as well as the graph's own does, and no input but the text shows it."""
    manifest["model"]["text_lengths"]["3s"] += 16


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(format_version=3), "bundle.json: format_version is 3, this program reads up to 2; update"),
        (lambda m: m.update(format_version="new"), "Expected `int`, got `str` - at `$.format_version`"),
        (lambda m: m.pop("dtype"), "bundle.json: Object missing required field `dtype`"),
        (lambda m: m.update(surprise=1), "bundle.json: Object contains unknown field `surprise`"),
        (lambda m: m["graphs"].pop("vae_decoder-next"), "graphs: vae_decoder-next is missing"),
        (lambda m: m.update(lengths=[]), "lengths: is empty"),
        (lambda m: m["lengths"].append("18s"), "graphs: transformer-18s is missing"),
        (lambda m: m["lengths"].append("7s"), "lengths: '7s' is unknown"),
        (lambda m: m["files"].pop("tokenizer/tokenizer.json"), "'tokenizer/tokenizer.json' is used but not listed"),
        (lambda m: lead_out(m, "../model.onnx"), "files: '../model.onnx' leads out of the bundle"),
        (lambda m: lead_out(m, "transformer/../../model.onnx"), "leads out of the bundle"),
        (lambda m: lead_out(m, "/etc/hostname"), "files: '/etc/hostname' leads out of the bundle"),
        (lambda m: m["model"].update(width=97), "width is 97: must be a multiple of 16"),
        (
            lambda m: m["model"].update(width=288),
            "graphs.transformer-3s: takes latents float32['batch', 13, 16, 8, 12]",
        ),
        (other_text_length, "graphs.transformer-3s: takes text float32['batch', 1, 136, 64], the model calls for"),
        (lambda m: m["graphs"]["transformer-3s"]["inputs"].pop(), "graphs.transformer-3s: takes no timestep"),
        (lambda m: m["model"]["vae"].update(temporal_window=3), "graphs.vae_decoder-first: takes latents"),
        (lambda m: m["model"]["transformer"].update(num_heads=3), "num_heads is 3: must divide model_dim 64"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(
    refused: Callable[..., str], bundle: Path, change: Callable[[Manifest], object], expected: str
) -> None:
    edit(bundle, change)
    found = refused(bundle=bundle)
    assert found.startswith(f"{bundle / 'bundle.json'}: ") and expected in found


def test_a_manifest_that_is_no_json_is_refused(refused: Callable[..., str], bundle: Path) -> None:
    (bundle / "bundle.json").write_text('{"format_version": 1')
    assert refused(bundle=bundle).startswith(f"{bundle / 'bundle.json'}: Input data was truncated")


def swap(bundle: Path, one: str, other: str) -> None:
    """Exchanges two files, with digests that say they belong where they are now."""
    (bundle / one).rename(bundle / "aside")
    (bundle / other).rename(bundle / one)
    (bundle / "aside").rename(bundle / other)
    edit(bundle, lambda m: m["files"].update({one: m["files"][other], other: m["files"][one]}))


def test_graphs_that_changed_places_are_not_run(run: Run, bundle: Path, tmp_path: Path) -> None:
    """Seen when the graph is loaded, so lines of progress may stand before the error."""
    swap(bundle, "transformer/model-3s.onnx", "transformer/model-9s.onnx")
    code, out, err = run("sample", storyboard(tmp_path), "--bundle", bundle, "--output-dir", tmp_path / "out")
    assert (code, out) == (2, "") and not (tmp_path / "out").exists()
    (found,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith(found + "\n") and "Traceback" not in err
    assert f"{bundle / 'transformer/model-3s.onnx'}: the bundle lists latents float32['batch', 13, 16, 8, 12]" in found


def test_debug_shows_the_trace(run: Run, tmp_path: Path) -> None:
    code, _, err = run("inspect", tmp_path, "--debug")
    assert code == 2 and "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


# Other commands


def recordings(folder: Path, wrong_by: float) -> Path:
    folder.mkdir()
    name = "op_ttt_linear.safetensors"
    with safe_open(GOLDEN / name, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(GOLDEN / name)
    tensors["output.XQW"].view(-1)[3] += wrong_by
    save_file(tensors, folder / name, metadata)
    return folder


def test_parity_passes_what_agrees(run: Run, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "golden", wrong_by=0)
    code, out, err = run("parity", "--golden", folder)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["recording", "op_ttt_linear.safetensors"]
    code, out, err = run("parity", "--golden", folder, "--json")
    (row,) = json.loads(out)
    assert (code, err) == (0, "")
    assert (row["recording"], row["kind"]) == ("op_ttt_linear.safetensors", "ttt scan")
    assert 0 <= row["reference_error"] < 1e-5 and 0 <= row["onnx_error"] < 1e-5


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_parity_fails_what_does_not_agree(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    code, out, err = run("parity", "--golden", recordings(tmp_path / "golden", wrong_by=0.01), *options)
    assert (code, err) == (1, "error: 1 of 1 over 1e-04: op_ttt_linear.safetensors\n")
    if options:
        assert json.loads(out)[0]["onnx_error"] == pytest.approx(0.01, rel=1e-2)


def test_parity_names_what_is_damaged(run: Run, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "golden", wrong_by=0)
    path = folder / "op_ttt_linear.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = run("parity", "--golden", folder)
    assert code == 2 and err.startswith(f"error: {path}: cannot be read (") and err.count("\n") == 1


def test_inspect_prints_the_manifest(run: Run, shared_bundle: Path) -> None:
    code, out, err = run("inspect", shared_bundle, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["manifest"] == json.loads((shared_bundle / "bundle.json").read_bytes())
    code, out, err = run("inspect", shared_bundle)
    assert (code, err) == (0, "")
    assert "tiny, TTT-linear, float32" in out and "96x64, lengths 3s, 9s" in out
    assert "takes latents float32['batch', 37, 16, 8, 12]; text float32['batch', 3, 152, 64]" in out


def test_inspect_names_a_changed_file(run: Run, bundle: Path) -> None:
    digest = sha256_of(bundle / "vae_decoder/next.onnx")
    with (bundle / "vae_decoder/next.onnx").open("ab") as file:
        file.write(b"\0")
    assert sha256_of(bundle / "vae_decoder/next.onnx") != digest
    assert "vae_decoder/next.onnx has changed" in error_line(run("inspect", bundle))


def test_both_ways_to_start_print_the_same_help() -> None:
    def help_of(*start: str) -> str:
        command = [sys.executable, *start, "sample", "--help"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    found = help_of("cli.py")
    assert found == help_of("-m", "ttt_video_engine.cli")
    for option in ("--bundle", "--output-dir", "--num-steps", "--guidance-scale", "--sampler", "--low-memory"):
        assert option in found
