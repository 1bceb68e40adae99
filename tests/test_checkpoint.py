"""Weights from files: the formats that are read, what is said of those that do not fit, and code that never runs."""

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from formats import save_distributed, save_pickled_shards, save_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.sources.source import CheckpointSource, Component
from ttt_video_engine.reference.checkpoints.lazy import LazyStateDict, LazyTensor, open_state
from ttt_video_engine.reference.checkpoints.upstream import (
    check_fit,
    text_encoder_weights,
    transformer_weights,
    vae_weights,
)
from ttt_video_engine.reference.initialise import on_meta_device, seeded
from ttt_video_engine.reference.rope import rotary_angles
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.vae import VaeDecoder
from ttt_video_engine.runtime.errors import CheckpointError
from ttt_video_engine.runtime.files import sha256_of
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


def transformer_of(weights: LazyStateDict) -> DiffusionTransformer:
    return Component(lambda: DiffusionTransformer(tiny("mlp").transformer), weights, "a file").load()


def stored(state: State) -> LazyStateDict:
    """As if it lay in a file."""
    return {name: LazyTensor(tuple(value.shape), value.dtype, value.clone) for name, value in state.items()}


def read(state: LazyStateDict) -> State:
    """All of it; what is described must be what is read."""
    tensors = {name: value.read() for name, value in state.items()}
    for name, value in state.items():
        assert (value.shape, value.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
    return tensors


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_state(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


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
    with pytest.raises(CheckpointError, match=r"have 10 rows; must be at least 12"):
        text_encoder_weights(stored({"shared.weight": torch.ones(10, 4)}), vocab_size=12)
    with pytest.raises(CheckpointError, match=r"have 0 rows"):
        text_encoder_weights(stored({"encoder.final_layer_norm.weight": torch.ones(4)}), vocab_size=12)


def test_names_that_do_not_fit_are_listed() -> None:
    module = on_meta_device(lambda: DiffusionTransformer(tiny("linear").transformer))
    state = {name: torch.ones(value.shape) for name, value in module.state_dict().items()}
    del state["time_embed.0.bias"]
    state["final_layer.gain"] = torch.ones(1)
    state["layers.0.seq_modeling_block.q.weight"] = torch.ones(3, 4)
    with pytest.raises(CheckpointError) as caught:
        check_fit(stored(state), module, Path("model.pt"))
    assert str(caught.value) == (
        "model.pt: does not fit the model: 1 missing: time_embed.0.bias; 1 unexpected: final_layer.gain; "
        "1 misshapen: layers.0.seq_modeling_block.q.weight [3, 4] (must be [64, 64]); "
        "check --preset or --config"
    )


def test_the_other_kind_of_ttt_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    torch.save(transformer_state(), tmp_path / "transformer/model.pt")
    with pytest.raises(CheckpointError) as caught:
        CheckpointSource(tiny("linear"), tmp_path).transformer()
    assert str(caught.value) == f"{tmp_path / 'transformer'}: has TTT layers of kind mlp, not linear; use --ttt mlp"


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(
        CheckpointError, match=r"text_encoder: is missing; a checkpoint has transformer/, vae/, text_enc"
    ):
        CheckpointSource(tiny("linear"), tmp_path).text_encoder()


def test_many_names_are_counted() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_fit({}, torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(4)]), Path("model.pt"))
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


def test_a_folder_must_hold_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert message_of(tmp_path).endswith("; has none")
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert same(read(open_state(tmp_path)), {"weight": torch.ones(2)})
    torch.save({}, tmp_path / "b.pt")
    assert message_of(tmp_path).endswith("; has a.safetensors, b.pt")
    with pytest.raises(CheckpointError, match=r"absent: is missing; a checkpoint has"):
        open_state(tmp_path / "absent")


# Shards


@pytest.mark.parametrize("save", [save_shards, save_pickled_shards])
def test_a_transformer_in_shards(tmp_path: Path, save: Callable[[State, Path], None]) -> None:
    state = transformer_state()
    save({f"dit.{name}": value for name, value in state.items()}, tmp_path)
    assert same(read(transformer_weights(open_state(tmp_path))), state)


