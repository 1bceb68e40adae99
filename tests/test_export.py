"""Bundles as they are made: what is in them, what is built again and why, and what a failure leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from formats import FORMATS, State, save_pickled
from messages import (
    CHANGED,
    NEW,
    NOTHING_CHANGED,
    PARITY,
    REBUILD,
    UNCHANGED,
    UP_TO_DATE,
    WEIGHTS_WRITTEN,
    holds,
    names,
    refused_with,
    subjects,
    where,
)
from msgspec.structs import replace
from safetensors.torch import save_file

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
from ttt_video_engine.export.build import export_bundle
from ttt_video_engine.export.graphs.components import TransformerGraph, transformer_graph
from ttt_video_engine.export.graphs.graph import trace
from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.keys import key_changes, stale_graphs, weights_key
from ttt_video_engine.export.parity import gate
from ttt_video_engine.export.sources.source import CheckpointSource, Component, SeededSource, components_of
from ttt_video_engine.reference.initialise import with_placeholder_weights
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, TOKENIZER, Bundle, open_bundle
from ttt_video_engine.runtime.errors import CheckFailed, OutputError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.presets import tiny

Digests = Callable[[Path], dict[str, str]]
History = tuple[dict[str, str], list[list[str]]]
Run = Callable[..., tuple[int, str, str]]

GRAPHS = ["text_encoder", "transformer-3s", "transformer-9s", "vae_decoder-first", "vae_decoder-next"]
SEEDED = SeededSource(tiny("linear"), seed=0)


@dataclass(frozen=True)
class OtherTextEncoder(SeededSource):
    """The shared bundle's model with a text encoder of another seed: one component differs, and so little is built."""

    def text_encoder(self) -> Component[TextEncoder]:
        return SeededSource(self.model, self.seed + 1).text_encoder()


OTHER = OtherTextEncoder(tiny("linear"), seed=0)


def silent(line: str) -> None:
    pass


# What is in a bundle


def test_the_manifest_describes_every_file(shared_bundle: Path, digests: Digests) -> None:
    manifest = json.loads((shared_bundle / "bundle.json").read_bytes())
    files = {name: digest for name, digest in digests(shared_bundle).items() if name != "bundle.json"}
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
    for name, entry in manifest["files"].items():
        assert entry["size"] == (shared_bundle / name).stat().st_size
    assert list(manifest["graphs"]) == GRAPHS and manifest["lengths"] == ["3s", "9s"]
    assert manifest["dtype"] == "float32" and manifest["format_version"] == 2
    assert msgspec.convert(manifest["model"], type(SEEDED.model)) == SEEDED.model


def test_every_graph_was_held_to_the_reference(shared_bundle: Path) -> None:
    for name, graph in open_bundle(shared_bundle).manifest.graphs.items():
        assert len({check.inputs for check in graph.parity}) == len(graph.parity)
        for check in graph.parity:
            assert 0 < check.mean_error <= check.max_error <= check.tolerance == gate.TOLERANCES["float32"]
        assert ("real text" in [check.inputs for check in graph.parity]) == (not name.startswith("vae"))


def test_what_does_not_change_with_the_length_is_stored_once(shared_bundle: Path) -> None:
    files = {path.name: path.stat().st_size for path in (shared_bundle / "transformer").iterdir()}
    assert set(files) == {"model.onnx_data", "model-3s.onnx", "model-9s.onnx"}
    assert files["model-3s.onnx"] < 200_000 > files["model-9s.onnx"] < files["model.onnx_data"] / 5
    graphs = open_bundle(shared_bundle).manifest.graphs
    assert {graphs[f"transformer-{length}"].weights for length in ("3s", "9s")} == {"transformer/model.onnx_data"}
    weights = sum(value.nbytes for value in SEEDED.transformer().load().state_dict().values())
    assert weights <= files["model.onnx_data"] < 2 * weights  # the rest is padding to whole pages


