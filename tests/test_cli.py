"""The command line: what every bad input says, and that it says it before anything is written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from messages import ERROR, GUIDANCE_SCALE, TRACE, column, holds, last_refusal, line, names, refusal, scene, video
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttt_video_engine.export.parity.recordings import TOLERANCE
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


@pytest.fixture
def refused(run: Run, shared_bundle: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs `sample`, which must refuse and write nothing, and gives its message."""

    def refuse(board: Path | None = None, *options: object, bundle: Path | None = None) -> str:
        board = board or storyboard(tmp_path)
        out = tmp_path / "out"
        result = run("sample", board, "--bundle", bundle or shared_bundle, "--output-dir", out, *options)
        assert not out.exists()
        return refusal(result)

    return refuse


# Storyboards


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('[{"text": "a"', (line(1), column(14))),
        ("a bear", (line(1), column(1))),
        ("", ()),
        ({"text": "a"}, ("object",)),
        ([], ("list",)),
        ([{"neg_text": "a"}], (scene(1), "text")),
        ([{"text": "a", "txt": "b"}], (scene(1), "txt", "text")),
        ([{"text": "a"}] * 2, (2, 1, "3s", 3, "9s")),
        ([{"text": "a"}] * 6, (6, "3s", "9s", "export", "--length 18s")),
        ([[{"text": "a"}], [{"text": "b"}] * 2], (video(2), 2, "3s", "9s")),
    ],
)
def test_a_storyboard_that_cannot_be_rendered_is_refused(
    refused: Callable[..., str], tmp_path: Path, content: object, values: tuple[object, ...]
) -> None:
    names(refused(storyboard(tmp_path, content)), "bear.json", *values)


def test_one_bad_line_stops_all_videos_of_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    lines = ['[{"text": "a"}]', '[{"text": "b"}]', '[{"text": }]']
    found = refused(storyboard(tmp_path, "\n".join(lines), "many.jsonl"))
    names(found, "many.jsonl", video(3), line(3), column(11))


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_storyboard_that_is_not_there(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    names(refused(tmp_path / name), tmp_path / name)


# Options


@pytest.mark.parametrize(
    ("option", "value", "values"),
    [
        ("--num-steps", 0, ("num_steps", 0, 1, 1000)),
        ("--num-steps", 1001, ("num_steps", 1001, 1, 1000)),
        ("--guidance-scale", 0.5, (GUIDANCE_SCALE, 0.5, 1, 100)),
        ("--guidance-scale", 100.5, (GUIDANCE_SCALE, 100.5, 1, 100)),
        ("--guidance-scale", "nan", (GUIDANCE_SCALE, float("nan"), 1, 100)),
        ("--fps", 0, ("fps", 0, 1, 240)),
        ("--fps", 241, ("fps", 241, 1, 240)),
        ("--length", "9s", ("bear.json", 1, "9s", 3, "--length")),
    ],
)
def test_options_out_of_range_are_refused(
    refused: Callable[..., str], option: str, value: object, values: tuple[object, ...]
) -> None:
    names(refused(None, option, value), *values)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--seed", "-1"), ("--seed", 0)),
        (("--guidance", "fixed"), ("--guidance", "fixed")),
        (("--steps", "4"), ("--steps",)),
        (("--num-steps",), ("--num-steps",)),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    refused: Callable[..., str], options: tuple[str, ...], values: tuple[object, ...]
) -> None:
    names(refused(None, *options), *values)


def test_a_video_that_exists_is_not_replaced_unasked(run: Run, shared_bundle: Path, tmp_path: Path) -> None:
    many = storyboard(tmp_path, [[{"text": "a"}], [{"text": "b"}]], "many.json")
    made = tmp_path / "out/many-002/video.mp4"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"the video before")
    found = refusal(run("sample", many, "--bundle", shared_bundle, "--output-dir", tmp_path / "out"))
    names(found, made, "--overwrite", "--output-dir")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [made]
    assert made.read_bytes() == b"the video before"