def test_of_two_kinds_of_shards_those_of_safetensors_are_read(tmp_path: Path) -> None:
    state = transformer_state()
    save_shards(state, tmp_path)
    save_pickled_shards({name: value + 1 for name, value in state.items()}, tmp_path)
    assert same(read(open_state(tmp_path)), state)
    (tmp_path / "model.fp16.safetensors.index.json").touch()
    assert message_of(tmp_path).endswith("; has model.fp16.safetensors.index.json, model.safetensors.index.json")


def test_code_in_a_pickled_shard_does_not_run(tmp_path: Path) -> None:
    save_pickled_shards(transformer_state(), tmp_path)
    shard, marker = min(tmp_path.glob("*.bin")), tmp_path / "ran"
    torch.save({"weight": Evil(marker)}, shard)
    assert message_of_folder(tmp_path).startswith(f"{shard}: is not a plain file of weights (")
    assert not marker.exists()


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    save_shards(transformer_state(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_bytes())
    name, shard = next(iter(whole["weight_map"].items()))

    def message() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_state(tmp_path)
        return str(caught.value)

    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "surprise": shard}}))
    assert message() == f"{tmp_path / shard}: has no surprise, {index.name} says it does; fetch the file again"
    index.write_text(json.dumps({"weight_map": {name: "../" + shard}}))
    assert message() == f"{index}: '../{shard}' leads out of the folder; fetch the file again"
    index.write_text(json.dumps({"weight_map": [name]}))
    assert message() == f"{index}: has no weight_map of names to files; fetch the file again"
    index.write_text(json.dumps(whole)[:-9])
    assert message().startswith(f"{index}: cannot be read (")
    index.write_text(json.dumps(whole))
    content = (tmp_path / shard).read_bytes()
    (tmp_path / shard).write_bytes(content[:-1])
    assert message().startswith(f"{tmp_path / shard}: cannot be read (")
    (tmp_path / shard).unlink()
    assert message() == f"{tmp_path / shard}: is missing, {index.name} names it; fetch the file again"


# Torch distributed checkpoints


@pytest.mark.parametrize("prefix", ["", "dit."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_distributed_transformer(tmp_path: Path, wrapped: bool, prefix: str) -> None:
    state = {name: value.bfloat16() for name, value in transformer_state().items()}
    content: dict[str, object] = {prefix + name: value for name, value in state.items()}
    save_distributed({"model": content, "step": 3} if wrapped else content, tmp_path)
    assert same(read(transformer_weights(open_state(tmp_path))), state)


def test_a_tensor_in_chunks_of_several_ranks(tmp_path: Path) -> None:
    """As a sharded training run leaves it: rows of one tensor in the files of two ranks."""
    save_distributed({"weight": torch.arange(12.0).view(4, 3)}, tmp_path)
    table = pickle.loads((tmp_path / ".metadata").read_bytes())
    (index, place), *_ = table.storage_data.items()
    chunks, places, start = [], {}, 0
    for rank, rows in enumerate((1, 3)):
        file = f"__{rank}_0.distcp"
        torch.save(torch.arange(12.0).view(4, 3)[start : start + rows].clone(), tmp_path / file)
        chunks.append(ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([rows, 3])))
        length = (tmp_path / file).stat().st_size
        at = dataclasses.replace(index, offset=torch.Size([start, 0]), index=rank)
        places[at] = dataclasses.replace(place, relative_path=file, offset=0, length=length)
        start += rows
    table.state_dict_metadata["weight"].chunks = chunks
    table.storage_data = places
    (tmp_path / ".metadata").write_bytes(pickle.dumps(table))
    assert same(read(open_state(tmp_path)), {"weight": torch.arange(12.0).view(4, 3)})
    del places[at]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="has 3 of the 12 values of a tensor"):
        open_state(tmp_path)["weight"].read()


def test_a_distributed_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    save_distributed({"weight": torch.ones(1000)}, tmp_path)
    file, table = tmp_path / "__0_0.distcp", tmp_path / ".metadata"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    assert message_of_folder(tmp_path) == f"{file}: is cut off at 1,000 bytes; fetch the file again"
    file.unlink()
    assert message_of_folder(tmp_path) == f"{file}: is missing, .metadata names it; fetch the file again"
    table.write_bytes(table.read_bytes()[:100])
    assert message_of_folder(tmp_path).startswith(f"{table}: ")