def test_the_weights_are_the_models_by_name(shared_bundle: Path) -> None:
    model = onnx.load(shared_bundle / "transformer/model-9s.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, value in SEEDED.transformer().load().state_dict().items():
        np.testing.assert_array_equal(found[f"transformer.{name}"], value.numpy(), strict=True)


def test_no_graph_knows_where_it_was_made(shared_bundle: Path) -> None:
    here = [os.fsencode(Path(__file__).parents[1]), os.fsencode(shared_bundle.parent), os.fsencode(Path.home())]
    for path in shared_bundle.rglob("*.onnx"):
        content = path.read_bytes()
        assert not [folder for folder in here if folder in content], path


def test_a_moved_bundle_still_works(bundle: Path) -> None:
    def embed(at: Path) -> np.ndarray:
        opened = open_bundle(at)
        opened.verify()
        with OnnxRuntimeLoader(opened)(TEXT_ENCODER) as engine:
            return engine.run({"ids": np.arange(24).reshape(2, 12)})["embeddings"]

    before = embed(bundle)
    elsewhere = bundle.parent / "with space" / "é"
    elsewhere.parent.mkdir()
    bundle.rename(elsewhere)
    np.testing.assert_array_equal(embed(elsewhere), before)


# What is built again


def test_a_further_length_builds_its_graph_alone(
    shared_bundle: Path, digests: Digests, export_history: History
) -> None:
    first, (report, further) = export_history
    assert subjects(report, NEW) == [name for name in GRAPHS if name != "transformer-9s"]
    assert subjects(further, NEW) == ["transformer-9s"]
    assert sorted(subjects(further, UNCHANGED)) == sorted(name for name in GRAPHS if name != "transformer-9s")
    assert len(further) == len(GRAPHS) + len(where(further, PARITY))
    after = digests(shared_bundle)
    assert {name for name in after if after[name] != first.get(name)} == {"transformer/model-9s.onnx", "bundle.json"}
    assert first.keys() < after.keys()


@pytest.mark.parametrize("lengths", [["9s"], ["3s", "9s"]])
def test_exporting_again_builds_nothing_and_touches_nothing(bundle: Path, digests: Digests, lengths: list[str]) -> None:
    before, report = digests(bundle), list[str]()
    times = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    export_bundle(SEEDED, bundle, lengths, "float32", report.append)
    assert subjects(report[:-1], UNCHANGED) == GRAPHS and len(report) == len(GRAPHS) + 1
    assert holds(report[-1], NOTHING_CHANGED)
    assert digests(bundle) == before
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == times
    assert os.listdir(bundle.parent) == ["bundle"]


def test_other_weights_build_their_component_again(bundle: Path, digests: Digests) -> None:
    before, report = digests(bundle), list[str]()
    opened = export_bundle(OTHER, bundle, ["9s"], "float32", report.append)
    opened.verify()
    (reason,) = where(report, CHANGED)
    names(reason, "text_encoder", "weights")
    assert subjects(report, UNCHANGED) == GRAPHS[1:] and subjects(report, NEW) == []
    after = digests(bundle)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"text_encoder/model.onnx_data", "bundle.json"}, "the same graph with other weights"


def test_a_seed_changes_the_weights_of_every_component(bundle: Path) -> None:
    # The keys decide what is built; to build it all would take a minute.
    manifest = open_bundle(bundle).manifest
    source = SeededSource(tiny("linear"), seed=1)
    for name, other in components_of(source).items():
        key = manifest.weight_keys[f"{name}/model.onnx_data"]
        (difference,) = key_changes(key, weights_key(source.model, origin=other.origin, dtype="float32"))
        names(difference, "origin", CHANGED, "seed 0", "seed 1")
        seeded = components_of(SEEDED)[name].weights
        assert any(not torch.equal(value.read(), other.weights[weight].read()) for weight, value in seeded.items())


