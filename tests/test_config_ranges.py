"""Every field of a model has a range: whatever a file states, it is a model that holds together or one line."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct

from ttt_video_engine.runtime.config import (
    DiffusionConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)
from ttt_video_engine.runtime.config_file import MAX_FILE_BYTES, ExportConfig, resolve_config
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.presets import PRESETS, preset
from ttt_video_engine.runtime.schedule import make_schedule

TABLES: dict[str, type[Struct]] = {
    "transformer": TransformerConfig,
    "vae": VaeConfig,
    "text_encoder": TextEncoderConfig,
    "diffusion": DiffusionConfig,
}
FIELDS = [f"{table}.{field}" for table, struct in TABLES.items() for field in struct.__struct_fields__]
FIELDS += [field for field in ModelConfig.__struct_fields__ if field not in TABLES]
FIELDS += [f"text_lengths.{length}" for length in ("3s", "63s")] + ["seed", "length", "dtype", "preset", "ttt"]

INTEGERS = [0, -1, 1, 2, 3, 4, 5, 7, 16, 48, 64, 100, 1 << 16, 10**9, 10**12, 2**63, 2**64, 10**30, -(10**30)]
FLOATS = [0.0, -0.0, -1.0, 0.5, 1.0, 5e-324, 1e-300, 1e300, math.nan, math.inf, -math.inf]
OTHERS = ['""', '"a"', '"\\n"', "true", "[]", "[0]", "[1]", "[1, 2]", "[-1, 1]", "{}", "{ a = 1 }", "0x" + "f" * 5000]
VALUES = st.sampled_from([*map(str, INTEGERS), *map(repr, FLOATS), *OTHERS]) | st.integers(-(2**70), 2**70).map(str)


def resolved(path: Path, content: str) -> ExportConfig | None:
    """The config, or None where it is refused in one line that names the file."""
    path.write_text(content, "utf-8")
    try:
        return resolve_config(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ")
        return None


def check_whole(model: ModelConfig) -> None:
    """What the rest of the program takes for granted."""
    again = msgspec.json.decode(msgspec.json.encode(model), type=ModelConfig)
    assert again == model
    for length in model.text_lengths:
        size = model.clip_size(length)
        assert min(size.num_frames, size.height, size.width) > 0 and size.text_length >= 3
        assert (size.num_frames - 1) % model.vae.temporal_window == 0
        assert model.num_video_frames(size) > 0
    schedule = make_schedule(model.diffusion, min(3, model.diffusion.num_train_timesteps))
    assert np.isfinite(schedule.alpha_sqrt).all() and np.isfinite(schedule.train_alpha_sqrt).all()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stated=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
def test_whatever_is_stated_is_a_model_or_one_line(tmp_path: Path, stated: dict[str, str]) -> None:
    found = resolved(tmp_path / "my.toml", "\n".join(f"{name} = {value}" for name, value in stated.items()))
    if found is not None:
        check_whole(found.model)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_is_far_off(tmp_path: Path, name: str) -> None:
    """Zero is in the range of two fields."""
    path = tmp_path / "my.toml"
    for value in ("-1", "0x" + "f" * 400, "0x" + "f" * 5000, "1e30", "nan", "inf", "-inf", str(2**63), '""', "[]"):
        assert resolved(path, f"{name} = {value}") is None, value
    assert (resolved(path, f"{name} = 0") is None) == (name not in ("vae.temporal_levels", "seed"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("transformer.patch_size = 0", "patch_size is 0"),
        ("transformer.patch_size = -2", "patch_size is -2"),
        ("transformer.attn_length = 0", "attn_length is 0"),
        ("transformer.in_channels = 0", "in_channels is 0"),
        ("transformer.out_channels = 8", "out_channels is 8"),
        ("transformer.rope_theta = nan", "rope_theta is nan"),
        ("vae.ch_mult = []", "ch_mult is ()"),
        ("vae.ch_mult = [1, 0]", "ch_mult is 0"),
        ("vae.temporal_window = 0", "temporal_window is 0"),
        ("vae.temporal_window = 3", "temporal_window is 3"),
        ("vae.temporal_window = 10", "latent frames of a 3s video is 13"),
        ("vae.scale_factor = inf", "scale_factor is inf"),
        ("vae.out_ch = 4", "out_ch is 4"),
        ("text_encoder.d_kv = 0", "d_kv is 0"),
        ("text_encoder.num_heads = 0", "num_heads is 0"),
        ("diffusion.num_train_timesteps = 0", "num_train_timesteps is 0"),
        ("diffusion.num_train_timesteps = 1000000000000", "num_train_timesteps is 1000000000000"),
        ("diffusion.beta_start = 0.5", "beta_end is 0.012"),
        ("diffusion.beta_end = inf", "beta_end is inf"),
        ("text_lengths = {}", "text_lengths is {}"),
        ("text_lengths.3s = 2", "text_lengths.3s is 2"),
        ("width = 0", "width is 0"),
        ("height = 1000000", "height is 1000000"),
        ('name = "a\\nb"', "name is 'a\\nb'"),
    ],
)
def test_what_is_out_of_range_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        resolve_config(path)
    assert named in str(caught.value)


def test_a_seed_that_torch_cannot_take_is_refused(tmp_path: Path) -> None:
    assert resolved(tmp_path / "my.toml", f"seed = {2**63}") is None
    found = resolved(tmp_path / "my.toml", f"seed = {2**63 - 1}")
    assert found is not None and found.seed == 2**63 - 1


def test_a_file_over_its_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"{MAX_FILE_BYTES >> 10} KiB"):
        resolve_config(path)


# The scale of the VAE


@pytest.mark.parametrize("name", PRESETS)
def test_latents_of_ttt_video_are_not_scaled(name: str) -> None:
    assert preset(name).vae.scale_factor == 1.0


def test_an_asked_scale_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("vae.scale_factor = 0.5")
    assert resolve_config(path).model.vae.scale_factor == 0.5
    assert resolve_config(path, vae_scale_factor=0.7).model.vae.scale_factor == 0.7
    assert resolve_config(vae_scale_factor=0.7).model.vae == msgspec.structs.replace(
        preset("tiny").vae, scale_factor=0.7
    )
    for bad in (0.0, math.nan, -1.0):
        with pytest.raises(ConfigError) as caught:
            resolve_config(path, vae_scale_factor=bad)
        assert str(path) in str(caught.value) and f"--vae-scale-factor {bad}" in str(caught.value)


def test_a_scale_does_not_hide_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("vae = 3")
    with pytest.raises(ConfigError):
        resolve_config(path, vae_scale_factor=0.7)


def test_export_takes_the_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any) -> None:
    from ttt_video_engine.export import build

    models: list[ModelConfig] = []
    monkeypatch.setattr(build, "export_bundle", lambda source, *_, **named: models.append(source.model))
    assert run("export", "--output", tmp_path / "bundle", "--vae-scale-factor", 0.7)[0] == 0
    assert models[0].vae.scale_factor == 0.7
    code, out, err = run("export", "--output", tmp_path / "bundle", "--vae-scale-factor", 0)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