def test_code_in_the_table_of_a_distributed_checkpoint_does_not_run(tmp_path: Path) -> None:
    save_distributed({"weight": torch.ones(2)}, tmp_path)
    table, marker = tmp_path / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(table.read_bytes())
    metadata.planner_data = Evil(marker)
    table.write_bytes(pickle.dumps(metadata))
    assert message_of_folder(tmp_path) == f"{table}: is not the table of a checkpoint (it names posix.system)"
    assert not marker.exists()
    pickle.loads(table.read_bytes())
    assert marker.exists(), "the table must be one that would have run its code"


def message_of_folder(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_state(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_numbers_that_are_no_weights_are_refused() -> None:
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"1 of a wrong dtype: weight torch\.int8"):
        check_fit(stored(state), module, Path("model.pt"))


# Hugging Face's CogVideoX


def cogvideox_transformer() -> CogVideoXTransformer3DModel:
    """Of the sizes of tiny."""
    config = tiny("linear").transformer
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=16,
        out_channels=16,
        time_embed_dim=config.time_embed_dim,
        text_embed_dim=config.text_dim,
        num_layers=config.num_layers,
        sample_width=12,
        sample_height=8,
        sample_frames=49,
        max_text_seq_length=136,
        use_rotary_positional_embeddings=True,
        norm_eps=config.layer_norm_eps,
    ).eval()


def test_a_cogvideox_transformer_of_diffusers(tmp_path: Path) -> None:
    """With its gates shut, a TTT-Video of one scene is the CogVideoX that it was made from."""
    config = tiny("linear").transformer
    peer = cogvideox_transformer()
    peer.save_pretrained(tmp_path / "transformer")
    lines: list[str] = []
    transformer = CheckpointSource(tiny("linear"), tmp_path, seed=3, report=lines.append).transformer().load()
    assert lines == [f"{tmp_path / 'transformer'}: has no TTT layers; they are made fresh, untrained, from seed 3"]
    for name, value in transformer.state_dict().items():
        if name.endswith("gating_alpha"):
            assert (value == 0.1).all()
            value.zero_()
    video, text = torch.randn(2, 13, 16, 8, 12), torch.randn(2, 1, 136, config.text_dim)
    timestep = torch.tensor([979, 499])
    angles = rotary_angles(13, 4, 6, config.head_dim, config.rope_theta).repeat_interleave(2, dim=-1)
    with torch.no_grad():
        found = transformer(video, text, timestep)
        rotary = (angles.cos(), angles.sin())
        expected = peer(video, text[:, 0], timestep, image_rotary_emb=rotary).sample
    assert (found - expected).abs().max() < 1e-5


def test_a_cogvideox_in_shards_is_the_same_weight_file_as_the_public_codes(tmp_path: Path) -> None:
    """Its fresh TTT layers included: what trains them further stores all of it under the public code's names."""

    peer, public = tmp_path / "cogvideox", tmp_path / "public"
    cogvideox_transformer().save_pretrained(peer / "transformer", max_shard_size="200KB")
    assert len(list((peer / "transformer").glob("*.safetensors"))) > 2
    state = CheckpointSource(tiny("linear"), peer, seed=3).transformer().load().state_dict()
    (public / "transformer").mkdir(parents=True)
    save_distributed({f"dit.{name}": value for name, value in state.items()}, public / "transformer")

    digests = set()
    for folder in (peer, public):
        transformer = CheckpointSource(tiny("linear"), folder, seed=3).transformer().load()
        digests.add(sha256_of(write_module(transformer, folder / "model.onnx_data").path))
    assert len(digests) == 1


def test_a_cogvideox_vae_of_diffusers(tmp_path: Path) -> None:
    config = tiny("linear").vae
    torch.manual_seed(0)
    peer = AutoencoderKLCogVideoX(
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=16,
        layers_per_block=config.num_res_blocks,
        sample_height=64,
        sample_width=96,
    ).eval()
    peer.save_pretrained(tmp_path / "vae")
    decoder = CheckpointSource(tiny("linear"), tmp_path).vae_decoder().load()
    latents = torch.randn(1, 16, 5, 8, 12)
    with torch.no_grad():
        found = torch.cat(list(decoder.decode(latents * config.scale_factor)), dim=2)
        expected = peer.decode(latents).sample
    assert (found - expected).abs().max() < 1e-4
