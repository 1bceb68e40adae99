"""Weights from files: what is read from one, what is said of those that do not fit, and code that never runs."""

import zipfile
from pathlib import Path

import pytest
import torch
from messages import holds, names, numbers, refused_with
from safetensors.torch import save_file
from states import Evil, read, same, stored, transformer_of, transformer_state
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from ttt_video_engine.export.sources.source import CheckpointSource
from ttt_video_engine.reference.checkpoints.lazy import open_state
from ttt_video_engine.reference.checkpoints.upstream import (
    check_fit,
    text_encoder_weights,
    transformer_weights,
    vae_weights,
)
from ttt_video_engine.reference.initialise import on_meta_device, seeded
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.errors import CheckpointError
from ttt_video_engine.runtime.presets import tiny

FOLDERS = ("transformer/", "vae/", "text_encoder/", "tokenizer/")
"""What a checkpoint holds."""


@pytest.mark.parametrize("prefix", ["", "dit."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_transformer_from_pt(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = transformer_state()
    content: dict[str, object] = {prefix + name: value for name, value in state.items()}
    torch.save({wrapper: content, "step": 3} if wrapper else content, tmp_path / "model.pt")
    assert same(read(transformer_weights(open_state(tmp_path / "model.pt"))), state)


def test_a_transformer_from_pt_of_before_zip_archives(tmp_path: Path) -> None:
    state = transformer_state()
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert same(read(open_state(tmp_path / "model.pt")), state)


def test_a_transformer_from_safetensors(tmp_path: Path) -> None:
    state = transformer_state()
    save_file({f"dit.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    weights = transformer_weights(open_state(tmp_path / "model.safetensors"))
    assert same(transformer_of(weights).state_dict(), state)


def test_weights_stored_in_bfloat16_are_loaded_as_float32(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in transformer_state().items()}
    loaded = transformer_of(stored(state))
    assert same(loaded.state_dict(), {name: value.float() for name, value in state.items()})


def test_the_vae_file_holds_more_than_the_decoder(tmp_path: Path) -> None:
    state = seeded(lambda: VaeDecoder(tiny("linear").vae), 5).state_dict()
    (tmp_path / "vae").mkdir()
    others = {"encoder.conv_in.conv.weight": torch.ones(2), "loss.logvar": torch.ones(1)}
    content = {"state_dict": others | {f"decoder.{name}": value for name, value in state.items()}, "epoch": 1}
    torch.save(content, tmp_path / "vae/3d-vae.pt")
    assert same(read(vae_weights(open_state(tmp_path / "vae/3d-vae.pt"), tiny("linear").vae)), state)
    assert same(CheckpointSource(tiny("linear"), tmp_path).vae_decoder().load().state_dict(), state)


@pytest.mark.parametrize("architecture", [T5EncoderModel, T5ForConditionalGeneration])
def test_a_t5_of_transformers_is_cut_to_the_vocabulary(
    tmp_path: Path, architecture: type[T5EncoderModel] | type[T5ForConditionalGeneration]
) -> None:
    sizes = tiny("linear").text_encoder
    config = T5Config(
        vocab_size=sizes.vocab_size + 26,
        d_model=sizes.d_model,
        d_kv=sizes.d_kv,
        d_ff=sizes.d_ff,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # type: ignore[call-arg]  # of its base class
    )
    torch.manual_seed(0)
    published = architecture(config)
    published.train(False)
    published.save_pretrained(tmp_path / "text_encoder")
    encoder = CheckpointSource(tiny("linear"), tmp_path).text_encoder().load()

    scene_tokens = [sizes.vocab_size - 2, sizes.vocab_size - 1]
    ids = torch.tensor([[5, 17, 1, 0, 0], [*scene_tokens, 3, 1, 0]])
    with torch.no_grad():
        expected = published.get_encoder()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder(ids), expected)
    assert encoder.t5.shared.weight.shape == (sizes.vocab_size, sizes.d_model)


def test_a_t5_with_too_few_rows_is_refused() -> None:
    with refused_with(CheckpointError, "shared.weight", 10, 12):
        text_encoder_weights(stored({"shared.weight": torch.ones(10, 4)}), vocab_size=12)
    with refused_with(CheckpointError, "shared.weight", 0, 12):
        text_encoder_weights(stored({"encoder.final_layer_norm.weight": torch.ones(4)}), vocab_size=12)


def test_names_that_do_not_fit_are_listed() -> None:
    module = on_meta_device(lambda: DiffusionTransformer(tiny("linear").transformer))
    state = {name: torch.ones(value.shape) for name, value in module.state_dict().items()}
    del state["time_embed.0.bias"]
    state["final_layer.gain"] = torch.ones(1)
    state["layers.0.seq_modeling_block.q.weight"] = torch.ones(3, 4)
    misshapen = ("layers.0.seq_modeling_block.q.weight", [3, 4], [64, 64])
    with refused_with(CheckpointError, "model.pt", "time_embed.0.bias", "final_layer.gain", *misshapen) as caught:
        check_fit(stored(state), module, Path("model.pt"))
    names(str(caught.value), "--preset", "--config")
    assert numbers(str(caught.value)) == [1, 1, 1, 3, 4, 64, 64], "one of each is said, and the shapes"


def test_the_other_kind_of_ttt_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    torch.save(transformer_state(), tmp_path / "transformer/model.pt")
    with refused_with(CheckpointError, tmp_path / "transformer", "mlp", "linear", "--ttt mlp"):
        CheckpointSource(tiny("linear"), tmp_path).transformer()


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with refused_with(CheckpointError, tmp_path / "text_encoder", *FOLDERS):
        CheckpointSource(tiny("linear"), tmp_path).text_encoder()


def test_many_names_are_counted() -> None:
    listed = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")
    with refused_with(CheckpointError, "model.pt", 8, *listed, 3) as caught:
        check_fit({}, torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(4)]), Path("model.pt"))
    assert not holds(str(caught.value), "2.bias")


def test_numbers_that_are_no_weights_are_refused() -> None:
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}
    with refused_with(CheckpointError, "model.pt", 1, "weight", "torch.int8"):
        check_fit(stored(state), module, Path("model.pt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    state = {"state_dict": {"weight": torch.ones(2), "extra": Evil(marker)}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with refused_with(CheckpointError, path):
        open_state(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file must be one that would have run its code"


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    state = {"weight": torch.ones(1000), "bias": torch.ones(10)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with refused_with(CheckpointError, path):
        open_state(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"PK\x03\x04nothing", b"version https://git-lfs.github.com"])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with refused_with(CheckpointError, tmp_path / name):
        open_state(tmp_path / name)


def test_a_file_without_a_state_dict_is_named(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "model.pt")
    with refused_with(CheckpointError, tmp_path / "model.pt", "list"):
        open_state(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with refused_with(CheckpointError, tmp_path / "zip.pt"):
        open_state(tmp_path / "zip.pt")


def test_a_folder_must_hold_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with refused_with(CheckpointError, tmp_path) as caught:
        open_state(tmp_path)
    assert not holds(str(caught.value), "config.json")
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert same(read(open_state(tmp_path)), {"weight": torch.ones(2)})
    torch.save({}, tmp_path / "b.pt")
    with refused_with(CheckpointError, tmp_path, "a.safetensors", "b.pt"):
        open_state(tmp_path)
    with refused_with(CheckpointError, tmp_path / "absent", *FOLDERS):
        open_state(tmp_path / "absent")