def test_an_output_folder_that_is_a_file_is_refused_before_the_first_step(
    run: Run, shared_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    found = refusal(run("sample", storyboard(tmp_path), "--bundle", shared_bundle, "--output-dir", tmp_path / "out"))
    names(found, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--width", 100), ("width", 100, 16, 2, 8, 96)),
        (("--height", 63), ("height", 63, 16)),
        (("--width", -96), ("width", -96, 16)),
        (("--width", 0), ("width", 0, 16)),
        (("--width", 112), ("3s", 500, "mini_batch_size", 16)),
        (("--preset", "huge"), ("preset", "huge", "tiny", "debug", "5B")),
        (("--preset", "5B"), ("preset", "5B", "--checkpoint")),
        (("--config", "absent.toml"), ("absent.toml",)),
        (("--checkpoint", "absent"), ("absent",)),
    ],
)
def test_an_export_that_cannot_be_made_is_refused(
    run: Run, tmp_path: Path, options: tuple[object, ...], values: tuple[object, ...]
) -> None:
    names(refusal(run("export", "--output", tmp_path / "bundle", *options)), *values)
    assert list(tmp_path.iterdir()) == []


# Bundles


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_a_bundle_that_is_not_there(run: Run, refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    folder = tmp_path / "absent"
    found = refused(bundle=folder) if command == "sample" else refusal(run("inspect", folder))
    names(found, folder, "bundle.json", "ttt-video export")


@pytest.mark.parametrize(
    "name", ["transformer/model-9s.onnx", "vae_decoder/model.onnx_data", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_named(refused: Callable[..., str], bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    names(refused(bundle=bundle), bundle, name, "export")


@pytest.mark.parametrize(
    "name", ["transformer/model-3s.onnx", "text_encoder/model.onnx_data", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["changed", "cut", "longer"])
def test_a_changed_file_is_named(refused: Callable[..., str], bundle: Path, name: str, damage: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    (bundle / name).write_bytes({"changed": content, "cut": content[:-1], "longer": content + b" "}[damage])
    names(refused(bundle=bundle), bundle, name, "export")


def lead_out(manifest: Manifest, name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("transformer/model-3s.onnx")
    manifest["graphs"]["transformer-3s"]["file"] = name


def other_text_length(manifest: Manifest) -> None:
    """Fits the mini-batches as well as the graph's own does, and no input but the text shows it."""
    manifest["model"]["text_lengths"]["3s"] += 16


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda m: m.update(format_version=3), ("format_version", 3, 2)),
        (lambda m: m.update(format_version="new"), ("format_version",)),
        (lambda m: m.pop("dtype"), ("dtype",)),
        (lambda m: m.update(surprise=1), ("surprise",)),
        (lambda m: m["graphs"].pop("vae_decoder-next"), ("graphs", "vae_decoder-next")),
        (lambda m: m.update(lengths=[]), ("lengths",)),
        (lambda m: m["lengths"].append("18s"), ("graphs", "transformer-18s")),
        (lambda m: m["lengths"].append("7s"), ("lengths", "7s")),
        (lambda m: m["files"].pop("tokenizer/tokenizer.json"), ("files", "tokenizer/tokenizer.json")),
        (lambda m: lead_out(m, "../model.onnx"), ("files", "../model.onnx")),
        (lambda m: lead_out(m, "transformer/../../model.onnx"), ("files", "transformer/../../model.onnx")),
        (lambda m: lead_out(m, "/etc/hostname"), ("files", "/etc/hostname")),
        (lambda m: m["model"].update(width=97), ("width", 97, 16)),
        (lambda m: m["model"].update(width=288), ("graphs.transformer-3s", "latents", "['batch', 13, 16, 8, 12]")),
        (other_text_length, ("graphs.transformer-3s", "text", "['batch', 1, 136, 64]", "['batch', 1, 152, 64]")),
        (lambda m: m["graphs"]["transformer-3s"]["inputs"].pop(), ("graphs.transformer-3s", "timestep")),
        (lambda m: m["model"]["vae"].update(temporal_window=4), ("graphs.vae_decoder-first", "latents")),
        (lambda m: m["model"]["transformer"].update(num_heads=3), ("num_heads", 3, "model_dim", 64)),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(
    refused: Callable[..., str], bundle: Path, change: Callable[[Manifest], object], values: tuple[object, ...]
) -> None:
    edit(bundle, change)
    names(refused(bundle=bundle), bundle / "bundle.json", *values)


def test_a_manifest_that_is_no_json_is_refused(refused: Callable[..., str], bundle: Path) -> None:
    (bundle / "bundle.json").write_text('{"format_version": 1')
    names(refused(bundle=bundle), bundle / "bundle.json")


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
    assert (code, out) == (1, "") and not list((tmp_path / "out").rglob("*.mp4"))
    names(last_refusal(err), bundle / "transformer/model-3s.onnx", "latents", "['batch', 13, 16, 8, 12]")


def test_debug_shows_the_trace(run: Run, tmp_path: Path) -> None:
    code, _, err = run("inspect", tmp_path, "--debug")
    assert code == 2 and TRACE in err
    assert err.splitlines()[-1].startswith(ERROR)


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
    _, *rows = out.splitlines()
    assert [row.split()[0] for row in rows] == ["op_ttt_linear.safetensors"]
    code, out, err = run("parity", "--golden", folder, "--json")
    (row,) = json.loads(out)
    assert (code, err) == (0, "")
    assert (row["recording"], row["kind"]) == ("op_ttt_linear.safetensors", "ttt scan")
    assert 0 <= row["reference_error"] < 1e-5 and 0 <= row["onnx_error"] < 1e-5


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_parity_fails_what_does_not_agree(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    code, out, err = run("parity", "--golden", recordings(tmp_path / "golden", wrong_by=0.01), *options)
    assert code == 1 and err.startswith(ERROR)
    names(err, 1, TOLERANCE, "op_ttt_linear.safetensors")
    if options:
        assert json.loads(out)[0]["onnx_error"] == pytest.approx(0.01, rel=1e-2)


def test_parity_of_torch(run: Run, tmp_path: Path) -> None:
    code, out, err = run("parity", "--golden", recordings(tmp_path / "golden", wrong_by=0), "--engine", "torch")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["recording", "kind", "reference", "torch"]
    wrong = recordings(tmp_path / "wrong", wrong_by=0.01)
    code, out, _ = run("parity", "--golden", wrong, "--engine", "torch", "--json")
    assert code == 1 and json.loads(out)[0]["torch_error"] == pytest.approx(0.01, rel=1e-2)
    names(refusal(run("parity", "--golden", wrong, "--engine", "tensorrt")), "--engine tensorrt", "torch")
    bundle = ("--bundle", tmp_path, "--polygraphy", tmp_path / "out")
    names(refusal(run("parity", *bundle, "--engine", "torch")), "--engine torch", "--golden")


def test_parity_names_what_is_damaged(run: Run, tmp_path: Path) -> None:
    folder = recordings(tmp_path / "golden", wrong_by=0)
    path = folder / "op_ttt_linear.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = run("parity", "--golden", folder)
    assert code == 2 and err.startswith(ERROR)
    names(err, path)


def test_inspect_prints_the_manifest(run: Run, shared_bundle: Path) -> None:
    code, out, err = run("inspect", shared_bundle, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["manifest"] == json.loads((shared_bundle / "bundle.json").read_bytes())
    code, out, err = run("inspect", shared_bundle)
    assert (code, err) == (0, "")
    for value in ("tiny", "TTT-linear", "float32", "96x64", "3s", "9s"):
        assert holds(out, value)
    assert "latents float32['batch', 37, 16, 8, 12]" in out and "text float32['batch', 3, 152, 64]" in out


def test_inspect_names_a_changed_file(run: Run, bundle: Path) -> None:
    digest = sha256_of(bundle / "vae_decoder/next.onnx")
    with (bundle / "vae_decoder/next.onnx").open("ab") as file:
        file.write(b"\0")
    assert sha256_of(bundle / "vae_decoder/next.onnx") != digest
    names(refusal(run("inspect", bundle)), bundle, "vae_decoder/next.onnx")


def test_both_ways_to_start_print_the_same_help() -> None:
    def help_of(*start: str) -> str:
        command = [sys.executable, *start, "sample", "--help"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    found = help_of("cli.py")
    assert found == help_of("-m", "ttt_video_engine.cli")
    for option in ("--bundle", "--output-dir", "--num-steps", "--guidance-scale", "--sampler", "--low-memory"):
        assert option in found
