"""Config files of the public code, as they are: the model they state, how they render, and what is said of the rest."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from messages import WARNING, names, refusal, refused_with
from msgspec.structs import replace

from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, TTTKind
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.sampling_file import sampling_options

Run = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

# The fields that a file of configs/eval has, placeholders included.
FORM = """
[job]
exp_name = "mine"

[model]
name = "cogvideo"
size = "5B"
ssm_layer = "ttt_{kind}"
ttt_base_lr = {base_lr}
mini_batch_size = 16
video_length = "{length}ec"
scale_factor = 1.0

[eval]
sampling_fps = 16
sampling_num_frames = {frames}
txt_maxlen = {tokens}
image_width = 720
image_height = 480
latent_channels = 16
scale_factor = 0.7
num_denoising_steps = 50
output_dir = "./output"
t5_model_dir = TODO
vae_checkpoint_path = TODO

[guider]
scale = 6
exp = 5
num_steps = 50

[discretization]
shift_scale = 1.0

[denoiser]
num_idx = 1000
quantize_c_noise = false

[parallelism]
fsdp_unsharded_dtype = 'bfloat16'
dp_replicate = 1
tp_sharding = 2

[remat]
scan_checkpoint_group_size = 1e6 # no checkpoints

[wandb]
project = "p"
"""


def form(kind: TTTKind = "mlp", length: str = "9s") -> str:
    frames, tokens = 12 * SCENES_PER_LENGTH[length] + 1, preset("5B").text_lengths[length]
    base_lr = preset("5B", kind).transformer.ttt_base_lr
    return FORM.format(kind=kind, base_lr=base_lr, length=length, frames=frames, tokens=tokens)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file in which the line of a field is another one, or gone."""

    def write_file(content: str, **lines: str) -> Path:
        path = tmp_path / "public.toml"
        for field, line in lines.items():
            content, count = re.subn(rf"(?m)^{field} = .*$", line, content, count=1)
            assert count == 1, field
        path.write_text(content, "utf-8")
        return path

    return write_file


# export --config


@pytest.mark.parametrize("length", SCENES_PER_LENGTH)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_file_as_it_is_makes_the_preset(write: Write, kind: TTTKind, length: str) -> None:
    """Equal to the last field, so that a bundle is the same whichever file it was exported with."""
    found = resolve_config(write(form(kind, length)))
    assert found.model == preset("5B", kind)
    assert (found.lengths, found.dtype, found.vae_scale_stated) == ((length,), "bfloat16", False)


def test_what_has_no_meaning_is_named_a_line_a_group(write: Write) -> None:
    path = write(form())
    warnings = resolve_config(path).warnings
    for warning in warnings:
        names(warning, path)
    groups = [
        ("job.exp_name",),
        ("model.scale_factor",),
        ("eval.scale_factor", "eval.vae_scale_factor"),
        ("eval.output_dir", "eval.t5_model_dir", "eval.vae_checkpoint_path", "--checkpoint"),
        ("eval.sampling_fps", "eval.num_denoising_steps", "guider.scale", "guider.exp", "sample", "--config"),
        ("guider.num_steps",),
        ("parallelism.dp_replicate", "parallelism.tp_sharding"),
        ("remat.scan_checkpoint_group_size",),
        ("wandb.project",),
        ("model.mini_batch_size", 16, 64),
    ]
    assert len(warnings) == len(groups)
    for group in groups:
        (found,) = [warning for warning in warnings if f"{path}: {group[0]}" in warning]
        names(found, *group)
    silent = ("model.size", "txt_maxlen", "image_width", "latent_channels", "shift_scale", "num_idx", "dtype")
    assert not any(name in " ".join(warnings) for name in silent)


def test_only_the_16_of_an_mlp_is_a_slip(write: Write) -> None:
    def batch(kind: TTTKind, stated: int) -> tuple[int, bool]:
        found = resolve_config(write(form(kind), mini_batch_size=f"mini_batch_size = {stated}"))
        return found.model.transformer.mini_batch_size, any("mini_batch_size" in line for line in found.warnings)

    assert batch("mlp", 16) == (64, True)
    assert batch("mlp", 64) == (64, False)
    assert batch("mlp", 32) == (32, False)
    assert batch("linear", 16) == (16, False)


def test_every_field_that_is_ours_is_taken(write: Write) -> None:
    path = write(
        form("linear"),
        size='size = "debug"',
        ttt_base_lr="ttt_base_lr = 0.5",
        sampling_num_frames="sampling_num_frames = 25",
        txt_maxlen="txt_maxlen = 88",
        image_width="image_width = 128",
        image_height="image_height = 64\nvae_scale_factor = 0.9\ndtype = 'float16'",
        shift_scale="shift_scale = 2.0",
    )
    found = resolve_config(path)
    base = preset("debug", "linear")
    assert found.model == replace(
        base,
        width=128,
        text_lengths={"6s": 88},
        transformer=replace(base.transformer, ttt_base_lr=0.5),
        vae=replace(base.vae, scale_factor=0.9),
        diffusion=replace(base.diffusion, shift_scale=2.0),
    )
    assert (found.lengths, found.dtype, found.vae_scale_stated) == (("6s",), "float16", True)


