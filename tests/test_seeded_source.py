"""Random weights: made when they are read, one component at a time, and freed once they are written."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from ttt_video_engine.export.graphs.weights import lay_out, write_weights
from ttt_video_engine.export.sources.source import SeededSource, components_of
from ttt_video_engine.export.sources.tokenizer import tiny_prose, train_tokenizer
from ttt_video_engine.planning.report import source_options
from ttt_video_engine.planning.shapes import MOST_SEEDED_TOKENS
from ttt_video_engine.reference import initialise
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.presets import preset, tiny


class Made:
    """The weights of every module that was made from a seed, while they are somewhere in memory."""

    def __init__(self) -> None:
        self.modules: list[list[weakref.ref[torch.UntypedStorage]]] = []

    def alive(self) -> list[int]:
        """Of each module, how many weights are in memory."""
        gc.collect()
        return [sum(storage() is not None for storage in module) for module in self.modules]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made, build_seeded = Made(), seeded

    def recorded(build: object, seed: int) -> nn.Module:
        module: nn.Module = build_seeded(build, seed)  # type: ignore[arg-type]
        # A storage is one object in Python for as long as it is in memory.
        made.modules.append([weakref.ref(value.untyped_storage()) for value in module.parameters()])
        return module

    monkeypatch.setattr(initialise, "seeded", recorded)
    return made


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae_decoder"])
def test_the_weights_are_those_of_the_seeded_module(component: str) -> None:
    described = components_of(SeededSource(tiny("mlp"), seed=7))[component]
    expected = seeded(described.build, 7).state_dict()
    assert same({name: stored.read() for name, stored in described.weights.items()}, dict(expected))
    assert same(dict(described.load().state_dict()), dict(expected))
    for name, stored in described.weights.items():
        assert (stored.shape, stored.dtype) == (tuple(expected[name].shape), expected[name].dtype)
    shared = {(value.data_ptr(), value.shape) for value in expected.values()}
    assert len({id(stored) for stored in described.weights.values()}) == len(shared)


def test_describing_a_model_makes_no_weights(made: Made) -> None:
    for described in components_of(SeededSource(tiny("linear"), seed=0)).values():
        lay_out(described.weights, Path("model.onnx_data"), torch.float32)
    assert made.modules == []


def test_a_component_is_made_once_to_be_written_and_not_kept(tmp_path: Path, made: Made) -> None:
    for number, (name, described) in enumerate(components_of(SeededSource(tiny("linear"), seed=0)).items(), 1):
        file = lay_out(described.weights, tmp_path / name, torch.float32)
        write_weights(described.weights, file, torch.float32, {})
        assert len(made.modules) == number
        assert made.alive() == [0] * number


def test_a_component_is_made_once_to_be_loaded(made: Made) -> None:
    for number, described in enumerate(components_of(SeededSource(tiny("linear"), seed=0)).values(), 1):
        module = described.load()
        assert len(made.modules) == number and module is not None
        assert made.alive() == [0] * number


def test_one_component_is_in_memory_where_reading_was_stopped(made: Made) -> None:
    components = components_of(SeededSource(tiny("linear"), seed=0))
    for described in components.values():
        next(iter(described.weights.values())).read()
    assert [alive > 0 for alive in made.alive()] == [False, False, True]


def with_vocabulary(model: ModelConfig, name: str, vocab_size: int) -> ModelConfig:
    return replace(model, name=name, text_encoder=replace(model.text_encoder, vocab_size=vocab_size))


def test_the_largest_vocabulary_is_what_the_prose_has_pieces_for() -> None:
    assert train_tokenizer(tiny_prose(), MOST_SEEDED_TOKENS).get_vocab_size() == MOST_SEEDED_TOKENS
    with pytest.raises(ConfigError):
        train_tokenizer(tiny_prose(), MOST_SEEDED_TOKENS + 1)


@pytest.mark.parametrize(
    "model", [preset("5B"), replace(preset("5B"), name="mine"), with_vocabulary(tiny("mlp"), "mine", 2019)]
)
def test_a_model_without_a_tokenizer_of_its_own_needs_a_checkpoint(model: ModelConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        SeededSource(model, seed=0)
    for part in (model.name, str(model.text_encoder.vocab_size), str(MOST_SEEDED_TOKENS), "--checkpoint"):
        assert part in str(caught.value)
    assert source_options(model, None)[-2:] == ["--checkpoint", "CHECKPOINT"]


@pytest.mark.parametrize("model", [tiny("mlp"), with_vocabulary(tiny("mlp"), "5B", 2002)])
def test_a_model_of_any_name_with_a_small_vocabulary_can_be_seeded(model: ModelConfig) -> None:
    SeededSource(model, seed=0)
    assert "--checkpoint" not in source_options(model, None)
    assert source_options(model, Path("weights"))[-2:] == ["--checkpoint", "weights"]
