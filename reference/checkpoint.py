"""Weights from files: read without running code in them, and fitted to a module strictly, by name."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ttt_video_engine.runtime.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".bin")
_LISTED = 5


def find_weights(folder: Path) -> Path:
    """The one weight file of a folder. Raises CheckpointError where there is none, or more than one."""
    found = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES) if folder.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder}: must hold one {' or '.join(SUFFIXES)} file; found {names}")
    return found[0]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pt whose state dict is at the top or under `state_dict` or `model`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files from before torch 1.6 are no zip archives, and only those can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); fetch the file again") from error
    except Exception as error:  # pickle's own class is UnpicklingError, but a damaged stream raises almost anything
        raise CheckpointError(f"{path}: is not a plain file of weights ({_first_line(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; must be a state dict")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def transformer_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the public code without their `dit.` prefix."""
    return {name.removeprefix("dit."): value for name, value in state.items()}


def vae_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's part of `3d-vae.pt`, without its `decoder.` prefix."""
    return {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}


def text_encoder_weights(state: Mapping[str, Tensor], *, vocab_size: int) -> dict[str, Tensor]:
    """The encoder's part of a T5, its embeddings cut to `vocab_size` rows: the last two become the scene tokens."""
    encoder = {name: value for name, value in state.items() if name.startswith(("shared.", "encoder."))}
    embeddings = encoder.pop("shared.weight", encoder.get("encoder.embed_tokens.weight"))
    if embeddings is None or embeddings.shape[0] < vocab_size:
        rows = 0 if embeddings is None else embeddings.shape[0]
        raise CheckpointError(f"T5 embeddings (shared.weight) have {rows} rows; must be at least {vocab_size}")
    encoder["encoder.embed_tokens.weight"] = encoder["shared.weight"] = embeddings[:vocab_size]
    return {f"t5.{name}": value for name, value in encoder.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copies `state` into `module`. Raises CheckpointError listing names that are missing, unexpected or misshapen."""
    expected = module.state_dict()
    problems = [
        _listing("missing", [name for name in expected if name not in state]),
        _listing("unexpected", [name for name in state if name not in expected]),
        _listing(
            "misshapen",
            [
                f"{name} {list(state[name].shape)} (must be {list(value.shape)})"
                for name, value in expected.items()
                if name in state and state[name].shape != value.shape
            ],
        ),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{source}: does not fit the model: {found}; check the config and the checkpoint's stage")
    module.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED])}{rest}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
