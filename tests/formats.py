"""The formats that checkpoints come in, written by the libraries that write them."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

State = dict[str, Tensor]


def save_pickled(state: State, folder: Path) -> None:
    torch.save({"model": state}, folder / "model.pt")


def save_safetensors(state: State, folder: Path) -> None:
    save_file(state, folder / "model.safetensors")


def save_shards(state: State, folder: Path) -> None:
    """As transformers and diffusers write them."""
    _save_shards(state, folder, "model{suffix}.safetensors", save_file)


def save_pickled_shards(state: State, folder: Path) -> None:
    """As transformers wrote them before there was safetensors."""
    _save_shards(state, folder, "pytorch_model{suffix}.bin", torch.save)


def _save_shards(state: State, folder: Path, pattern: str, save: Callable[[State, Path], None]) -> None:
    plan = split_torch_state_dict_into_shards(state, max_shard_size="200KB", filename_pattern=pattern)
    assert len(plan.filename_to_tensors) > 2
    for file, names in plan.filename_to_tensors.items():
        save({name: state[name] for name in names}, folder / file)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / f"{pattern.format(suffix='')}.index.json").write_text(json.dumps(index))


def save_distributed(content: Mapping[str, object], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process
        save_checkpoint(dict(content), checkpoint_id=folder, no_dist=True)


FORMATS: dict[str, Callable[[State, Path], None]] = {
    "pickled": save_pickled,
    "safetensors": save_safetensors,
    "shards": save_shards,
    "pickled shards": save_pickled_shards,
    "distributed": save_distributed,
    "distributed, under model": lambda state, folder: save_distributed({"model": state}, folder),
}
