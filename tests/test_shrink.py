"""Models that are too large to run where they are exported: held by a part, out of the file that is exported."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from messages import refused_with
from msgspec.structs import replace
from torch import nn

from ttt_video_engine.export.graphs.components import component_graphs
from ttt_video_engine.export.graphs.graph import Graph
from ttt_video_engine.export.graphs.weights import WeightFile, write_module
from ttt_video_engine.export.parity import shrink
from ttt_video_engine.export.parity.gate import Gate
from ttt_video_engine.export.parity.shrink import describe_subset, full_weight_name, shrink_config
from ttt_video_engine.export.sources.source import SeededSource, components_of
from ttt_video_engine.reference.initialise import on_meta_device
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.bundle import ParityCheck
from ttt_video_engine.runtime.config import ModelConfig
from ttt_video_engine.runtime.errors import CheckFailed
from ttt_video_engine.runtime.presets import PRESETS, preset, tiny

LAYERS = 4


@pytest.mark.parametrize("name", ["tiny", "debug"])
def test_small_models_run_whole(name: str) -> None:
    model = preset(name)
    assert shrink_config(model) == model
    assert {describe_subset(c, model, model) for c in ("text_encoder", "transformer", "vae_decoder")} == {""}


@pytest.mark.parametrize("ttt", ["linear", "mlp"])
def test_the_full_model_keeps_widths_scenes_and_frames(ttt: str) -> None:
    whole = PRESETS["5B"](ttt)  # type: ignore[arg-type]
    part = shrink_config(whole)
    assert describe_subset("text_encoder", part, whole) == "2 of 24 layers"
    assert describe_subset("transformer", part, whole) == "2 of 42 layers, 48x32 pixels"
    assert describe_subset("vae_decoder", part, whole) == "48x32 pixels"
    assert part.transformer == replace(whole.transformer, num_layers=2) and part.vae == whole.vae
    for length in whole.text_lengths:
        of_part, of_whole = part.clip_size(length), whole.clip_size(length)
        assert (of_part.num_scenes, of_part.num_frames) == (of_whole.num_scenes, of_whole.num_frames)
        assert of_part.num_tokens(2) < 2000


def test_the_last_layer_of_a_part_is_the_last_of_the_whole() -> None:
    whole = preset("5B", "mlp")
    part = shrink_config(whole)
    names: dict[str, list[nn.Module]] = {
        "text_encoder": [on_meta_device(partial(TextEncoder, of.text_encoder)) for of in (part, whole)],
        "transformer": [on_meta_device(partial(DiffusionTransformer, of.transformer)) for of in (part, whole)],
    }
    for component, (of_part, of_whole) in names.items():
        renamed = {full_weight_name(component, name, part, whole) for name in of_part.state_dict()}
        assert len(renamed) == len(of_part.state_dict()) and renamed <= of_whole.state_dict().keys()
    assert full_weight_name("transformer", "transformer.layers.1.mlp.layer1.bias", part, whole).endswith(
        "41.mlp.layer1.bias"
    )
    assert full_weight_name("transformer", "layers.0.mlp.layer1.bias", part, whole) == "layers.0.mlp.layer1.bias"
    assert full_weight_name("vae_decoder", "decoder.up.1.block.1.conv1.conv.bias", part, whole).count(".1.") == 2


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model that is large for limits that are small."""
    monkeypatch.setattr(shrink, "MOST_MATRICES", 2 * 64**2)
    monkeypatch.setattr(shrink, "MOST_PIXELS", 64 * 64)
    model = tiny("mlp")
    return replace(
        model,
        transformer=replace(model.transformer, num_layers=LAYERS),
        text_encoder=replace(model.text_encoder, num_layers=LAYERS),
    )


def exported(model: ModelConfig, component: str, folder: Path, dtype: torch.dtype) -> tuple[Gate, Graph, WeightFile]:
    """A whole component's weights, and the gate that is to hold one of its graphs."""
    source = SeededSource(model, seed=0)
    tokenizer = folder / "tokenizer.json"
    source.tokenizer().save(str(tokenizer))
    components = components_of(source)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    gate = Gate(model, components, names[dtype], tokenizer)  # type: ignore[arg-type]
    module: nn.Module = components[component].load().to(dtype)
    graph = component_graphs(module, model, ["9s"])[-1]
    return gate, graph, write_module(graph.module, folder / "model.onnx_data")


def lazy_state(gate: Gate, graph: Graph, file: WeightFile) -> tuple[ParityCheck, ...]:
    return gate.check(graph, file.path.with_name("model.onnx"), file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae_decoder"])
def test_a_large_component_is_held_by_its_part(
    large: ModelConfig, tmp_path: Path, component: str, dtype: torch.dtype
) -> None:
    parts = {
        "text_encoder": f"2 of {LAYERS} layers",
        "transformer": f"2 of {LAYERS} layers, 192x32 pixels",
        "vae_decoder": "192x32 pixels",
    }
    gate, graph, file = exported(large, component, tmp_path, dtype)
    os.link(file.path, tmp_path / "of the bundle before")
    checks = lazy_state(gate, graph, file)
    assert {check.part for check in checks} == {parts[component]}
    assert ("real text" in [check.inputs for check in checks]) == (component != "vae_decoder")
    names = ["model.onnx_data", "of the bundle before", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_wrong_weight_at_the_end_of_the_file_is_found(large: ModelConfig, tmp_path: Path) -> None:
    """The part reads the weights that are exported, the last layer's too."""
    gate, graph, file = exported(large, "transformer", tmp_path, torch.float32)
    offset, length = file.ranges[f"transformer.layers.{LAYERS - 1}.mlp.layer2.weight"]
    with file.path.open("r+b") as out:
        out.seek(offset)
        out.write(torch.randn(length // 4).numpy().tobytes())
    with refused_with(CheckFailed, "transformer-9s", "random, batch 1", 1e-4):
        lazy_state(gate, graph, file)
