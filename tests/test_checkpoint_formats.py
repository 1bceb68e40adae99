"""Weights in more than one file: shards, and torch's distributed checkpoints, whole and not."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import State, save_distributed, save_pickled_shards, save_shards
from messages import refused_with
from states import Evil, read, same, transformer_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from ttt_video_engine.reference.checkpoints.lazy import open_state
from ttt_video_engine.reference.checkpoints.upstream import transformer_weights
from ttt_video_engine.runtime.errors import CheckpointError

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
    both = ("model.fp16.safetensors.index.json", "model.safetensors.index.json")
    with refused_with(CheckpointError, tmp_path, *both):
        open_state(tmp_path)


def test_code_in_a_pickled_shard_does_not_run(tmp_path: Path) -> None:
    save_pickled_shards(transformer_state(), tmp_path)
    shard, marker = min(tmp_path.glob("*.bin")), tmp_path / "ran"
    torch.save({"weight": Evil(marker)}, shard)
    with refused_with(CheckpointError, shard):
        open_state(tmp_path)
    assert not marker.exists()


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    save_shards(transformer_state(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_bytes())
    name, shard = next(iter(whole["weight_map"].items()))

    def refused_naming(*values: object) -> None:
        with refused_with(CheckpointError, *values):
            open_state(tmp_path)

    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "surprise": shard}}))
    refused_naming(tmp_path / shard, "surprise", index.name)
    index.write_text(json.dumps({"weight_map": {name: "../" + shard}}))
    refused_naming(index, f"../{shard}")
    index.write_text(json.dumps({"weight_map": [name]}))
    refused_naming(index, "weight_map")
    index.write_text(json.dumps(whole)[:-9])
    refused_naming(index)
    index.write_text(json.dumps(whole))
    content = (tmp_path / shard).read_bytes()
    (tmp_path / shard).write_bytes(content[:-1])
    refused_naming(tmp_path / shard)
    (tmp_path / shard).unlink()
    refused_naming(tmp_path / shard, index.name)


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
    with refused_with(CheckpointError, tmp_path, 3, 12):
        open_state(tmp_path)["weight"].read()


def test_a_distributed_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    save_distributed({"weight": torch.ones(1000)}, tmp_path)
    file, table = tmp_path / "__0_0.distcp", tmp_path / ".metadata"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with refused_with(CheckpointError, file, 1000):
        open_state(tmp_path)
    file.unlink()
    with refused_with(CheckpointError, file, table.name):
        open_state(tmp_path)
    table.write_bytes(table.read_bytes()[:100])
    with refused_with(CheckpointError, table):
        open_state(tmp_path)


def test_code_in_the_table_of_a_distributed_checkpoint_does_not_run(tmp_path: Path) -> None:
    save_distributed({"weight": torch.ones(2)}, tmp_path)
    table, marker = tmp_path / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(table.read_bytes())
    metadata.planner_data = Evil(marker)
    table.write_bytes(pickle.dumps(metadata))
    with refused_with(CheckpointError, table, "posix.system"):
        open_state(tmp_path)
    assert not marker.exists()
    pickle.loads(table.read_bytes())
    assert marker.exists(), "the table must be one that would have run its code"
