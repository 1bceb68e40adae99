"""Translates the names of published checkpoints to the reference's, and checks that weights fit its modules."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ttt_video_engine.reference.checkpoints.cogvideox import (
    cogvideox_transformer,
    cogvideox_vae_decoder,
    is_cogvideox_transformer,
    is_cogvideox_vae,
)
from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict, LazyTensor
from ttt_video_engine.runtime.config import TTTKind, VaeConfig
from ttt_video_engine.runtime.errors import CheckpointError

_MAX_LISTED = 5


def transformer_weights(state: LazyStateDict) -> LazyStateDict:
    """The transformer's weights under the reference's names.

    `state` comes from TTT-Video's public code, with or without the prefix `dit.`, or from Hugging Face's CogVideoX.
    """
    if is_cogvideox_transformer(state):
        return cogvideox_transformer(state)
    return {name.removeprefix("dit."): value for name, value in state.items()}


def is_ttt(name: str) -> bool:
    """Whether a weight of this name belongs to a TTT layer or its gates."""
    return "seq_modeling_block.ssm." in name or "_ssm_gating_" in name


def ttt_kind(state: LazyStateDict) -> TTTKind | None:
    """The kind of the TTT layers: only an MLP has a second inner layer. None if there are no TTT layers."""
    weights = {name.rpartition(".ssm.ttt.")[2] for name in state}
    return "mlp" if "W2" in weights else "linear" if "W1" in weights else None


def vae_weights(state: LazyStateDict, config: VaeConfig) -> LazyStateDict:
    """The VAE decoder's weights under the reference's names.

    `state` comes from the original `3d-vae.pt`, whose names start with `decoder.`, or from Hugging Face's VAE.
    """
    if is_cogvideox_vae(state):
        return cogvideox_vae_decoder(state, config)
    return {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}


def text_encoder_weights(
    state: LazyStateDict, *, vocab_size: int, source: Path = Path("text_encoder")
) -> LazyStateDict:
    """The encoder's weights of a T5. Its embeddings [V, D] are cut to the first `vocab_size` rows.

    The last two of these rows are for the scene tokens. Raises CheckpointError that names `source` if V is less than
    `vocab_size`.
    """
    encoder = {name: value for name, value in state.items() if name.startswith(("shared.", "encoder."))}
    embeddings = encoder.pop("shared.weight", encoder.get("encoder.embed_tokens.weight"))
    rows = 0 if embeddings is None or not embeddings.shape else embeddings.shape[0]
    if embeddings is None or rows < vocab_size:
        raise CheckpointError(
            f"{source}: T5 embeddings (shared.weight) have {rows} rows; must be at least {vocab_size}; give T5 v1.1"
        )
    cut = replace(embeddings, shape=(vocab_size, *embeddings.shape[1:]), read=partial(_rows, embeddings, vocab_size))
    encoder["encoder.embed_tokens.weight"] = encoder["shared.weight"] = cut
    return {f"t5.{name}": value for name, value in encoder.items()}


def _rows(stored: LazyTensor, count: int) -> Tensor:
    return stored.read()[:count]


def check_fit(state: LazyStateDict, module: nn.Module, source: Path) -> None:
    """Raises CheckpointError that lists the missing, unexpected, misshapen and non-floating-point weights."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = [
        _listing("missing", [name for name in expected if name not in state]),
        _listing("unexpected", [name for name in state if name not in expected]),
        _listing(
            "misshapen",
            [
                f"{name} {list(state[name].shape)} (must be {list(shape)})"
                for name, shape in expected.items()
                if name in state and state[name].shape != shape
            ],
        ),
        _listing(
            "not floating-point",
            [f"{name} {stored.dtype}" for name, stored in state.items() if not stored.dtype.is_floating_point],
        ),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{source}: does not fit the model: {found}; check --preset or --config")


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_MAX_LISTED])}{rest}"
