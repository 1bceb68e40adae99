"""A stock CogVideoX folder, exported and rendered by the commands, beside diffusers' own pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from diffusers import CogVideoXPipeline
from messages import ERROR, names, refusal
from numpy.typing import NDArray
from PIL import Image
from stand_in import render
from stock_cogvideox import FACTOR, HEIGHT, TEXT_LENGTH, WIDTH, load_stock, save_stock

from ttt_video_engine.commands.export import export
from ttt_video_engine.runtime.bundle import MANIFEST, open_bundle
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.events import Event, RenderWarning
from ttt_video_engine.runtime.settings import Guidance, Settings
from ttt_video_engine.runtime.step_state import LATENTS, new_generator
from ttt_video_engine.runtime.storyboard import load_storyboards
from ttt_video_engine.runtime.tensor_file import load_tensors

Run = Callable[..., tuple[int, str, str]]

PROMPT, NEGATIVE, SEED, STEPS = "A brown bear beats eggs in a yellow bowl.", "Blurry, grainy.", 7, 5
SHAPE = (1, 13, 16, HEIGHT // FACTOR, WIDTH // FACTOR)
ONE_LEVEL = 1


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that users download, half precision and in shards."""
    folder = tmp_path_factory.mktemp("cogvideox")
    save_stock(folder)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def exported(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle. No size is stated: all are the folder's."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    export(bundle, ttt="none", checkpoint=stock)
    return bundle


def rendered(run: Run, bundle: Path, folder: Path, *options: object) -> Path:
    """The folder of a video of PROMPT."""
    texts = ("--prompt", PROMPT, "--negative-prompt", NEGATIVE)
    settings = ("--num-steps", STEPS, "--seed", SEED, *options)
    code, _, err = run("sample", "--bundle", bundle, "--output-dir", folder, *texts, *settings)
    assert (code, err.count(ERROR)) == (0, 0), err
    (video,) = (path for path in folder.iterdir() if path.is_dir())
    return video


def expected(pipeline: CogVideoXPipeline, output: str, *, dynamic: bool) -> NDArray[np.float32]:
    noise = torch.from_numpy(new_generator(SEED).standard_normal(SHAPE, dtype=np.float32))
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    found = pipeline(
        **texts, num_inference_steps=STEPS, latents=noise, output_type=output, use_dynamic_cfg=dynamic
    ).frames
    return np.asarray(found, dtype=np.float32)


def latents_of(video: Path) -> NDArray[np.float32]:
    latents, _ = load_tensors(video / LATENTS, {"latents": SHAPE})
    return latents["latents"]


def levels(folder: Path) -> NDArray[np.int64]:
    """Frames [T, height, width, 3] of a folder of PNG files, from 0 to 255."""
    return np.stack([np.asarray(Image.open(path), dtype=np.int64) for path in sorted(folder.glob("*.png"))])


def test_a_stock_folder_is_rendered_as_diffusers_renders_it(
    run: Run, stock: Path, exported: Path, tmp_path: Path
) -> None:
    """Without an option, and with what its pipeline calls dynamic."""
    pipeline = load_stock(stock)
    videos: dict[Guidance, Path] = {
        "constant": rendered(run, exported, tmp_path / "plain"),
        "upstream": rendered(run, exported, tmp_path / "dynamic", "--guidance", "upstream"),
    }
    for guidance, video in videos.items():
        error = np.abs(latents_of(video) - expected(pipeline, "latent", dynamic=guidance == "upstream")).max()
        assert error < 1e-4, guidance
    assert np.abs(latents_of(videos["constant"]) - latents_of(videos["upstream"])).max() > 0.01

    code, _, err = run("decode", videos["constant"], "--bundle", exported, "--png-sequence", tmp_path / "png")
    assert code == 0, err
    frames = np.round(255 * expected(pipeline, "np", dynamic=False)[0]).astype(np.int64)
    assert frames.shape == (49, HEIGHT, WIDTH, 3) and frames.std() > 10
    assert np.abs(levels(tmp_path / "png") - frames).max() <= ONE_LEVEL
    sidecar = json.loads((videos["constant"] / "video.json").read_text())
    assert (sidecar["settings"]["fps"], sidecar["bundle"]["ttt"], sidecar["num_frames"]) == (8, "none", 49)


def test_what_the_commands_say_of_it(run: Run, stock: Path, exported: Path, tmp_path: Path) -> None:
    manifest = open_bundle(exported).manifest
    assert manifest.lengths == ("3s",)
    assert manifest.model.text_lengths == {"3s": TEXT_LENGTH}
    assert manifest.defaults == Settings(fps=8, guidance="constant")
    transformer = onnx.load(exported / manifest.graphs["transformer-3s"].file, load_external_data=False)
    assert {node.domain for node in transformer.graph.node} == {""} and not transformer.functions
    assert run("inspect", exported)[0] == 0

    code, out, _ = run("plan", "--ttt", "none", "--checkpoint", stock, "--json")
    planned = json.loads(out)
    assert code == 0
    assert msgspec.convert(planned["model"], ModelConfig) == manifest.model
    for folder, options in ((stock, ()), ("CHECKPOINT", ("--bundle", exported))):
        _, out, _ = run("plan", *(options or ("--ttt", "none", "--checkpoint", stock)), "--length", "9s", "--json")
        command = json.loads(out)["commands"][0].split()
        assert command[:6] == ["ttt-video", "export", "--ttt", "none", "--checkpoint", str(folder)]


def test_other_defaults_change_no_file_but_the_manifest(run: Run, stock: Path, exported: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    code, _, err = run("export", "--ttt", "none", "--checkpoint", stock, "--output", bundle, "--fps", 12)
    assert code == 0, err
    old, new = open_bundle(exported).manifest, open_bundle(bundle).manifest
    assert (new.defaults, new.files) == (Settings(fps=12, guidance="constant"), old.files)
    names(refusal(run("export", "--output", bundle, "--fps", 0)), "fps", 0)


@pytest.fixture
def without_ttt(bundle: Path) -> Path:
    """A bundle of several scenes whose model is said to have no TTT; for a stand-in that runs no graph."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["model"]["transformer"] |= {"ttt": "none", "mini_batch_size": 1}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return bundle


def test_scene_tokens_are_left_out(run: Run, without_ttt: Path, tmp_path: Path) -> None:
    """CogVideoX has none: where a storyboard asks for them, a line says so."""
    file = tmp_path / "scenes.json"
    file.write_text(json.dumps([{"text": text, "requires_scene_transition": text > "A"} for text in "ABC"]))
    code, out, _ = run("check", file, "--bundle", without_ttt, "--json")
    (checked,) = json.loads(out)["videos"]
    assert code == 0
    assert [scene["starts"] or scene["ends"] for scene in checked["scenes"]] == [False, False, False]
    names(checked["warnings"][0], "scenes.json", 2, 3)

    events: list[Event] = []
    render(without_ttt, tmp_path, *load_storyboards(file), on_event=events.append)
    (warning,) = (event.message for event in events if isinstance(event, RenderWarning))
    names(warning, "scenes.json", 2, 3)
    assert (tmp_path / "scenes" / "prompt.txt").read_text() == "A\n\nB\n\nC"
    assert (tmp_path / "scenes" / "video.json").exists()