@pytest.mark.parametrize(
    ("part", "values"),
    [("code", (0.0,)), ("tool torch", (0.0, torch.__version__[:12]))],
)
def test_inspect_says_what_would_be_built_again(run: Run, bundle: Path, part: str, values: tuple[object, ...]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    manifest["graphs"]["transformer-9s"]["key"][part] = "0.0"
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    stale = stale_graphs(open_bundle(bundle))
    assert [name for name, reasons in stale.items() if reasons] == ["transformer-9s"]
    (reason,) = stale["transformer-9s"]
    names(reason, part, CHANGED, *values)

    code, out, _ = run("inspect", bundle)
    assert code == 0
    rebuilds = where(out.splitlines(), REBUILD)
    assert len(where(rebuilds, UP_TO_DATE)) == 4 and len(rebuilds) == 5
    assert [line for line in rebuilds if reason in line] == [line for line in rebuilds if not holds(line, UP_TO_DATE)]
    code, out, _ = run("inspect", bundle, "--json")
    assert code == 0 and json.loads(out) == {"manifest": manifest, "engines": {}, "rebuild": stale}


# What a failure leaves


def test_over_tolerance_leaves_the_bundle_as_it_was(
    bundle: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(bundle)
    monkeypatch.setitem(gate.TOLERANCES, "float32", 0.0)
    with refused_with(CheckFailed, "text_encoder", PARITY, 0.0):
        export_bundle(OTHER, bundle, ["9s"], "float32", silent)
    assert digests(bundle) == before
    assert open_bundle(bundle).manifest.graphs.keys() == set(GRAPHS)


def test_over_tolerance_makes_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.TOLERANCES, "float32", 0.0)
    with pytest.raises(CheckFailed):
        export_bundle(SEEDED, tmp_path / "bundle", ["3s"], "float32", silent)
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("bundle.json")), "nothing looks complete"


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path: Path, digests: Digests) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"a cat")
    with refused_with(OutputError, tmp_path / "photos"):
        export_bundle(SEEDED, tmp_path / "photos", ["3s"], "float32", silent)
    assert digests(tmp_path) == {"photos/cat.jpg": sha256_of(tmp_path / "photos/cat.jpg")}


def test_a_kill_between_the_two_renames_loses_nothing(bundle: Path, digests: Digests) -> None:
    """The moment at which the old bundle has gone aside and the new one is not yet in its place."""
    before, report = digests(bundle), list[str]()
    shutil.copytree(bundle, bundle.with_name(".bundle.partial"))
    bundle.rename(bundle.with_name(".bundle.previous"))
    export_bundle(SEEDED, bundle, ["9s"], "float32", report.append)
    assert holds(report[-1], NOTHING_CHANGED)
    assert digests(bundle) == before
    assert os.listdir(bundle.parent) == ["bundle"]


def test_a_kill_after_both_renames_leaves_no_second_bundle(bundle: Path, digests: Digests) -> None:
    before = digests(bundle)
    shutil.copytree(bundle, bundle.with_name(".bundle.previous"))
    export_bundle(SEEDED, bundle, ["9s"], "float32", silent)
    assert digests(bundle) == before
    assert os.listdir(bundle.parent) == ["bundle"]


# Other sources, other precisions


def checkpoint_folder(folder: Path, save: Callable[[State, Path], None] = save_pickled) -> Path:
    """The seeded model as published checkpoints hold one, with all that is in them beside it."""
    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / name).mkdir(parents=True)
    transformer = SEEDED.transformer().load().state_dict()
    save({f"dit.{name}": value for name, value in transformer.items()}, folder / "transformer")
    decoder = {f"decoder.{name}": value for name, value in SEEDED.vae_decoder().load().state_dict().items()}
    torch.save({"state_dict": {"encoder.conv.weight": torch.ones(3), **decoder}}, folder / "vae/3d-vae.pt")
    encoder = {name.removeprefix("t5."): value for name, value in SEEDED.text_encoder().load().state_dict().items()}
    del encoder["encoder.embed_tokens.weight"]  # the same as shared.weight
    encoder["shared.weight"] = torch.cat([encoder["shared.weight"], torch.ones(26, SEEDED.model.text_encoder.d_model)])
    save_file(encoder, folder / "text_encoder/model.safetensors")
    tokenizer = json.loads(SEEDED.tokenizer().to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]  # without the scene tokens
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_the_same_weights_is_the_same_bundle(
    bundle: Path, digests: Digests, tmp_path: Path, name: str
) -> None:
    """Weight files come out byte for byte as those of the seeded bundle, whatever the format, and so do graphs."""
    source = CheckpointSource(tiny("linear"), checkpoint_folder(tmp_path / "checkpoint", FORMATS[name]))
    before, report = digests(bundle), list[str]()
    export_bundle(source, bundle, ["9s"], "float32", report.append)
    assert subjects(report, WEIGHTS_WRITTEN) == ["text_encoder", "transformer", "vae_decoder"]
    assert subjects(report, UNCHANGED) == GRAPHS and holds(report[-1], NOTHING_CHANGED)
    assert len(report) == 3 + len(GRAPHS) + 1
    assert digests(bundle) == before