def test_another_length_keeps_those_of_the_preset(write: Write) -> None:
    path = write(form(), sampling_num_frames="sampling_num_frames = 25", txt_maxlen="txt_maxlen = 469")
    assert resolve_config(path).model.text_lengths == preset("5B").text_lengths | {"6s": 469}
    path = write(form(), sampling_num_frames="", txt_maxlen="")
    found = resolve_config(path)
    assert (found.lengths, found.model) == (("9s",), preset("5B", "mlp"))


def test_options_go_before_the_file(write: Write) -> None:
    found = resolve_config(write(form()), preset="5B", lengths=["6s"], dtype="fp16", vae_scale_factor=0.7)
    assert (found.lengths, found.dtype, found.model.vae.scale_factor) == (("6s",), "float16", 0.7)
    with refused_with(ConfigError, "transformer.mini_batch_size", 64, "mlp", "--ttt", "linear"):
        resolve_config(write(form()), ttt="linear")


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ({"size": 'size = "7B"'}, ("7B", "5B", "debug")),
        ({"ssm_layer": 'ssm_layer = "mamba"'}, ("model.ssm_layer", "mamba")),
        ({"name": 'name = "wan"'}, ("model.name", "wan")),
        ({"txt_maxlen": 'txt_maxlen = "long"'}, ("eval.txt_maxlen",)),
        ({"txt_maxlen": "txt_maxlen = 501"}, ("9s", 51453, "mini_batch_size", 64)),
        ({"sampling_num_frames": "sampling_num_frames = 36"}, ("eval.sampling_num_frames", 36, 25, 37)),
        ({"sampling_num_frames": "sampling_num_frames = 1213"}, ("eval.sampling_num_frames", 1213, "300s")),
        ({"sampling_num_frames": "", "video_length": 'video_length = "7sec"'}, ("model.video_length", "7sec", "9s")),
        ({"latent_channels": "latent_channels = 4"}, ("eval.latent_channels", 4, 16)),
        ({"num_idx": "num_idx = 500"}, ("denoiser.num_idx", 500, 1000)),
        ({"quantize_c_noise": "quantize_c_noise = true"}, ("denoiser.quantize_c_noise",)),
        ({"fsdp_unsharded_dtype": "fsdp_unsharded_dtype = 'int8'"}, ("parallelism.fsdp_unsharded_dtype", "int8")),
    ],
)
def test_what_cannot_be_had_is_refused(write: Write, lines: dict[str, str], values: tuple[object, ...]) -> None:
    path = write(form(), **lines)
    with refused_with(ConfigError, path, *values):
        resolve_config(path)


def test_unknown_names_are_named(write: Write) -> None:
    path = write(form() + '[debugging]\nlevel = 3\n["a\\nb"]\n', size='size = "5B"\nssm_layr = "ttt_mlp"')
    warnings = resolve_config(path).warnings
    for name in ("model.ssm_layr", "debugging.level", "a\\nb"):
        assert len([line for line in warnings if name in line and "\n" not in line]) == 1


def test_the_two_forms_do_not_mix(write: Write) -> None:
    path = write('preset = "tiny"\n' + form())
    with refused_with(ConfigError, path, "preset", "[job]"):
        resolve_config(path)


def test_a_placeholder_elsewhere_is_no_toml(write: Write) -> None:
    with refused_with(ConfigError, "public.toml", "TOML"):
        resolve_config(write("width = TODO"))


def test_commands_print_the_warnings(run: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt_video_engine.export import build

    monkeypatch.setattr(build, "export_bundle", lambda *_: None)
    path = write(form())
    export = ("export", "--config", path, "--checkpoint", tmp_path, "--vae-scale-factor", 1, "--output", tmp_path / "b")
    for command in (export, ("plan", "--config", path, "--gpu-memory", "200GB")):
        code, out, err = run(*command)
        assert code == 0, err
        assert err.splitlines() == [f"{WARNING}{line}" for line in resolve_config(path).warnings]
        assert WARNING not in out
    names(refusal(run("plan", "--config", write(form(), size='size = "7B"'))), "7B")


# sample --config


def test_the_sampling_part(write: Write) -> None:
    path = write(form(), exp_name="seed = 7", scale="scale = 4.5", num_denoising_steps="num_denoising_steps = 20")
    found = sampling_options(path)
    assert (found.num_steps, found.guidance_scale, found.fps, found.seed) == (20, 4.5, 16, 7)
    assert (found.width, found.height, found.num_frames, found.dtype) == (720, 480, 37, None)
    assert any("model.size" in line and "eval.txt_maxlen" in line for line in found.warnings)
    assert not any("guider.scale" in line or "job.seed" in line for line in found.warnings)


def test_what_a_file_does_not_state_is_left_open(write: Write) -> None:
    found = sampling_options(write("[guider]\nscale = 3\n"))
    assert found == type(found)(guidance_scale=3.0)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("[guider]\nexp = 4", ("guider.exp", 4, 5)),
        ("[guider]\nscale = 'x'", ("guider.scale",)),
        ("[eval]\nsampling_num_frames = 12", ("eval.sampling_num_frames", 12, 13, 25)),
        ("[job]\nseed = -1", ("job.seed",)),
        ("guider = 6", ("guider",)),
        ('preset = "tiny"', ("[eval]", "[guider]")),
    ],
)
def test_sampling_that_cannot_be_had_is_refused(write: Write, content: str, values: tuple[object, ...]) -> None:
    path = write(content)
    with refused_with(ConfigError, path, *values):
        sampling_options(path)
