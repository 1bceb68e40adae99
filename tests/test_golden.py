"""The gate against the recordings of the public code: it passes what is right, and fails what is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from messages import names, refused_with
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttt_video_engine.export.parity.recordings import TOLERANCE, EngineName, compare_recordings
from ttt_video_engine.runtime.errors import CheckpointError, ConfigError, TTTVideoError

GOLDEN = Path(__file__).parent / "golden"
KINDS = {"dit": "transformer", "op": "ttt scan", "vae": "vae decoder", "sampler": "sampler"}
LAYER_0 = "param.layers.0.seq_modeling_block"
Tensors = dict[str, Tensor]


def rewrite(name: str, folder: Path, change: Callable[[Tensors, dict[str, str]], None]) -> None:
    """A copy of a recording in `folder`, with its tensors and metadata changed."""
    with safe_open(GOLDEN / name, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(GOLDEN / name)
    change(tensors, metadata)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata)


def message(folder: Path, kind: type[TTTVideoError] = CheckpointError) -> str:
    with pytest.raises(kind) as raised:
        list(compare_recordings(folder))
    return str(raised.value)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.safetensors")))
def test_reference_and_graph_match_the_recording(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (comparison,) = compare_recordings(tmp_path)
    assert comparison.recording == name
    assert comparison.kind == KINDS[name.split("_")[0]]
    assert comparison.reference_error < 1e-5
    assert comparison.engine_error < TOLERANCE


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.safetensors")))
def test_torch_matches_the_recording(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (comparison,) = compare_recordings(tmp_path, engine="torch")
    assert comparison.kind == KINDS[name.split("_")[0]]
    assert comparison.engine_error < 1e-5


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("op_ttt_linear.safetensors", "output.XQW"),
        ("op_ttt_mlp.safetensors", "output.XQW"),
        ("sampler_dpmpp2m_sde_10.safetensors", "output.x"),
        ("sampler_dpmpp2m_sde_10.safetensors", "output.denoised"),
    ],
)
@pytest.mark.parametrize(("wrong_by", "least"), [(1e-2, 9e-3), (float("nan"), float("inf"))])
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_one_wrong_value_is_over_tolerance(
    name: str, output: str, wrong_by: float, least: float, engine: EngineName, tmp_path: Path
) -> None:
    def change(tensors: Tensors, _: dict[str, str]) -> None:
        tensors[output].view(-1)[7] += wrong_by

    rewrite(name, tmp_path, change)
    (comparison,) = compare_recordings(tmp_path, engine=engine)
    assert min(comparison.reference_error, comparison.engine_error) >= least > TOLERANCE


@pytest.mark.parametrize("name", ["op_ttt_linear.safetensors", "op_ttt_mlp.safetensors"])
@pytest.mark.parametrize("batch_axis", [True, False])
def test_a_scan_may_have_a_batch(name: str, batch_axis: bool, tmp_path: Path) -> None:
    """Two clips, with the initial inner weights stated for each, or once without a batch axis."""

    def change(tensors: Tensors, _: dict[str, str]) -> None:
        for key, tensor in tensors.items():
            if "norm" in key:
                continue
            if key in ("input.W1", "input.b1", "input.W2", "input.b2"):
                tensors[key] = torch.cat([tensor, tensor]) if batch_axis else tensor[0]
            else:
                tensors[key] = torch.cat([tensor, tensor])
        # The second clip reads its last mini-batch backwards: queries have no part in what is learned.
        tensors["input.XQ"][1, :, -1] = tensors["input.XQ"][0, :, -1].flip(1)
        tensors["output.XQW"][1, :, -1] = tensors["output.XQW"][0, :, -1].flip(1)

    rewrite(name, tmp_path, change)
    (comparison,) = compare_recordings(tmp_path)
    assert max(comparison.reference_error, comparison.engine_error) < 1e-5


def test_recordings_are_run_by_name_and_told_before_they_run(tmp_path: Path) -> None:
    names = ["op_ttt_linear.safetensors", "op_ttt_mlp.safetensors"]
    for name in reversed(names):
        rewrite(name, tmp_path, lambda tensors, metadata: None)
    (tmp_path / "README.md").write_text("not a recording")
    started: list[str] = []
    comparisons = compare_recordings(tmp_path, started.append)
    assert started == []
    assert next(comparisons).recording == names[0] and started == names[:1]
    assert [comparison.recording for comparison in comparisons] == names[1:] and started == names


def test_a_folder_without_recordings_is_refused_at_once(tmp_path: Path) -> None:
    with refused_with(CheckpointError, tmp_path, ".safetensors"):
        compare_recordings(tmp_path)
    with refused_with(CheckpointError, tmp_path / "absent"):
        compare_recordings(tmp_path / "absent")


@pytest.mark.parametrize("size", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((GOLDEN / "op_ttt_linear.safetensors").read_bytes()[:size])
    names(message(tmp_path), path)


def test_a_file_that_is_no_recording_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    names(message(tmp_path), path, "output.velocity")


def set_config(old: str, new: str) -> Callable[[Tensors, dict[str, str]], None]:
    def change(_: Tensors, metadata: dict[str, str]) -> None:
        assert old in metadata["config"]
        metadata["config"] = metadata["config"].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("name", "old", "new", "values"),
    [
        ("dit_linear_1scene", "ttt_linear", "ttt_cnn", ("ssm_layer", "ttt_cnn", "ttt_linear", "ttt_mlp")),
        ("dit_linear_1scene", '"num_heads": 4', '"num_heads": 5', ("num_heads", 5, "model_dim", 64)),
        ("dit_linear_1scene", '"num_heads": 4, ', "", ("num_heads",)),
        ("sampler_dpmpp2m_sde_10", "VPSDEDPMPP2M", "Euler", ("sampler", "Euler", "VPSDEDPMPP2M")),
        ("sampler_dpmpp2m_sde_10", "0.6*tanh", "0.7*tanh", ("v = 0.7*tanh(x)", "v = 0.6*tanh(x)")),
    ],
)
def test_a_config_that_no_model_can_have_is_named(
    name: str, old: str, new: str, values: tuple[object, ...], tmp_path: Path
) -> None:
    rewrite(f"{name}.safetensors", tmp_path, set_config(old, new))
    names(message(tmp_path, ConfigError), tmp_path / f"{name}.safetensors", *values)


def drop(key: str) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, metadata: (tensors.pop(key), None)[1]


def shorten(key: str) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, metadata: tensors.update({key: tensors[key][:, :-1]})


@pytest.mark.parametrize(
    ("name", "change", "values"),
    [
        ("dit_mlp_1scene", set_config("{", "["), ("config",)),
        (
            "dit_mlp_1scene",
            set_config("ttt_mlp", "ttt_linear"),
            (f"{LAYER_0}.ssm.ttt.W1", "[4, 16, 64]", "[4, 16, 16]"),
        ),
        ("dit_mlp_1scene", drop("param.time_embed.0.bias"), ("param.time_embed.0.bias", "[48]")),
        ("dit_mlp_1scene", drop("input.text"), ("input.text",)),
        ("dit_mlp_1scene", shorten("input.video"), (12, 1)),
        ("op_ttt_mlp", drop("input.b2"), ("input.b2",)),
        ("op_ttt_mlp", shorten("input.b1"), ()),
        ("op_ttt_mlp", shorten("output.XQW"), ("output.XQW", "[1, 3, 2, 64, 16]", "[1, 4, 2, 64, 16]")),
        ("sampler_dpmpp2m_sde_10", shorten("input.noise"), ("input.step_noise", 10)),
    ],
)
def test_a_recording_that_does_not_fit_its_model_is_named(
    name: str, change: Callable[[Tensors, dict[str, str]], None], values: tuple[object, ...], tmp_path: Path
) -> None:
    rewrite(f"{name}.safetensors", tmp_path, change)
    names(message(tmp_path), tmp_path / f"{name}.safetensors", *values)