def test_a_checkpoint_writes_the_same_weight_file(shared_bundle: Path, tmp_path: Path) -> None:
    source = CheckpointSource(tiny("linear"), checkpoint_folder(tmp_path / "checkpoint"))
    write_module(TransformerGraph(source.transformer().load()), tmp_path / "weights")
    assert sha256_of(tmp_path / "weights") == sha256_of(shared_bundle / "transformer/model.onnx_data")
    source.tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert sha256_of(tmp_path / "tokenizer.json") == sha256_of(shared_bundle / TOKENIZER)


def test_folders_and_files_of_a_checkpoint_may_be_links(tmp_path: Path) -> None:
    real, links = checkpoint_folder(tmp_path / "real"), tmp_path / "links"
    links.mkdir()
    for name in ("transformer", "text_encoder", "tokenizer"):
        (links / name).symlink_to(real / name)
    (links / "vae").mkdir()
    (links / "vae/3d-vae.pt").symlink_to(real / "vae/3d-vae.pt")
    source, other = CheckpointSource(SEEDED.model, links), CheckpointSource(SEEDED.model, real)
    assert source.tokenizer().to_str() == other.tokenizer().to_str()
    for name, component in components_of(source).items():
        same = components_of(other)[name]
        assert component.origin == same.origin and component.weights.keys() == same.weights.keys()


def test_a_float16_mlp_bundle_passes_the_gate_and_renders(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    export = ("export", "--preset", "tiny", "--ttt", "mlp", "--dtype", "float16", "--length", "3s", "--output", folder)
    code, out, err = run(*export)
    assert (code, out) == (0, f"bundle: {folder}\n"), err
    opened = open_bundle(folder)
    opened.verify()
    check_float16(opened)

    (tmp_path / "bear.json").write_text('[{"text": "A bear bakes bread."}]')
    code, _, err = run(
        "sample", tmp_path / "bear.json", "--bundle", folder, "--output-dir", tmp_path / "out", "--num-steps", 1
    )
    assert code == 0, err
    sidecar = json.loads((tmp_path / "out/bear/video.json").read_bytes())
    assert sidecar["bundle"]["dtype"] == "float16" and sidecar["bundle"]["ttt"] == "mlp"
    assert sidecar["num_frames"] == 49


def check_float16(opened: Bundle) -> None:
    assert opened.manifest.dtype == "float16"
    for graph in opened.manifest.graphs.values():
        assert all(1e-5 < check.max_error <= gate.TOLERANCES["float16"] for check in graph.parity)
        borders = [spec.dtype for spec in (*graph.inputs, *graph.outputs) if not spec.name.startswith("cache_")]
        assert "float16" not in borders
    model = onnx.load(opened.root / "transformer/model-3s.onnx", load_external_data=False)
    weights = [t for t in model.graph.initializer if t.name.startswith("transformer.")]
    assert weights and {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    assert sum(node.op_type == "TTTMLP" for node in model.graph.node) == 4


def test_a_hollow_model_traces_to_the_same_graph() -> None:
    """So a model of any size can be exported without having its weights in memory."""
    model = replace(tiny("mlp"), transformer=replace(tiny("mlp").transformer, num_layers=1))
    traced = []
    component = SeededSource(model, seed=0).transformer()
    for module in (component.load(), with_placeholder_weights(component.build)):
        graph = transformer_graph(module, model, "3s")
        traced.append(trace(graph))
    real, empty = (
        [(node.op_type, [value and value.name for value in node.inputs]) for node in model.graph] for model in traced
    )
    assert real == empty
    names = set(graph.module.state_dict())
    assert names <= set(traced[0].graph.initializers), "every weight has its name in the graph"
    assert all(traced[1].graph.initializers[name].const_value is not None for name in names)
