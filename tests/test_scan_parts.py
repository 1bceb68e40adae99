"""Version 3 of the TTT operator: its parts, its function body from part to part, and a transformer that has it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_parts import CONFIG
from test_projections_op import KINDS, STATES, Array, Clip, relative_error, run, session
from torch import Tensor

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeRunner
from ttt_video_engine.export.graphs import graph as onnx_graph
from ttt_video_engine.export.graphs.components import transformer_graph
from ttt_video_engine.export.graphs.projections_op import scan_order
from ttt_video_engine.export.graphs.scan_parts import scan_parts
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.config import TTTKind
from ttt_video_engine.runtime.presets import tiny
from ttt_video_engine.runtime.ttt_op import DOMAIN, PART_VERSION, SCAN_PARTS, exported_version, num_scans


@settings(max_examples=40, deadline=None)
@given(scenes=st.integers(1, 8), text=st.integers(1, 9), patches=st.sampled_from([(1, 1), (2, 3)]))
@example(scenes=7, text=5, patches=(2, 3))
def test_runs_are_the_tokens_of_a_part(scenes: int, text: int, patches: tuple[int, int]) -> None:
    config = replace(CONFIG, mini_batch_size=1)
    layout = TokenLayout(config, scenes, text, config.attn_length * scenes + 1, *patches)
    for backward in (False, True):
        parts = scan_parts(layout, 1, backward=backward)
        assert len(parts) == min(SCAN_PARTS, scenes)
        assert [part.first for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == layout.num_tokens
        tokens = scan_order(layout, 1, backward=backward).tokens
        for part in parts:
            own = [token for start, end in part.runs for token in range(start, end)]
            assert own == sorted(tokens[part.first : part.end].flatten().tolist())
            assert all(end <= layout.num_text_tokens or start >= layout.num_text_tokens for start, end in part.runs)
            assert len(part.runs) <= 4, "few, each a matrix product"


def parts_of(inputs: dict[str, Tensor], ends: list[int]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The tokens of each part, up to these mini-batches, and its inputs but for the state."""
    for first, end in zip([0, *ends], ends, strict=False):
        tokens = inputs["tokens"][first:end].flatten().long().sort().values
        part = inputs | {name: inputs[name][:, tokens] for name in ("XQ", "XK", "XV")}
        part |= {name: inputs[name][first:end] for name in ("cos", "sin")}
        part["tokens"] = torch.searchsorted(tokens, inputs["tokens"][first:end].long()).int()
        part["rate_logits"] = inputs["rate_logits"][:, inputs["rate_tokens"][first:end].flatten().long()]
        part["rate_tokens"] = torch.arange(len(tokens), dtype=torch.int32).view(part["tokens"].shape)
        yield tokens, part


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_goes_on_from_the_state_of_the_part_before(kind: TTTKind) -> None:
    """The first part has two chunks, of which the second is padded: that must not change the state."""
    inputs = Clip(kind, (2, 3, 2, 16), 2, patches=24).inputs(torch.float32, backward=True)
    whole = run(kind, inputs)
    found: Array = np.full_like(whole, np.nan)
    state = {name: inputs[name].expand(2, *inputs[name].shape).detach().numpy() for name in STATES[kind]}
    for tokens, part in parts_of(inputs, [33, 40, len(inputs["tokens"])]):
        feeds = {name: value.detach().numpy() for name, value in part.items()} | state
        outputs = session(kind, torch.float32, PART_VERSION).run(None, feeds)
        found[:, tokens.numpy()] = outputs[0]
        state = dict(zip(STATES[kind], outputs[1:], strict=True))
    assert relative_error(found, torch.from_numpy(whole)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_in_parts_is_the_reference(kind: TTTKind, tmp_path: Path) -> None:
    """In float32, in which ONNX Runtime computes on a CPU; an export has it in half precision."""
    whole = tiny(kind)
    config = replace(whole.transformer, model_dim=32, num_heads=2, num_layers=2, time_embed_dim=32)
    model, length = replace(whole, transformer=config), "9s"
    torch.manual_seed(0)
    transformer = DiffusionTransformer(config).eval()
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    graph = dataclasses.replace(transformer_graph(transformer, model, length), op_version=PART_VERSION)
    path = tmp_path / "model.onnx"
    onnx_graph.save(onnx_graph.trace(graph), path, write_module(graph.module, tmp_path / "model.onnx_data"), kind)

    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.domain == DOMAIN]
    layers = [f"transformer.layers.{layer}.seq_modeling_block.ssm.ttt" for layer in range(2)]
    ways = [way + number for way in ("forward", "backward") for number in ("", "2", "3")]
    assert [node.name for node in nodes] == [f"{layer}.{way}" for layer in layers for way in ways]
    assert len(nodes) == num_scans(config, model.clip_size(length), PART_VERSION)
    assert {len(node.output) for node in nodes} == {1 + len(STATES[kind])}

    generator = torch.Generator().manual_seed(1)
    examples = [spec.example for spec in graph.inputs]
    values = [torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in examples]
    with torch.no_grad():
        expected = graph.module(*values)
    with OnnxRuntimeRunner(path, *onnx_graph.read_signature(path)) as runner:
        feeds = {spec.name: value.numpy() for spec, value in zip(graph.inputs, values, strict=True)}
        found = np.asarray(runner.run(feeds)["velocity"], np.float64)
    assert relative_error(found, expected) < 1e-5


def test_only_half_precision_is_exported_in_parts() -> None:
    model = tiny("linear")
    module = DiffusionTransformer(replace(model.transformer, num_layers=1))
    assert transformer_graph(module, model, "9s").op_version == exported_version("float32") == 2
    assert transformer_graph(module.half(), model, "9s").op_version == exported_version("float16") == PART_VERSION
    assert [num_scans(model.transformer, model.clip_size("9s"), version) for version in (1, 2, 3)] == [4, 4, 12]
