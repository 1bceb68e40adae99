"""Weights from files: the formats that are read, what is said of those that do not fit, and code that never runs."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from ttt_video_engine.export.source import CheckpointSource
from ttt_video_engine.reference.checkpoint import (
    find_weights,
    load_strictly,
    read_state_dict,
    text_encoder_weights,
    transformer_weights,
    vae_weights,
)
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.errors import CheckpointError
from ttt_video_engine.runtime.presets import tiny

State = dict[str, Tensor]


class Evil:
    """What pickle would run while it reads the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def transformer_state() -> State:
    return seeded(lambda: DiffusionTransformer(tiny("mlp").transformer), 5).state_dict()


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "dit."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_transformer_from_pt(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = transformer_state()
    content: dict[str, object] = {prefix + name: value for name, value in state.items()}
    torch.save({wrapper: content, "step": 3} if wrapper else content, tmp_path / "model.pt")
    assert same(transformer_weights(read_state_dict(tmp_path / "model.pt")), state)


def test_a_transformer_from_pt_of_before_zip_archives(tmp_path: Path) -> None:
    state = transformer_state()
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "model.pt"), state)


def test_a_transformer_from_safetensors(tmp_path: Path) -> None:
    state = transformer_state()
    save_file({f"dit.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    loaded = DiffusionTransformer(tiny("mlp").transformer)
    load_strictly(loaded, transformer_weights(read_state_dict(tmp_path / "model.safetensors")), tmp_path)
    assert same(loaded.state_dict(), state)


def test_weights_stored_in_bfloat16_are_loaded_as_float32(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in transformer_state().items()}
    loaded = DiffusionTransformer(tiny("mlp").transformer)
    load_strictly(loaded, state, tmp_path)
    assert same(loaded.state_dict(), {name: value.float() for name, value in state.items()})


def test_the_vae_file_holds_more_than_the_decoder(tmp_path: Path) -> None:
    state = seeded(lambda: VaeDecoder(tiny("linear").vae), 5).state_dict()
    (tmp_path / "vae").mkdir()
    others = {"encoder.conv_in.conv.weight": torch.ones(2), "loss.logvar": torch.ones(1)}
    content = {"state_dict": others | {f"decoder.{name}": value for name, value in state.items()}, "epoch": 1}
    torch.save(content, tmp_path / "vae/3d-vae.pt")
    assert same(vae_weights(read_state_dict(tmp_path / "vae/3d-vae.pt")), state)
    assert same(CheckpointSource(tiny("linear"), tmp_path).vae_decoder().state_dict(), state)


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
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    published = architecture(config).eval()
    published.save_pretrained(tmp_path / "text_encoder")
    encoder = CheckpointSource(tiny("linear"), tmp_path).text_encoder()

    scene_tokens = [sizes.vocab_size - 2, sizes.vocab_size - 1]
    ids = torch.tensor([[5, 17, 1, 0, 0], [*scene_tokens, 3, 1, 0]])
    with torch.no_grad():
        expected = published.get_encoder()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder(ids), expected)
    assert encoder.t5.shared.weight.shape == (sizes.vocab_size, sizes.d_model)


def test_a_t5_with_too_few_rows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"have 10 rows; must be at least 12"):
        text_encoder_weights({"shared.weight": torch.ones(10, 4)}, vocab_size=12)
    with pytest.raises(CheckpointError, match=r"have 0 rows"):
        text_encoder_weights({"encoder.final_layer_norm.weight": torch.ones(4)}, vocab_size=12)


def test_names_that_do_not_fit_are_listed() -> None:
    module = DiffusionTransformer(tiny("linear").transformer)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["time_embed.0.bias"]
    state["final_layer.gain"] = torch.ones(1)
    state["layers.0.seq_modeling_block.q.weight"] = torch.ones(3, 4)
    with pytest.raises(CheckpointError) as caught:
        load_strictly(module, state, Path("model.pt"))
    assert str(caught.value) == (
        "model.pt: does not fit the model: 1 missing: time_embed.0.bias; 1 unexpected: final_layer.gain; "
        "1 misshapen: layers.0.seq_modeling_block.q.weight [3, 4] (must be [64, 64]); "
        "check the config and the checkpoint's stage"
    )
    assert same(module.state_dict(), before), "a checkpoint that does not fit must not be loaded in part"


def test_many_names_are_counted() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_strictly(torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(4)]), {}, Path("model.pt"))
    assert "8 missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    state = {"state_dict": {"weight": torch.ones(2), "extra": Evil(marker)}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    message_of(path)
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
    message_of(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"PK\x03\x04nothing", b"version https://git-lfs.github.com"])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message_of(tmp_path / name)


def test_a_file_without_a_state_dict_is_named(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "model.pt")
    assert "holds a list; must be a state dict" in message_of(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    message_of(tmp_path / "zip.pt")


def test_a_folder_must_hold_one_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold one .* file; found none"):
        find_weights(tmp_path / "absent")
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"must hold one .* file; found none"):
        find_weights(tmp_path)
    (tmp_path / "a.pt").touch()
    assert find_weights(tmp_path) == tmp_path / "a.pt"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"found a\.pt, b\.safetensors"):
        find_weights(tmp_path)
