"""The VAE scale factor: a stock CogVideoX states its own, TTT-Video has that of the model."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ttt_video_engine.export.sources.source import CheckpointSource
from ttt_video_engine.export.sources.stored_scale import stored_scale_factor
from ttt_video_engine.runtime.errors import CheckpointError
from ttt_video_engine.runtime.presets import tiny

Run = Callable[..., tuple[int, str, str]]
STOCK = "transformer_blocks.0.attn1.to_q.weight"
OURS = "layers.0.seq_modeling_block.q.weight"


def config(folder: Path, content: object) -> Path:
    (folder / "vae").mkdir(exist_ok=True)
    path = folder / "vae/config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def source(folder: Path, name: str, lines: list[str]) -> CheckpointSource:
    (folder / "transformer").mkdir()
    torch.save({name: torch.ones(2)}, folder / "transformer/model.pt")
    return CheckpointSource(tiny("linear"), folder, report=lines.append).with_stored_scale()


@pytest.mark.parametrize("factor", [0.7, 1.15258426, 1])
def test_the_factor_of_a_stock_checkpoint_is_used_and_reported(tmp_path: Path, factor: float) -> None:
    path = config(tmp_path, {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": factor})
    lines: list[str] = []
    found = source(tmp_path, STOCK, lines).model
    assert found.vae.scale_factor == factor
    assert len(lines) == 1 and str(path) in lines[0] and str(float(factor)) in lines[0]
    assert found.transformer == tiny("linear").transformer and found.vae.ch == tiny("linear").vae.ch


def test_ttt_video_keeps_the_factor_of_the_model(tmp_path: Path) -> None:
    """Its transformer fixes the factor: it was trained on latents without one, whichever VAE lies beside it."""
    path = config(tmp_path, {"scaling_factor": 0.31})
    lines: list[str] = []
    assert source(tmp_path, OURS, lines).model == tiny("linear")
    assert len(lines) == 1 and str(path) in lines[0] and "0.31" in lines[0]


@pytest.mark.parametrize("content", [None, {}, {"scaling_factor": None}])
def test_a_stock_checkpoint_that_states_none_keeps_the_factor_and_says_so(tmp_path: Path, content: object) -> None:
    if content is not None:
        config(tmp_path, content)
    lines: list[str] = []
    assert source(tmp_path, STOCK, lines).model == tiny("linear")
    assert len(lines) == 1 and str(tmp_path / "vae") in lines[0]


def test_the_original_vae_states_none(tmp_path: Path) -> None:
    assert stored_scale_factor(tmp_path / "vae") is None
    (tmp_path / "vae").write_bytes(b"a file in place of the folder")
    assert stored_scale_factor(tmp_path / "vae") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[0.7]",
        "{",
        '{"scaling_factor": "0.7"}',
        '{"scaling_factor": true}',
        '{"scaling_factor": [0.7]}',
        '{"scaling_factor": 0}',
        '{"scaling_factor": -0.7}',
        '{"scaling_factor": NaN}',
        '{"scaling_factor": 1e999}',
        '{"a":' * 100_000,
        '{"scaling_factor": 0.7, "padding": "' + " " * (1 << 20) + '"}',
    ],
    ids=lambda content: content[:26],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path, content: str) -> None:
    path = config(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        stored_scale_factor(tmp_path / "vae")
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_pipe_in_place_of_the_config_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        stored_scale_factor(tmp_path)


@pytest.mark.parametrize("shape", [(10, 64), ()])
def test_embeddings_with_too_few_rows_are_named_with_their_folder(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "text_encoder").mkdir()
    torch.save({"shared.weight": torch.ones(shape)}, tmp_path / "text_encoder/model.pt")
    with pytest.raises(CheckpointError) as caught:
        CheckpointSource(tiny("linear"), tmp_path).text_encoder()
    assert str(tmp_path / "text_encoder") in str(caught.value) and "2002" in str(caught.value)


def test_a_missing_transformer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformer"):
        CheckpointSource(tiny("linear"), tmp_path).transformer()


@pytest.mark.parametrize(
    ("options", "factor"),
    [((), 0.31), (("--vae-scale-factor", "0.5"), 0.5), (("--config", "stated.toml"), 0.9)],
)
def test_what_an_option_or_the_file_states_goes_before_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], factor: float
) -> None:
    config(tmp_path, {"scaling_factor": 0.31})
    (tmp_path / "transformer").mkdir()
    torch.save({STOCK: torch.ones(2)}, tmp_path / "transformer/model.pt")
    (tmp_path / "stated.toml").write_text("[vae]\nscale_factor = 0.9\n")
    exported: list[CheckpointSource] = []
    monkeypatch.setattr(
        "ttt_video_engine.export.build.export_bundle", lambda source, *rest, **named: exported.append(source)
    )
    monkeypatch.chdir(tmp_path)
    assert run("export", "--checkpoint", tmp_path, "--output", tmp_path / "bundle", *options)[0] == 0
    assert exported[0].model.vae.scale_factor == factor
