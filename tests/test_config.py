"""Config files: those shipped, what goes before what, and what every bad one says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from messages import column, line, names, refusal

from ttt_video_engine.runtime.config import SCENES_PER_LENGTH, ModelConfig, TTTKind
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.presets import preset
from ttt_video_engine.runtime.settings import Settings

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))
NUM_TOKENS = {"3s": 18048, "9s": 51456, "18s": 101376, "30s": 168320, "63s": 351168}
INNER = {"linear": (16, 1.0), "mlp": (64, 0.1)}

Run = Callable[..., tuple[int, str, str]]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(content, "utf-8")
        return path

    return write_file


def error_of(path: Path, **asked: Any) -> str:
    """The one line that a file is refused with, which names the file; less its folder."""
    with pytest.raises(ConfigError) as caught:
        resolve_config(path, **asked)
    message = str(caught.value)
    names(message, path)
    return message.removeprefix(f"{path.parent}/")


def inner_of(model: ModelConfig) -> tuple[str, int, float]:
    transformer = model.transformer
    return transformer.ttt, transformer.mini_batch_size, transformer.ttt_base_lr


# Shipped


def test_every_kind_and_length_has_a_file() -> None:
    names = {str(path.relative_to(ROOT / "configs")) for path in SHIPPED}
    assert names == {f"ttt-{kind}/{length}.toml" for kind in INNER for length in SCENES_PER_LENGTH}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_file_is_the_5b_model(path: Path) -> None:
    kind: TTTKind = "mlp" if path.parent.name == "ttt-mlp" else "linear"
    found = resolve_config(path)
    assert found.model == preset("5B", kind)
    assert inner_of(found.model) == (kind, *INNER[kind])
    assert (found.lengths, found.dtype, found.seed) == ((path.stem,), "bfloat16", 0)
    tokens = found.model.clip_size(path.stem).num_tokens(found.model.transformer.patch_size)
    assert tokens == NUM_TOKENS[path.stem]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_file_states_its_sizes(path: Path) -> None:
    """Left to the preset are the VAE, the text encoder and the schedule."""
    stated = msgspec.toml.decode(path.read_bytes())
    model = msgspec.to_builtins(preset("5B", stated["ttt"]))
    assert stated["preset"] == "5B"
    assert {name: stated[name] for name in ("width", "height", "text_lengths")}.items() <= model.items()
    names = ["model_dim", "num_heads", "num_layers", "text_dim", "time_embed_dim", "mini_batch_size", "ttt_base_lr"]
    assert stated["transformer"] == {name: model["transformer"][name] for name in names}


@pytest.mark.parametrize("kind", INNER)
def test_a_shipped_file_takes_other_sizes_where_they_divide(kind: str) -> None:
    path = ROOT / f"configs/ttt-{kind}/9s.toml"
    model = resolve_config(path, width=656, height=352).model
    assert (model.width, model.height) == (656, 352)
    assert model.clip_size("9s").num_tokens(2) == 3 * 502 + 37 * 41 * 22
    names(error_of(path, width=700), "9s.toml", "--width 700", "width", 700, 16)
    mini_batch_size, _ = INNER[kind]
    values = ("9s.toml", "--width 640", "3s", 16098, "mini_batch_size", mini_batch_size)
    names(error_of(path, width=640), *values, "text_lengths.3s", "width", "height")


# Command line over file over default


def test_without_a_file_the_defaults_are_those_of_tiny() -> None:
    found = resolve_config()
    assert found.model == preset("tiny", "linear")
    assert (found.lengths, found.dtype, found.seed) == (("9s",), "float32", 0)


@pytest.mark.parametrize(
    ("stated", "asked", "default", "of_file", "of_command_line"),
    [
        ('preset = "debug"', {"preset": "5B"}, "tiny", "debug", "5B"),
        ('ttt = "mlp"', {"ttt": "linear"}, ("linear", 16, 1.0), ("mlp", 64, 0.1), ("linear", 16, 1.0)),
        ('transformer.ttt = "mlp"', {"ttt": "linear"}, ("linear", 16, 1.0), ("mlp", 64, 0.1), ("linear", 16, 1.0)),
        ('length = "3s"', {"lengths": ["63s"]}, ("9s",), ("3s",), ("63s",)),
        ('length = ["3s", "18s"]', {"lengths": ["63s", "30s"]}, ("9s",), ("3s", "18s"), ("63s", "30s")),
        ('dtype = "float16"', {"dtype": "bfloat16"}, "float32", "float16", "bfloat16"),
        ('dtype = "bf16"', {"dtype": "fp32"}, "float32", "bfloat16", "float32"),
        ("width = 224", {"width": 352}, 96, 224, 352),
        ("height = 192", {"height": 320}, 64, 192, 320),
        ("seed = 7", {"seed": 0}, 0, 7, 0),
    ],
)
def test_what_goes_before_what(
    write: Write, stated: str, asked: dict[str, Any], default: object, of_file: object, of_command_line: object
) -> None:
    (option,) = asked

    def value(**options: Any) -> object:
        found = resolve_config(**options)
        if option in ("width", "height"):
            return getattr(found.model, option)
        if option == "preset":
            return found.model.name
        return inner_of(found.model) if option == "ttt" else getattr(found, option)

    path = write(stated)
    assert value() == default
    assert value(path=path) == of_file
    assert value(path=path, **asked) == of_command_line
    assert value(**asked) == of_command_line


def test_tables_are_laid_over_the_preset_field_by_field(write: Write) -> None:
    path = write("[transformer]\nnum_layers = 3\n[vae]\nscale_factor = 0.5\n[diffusion]\nshift_scale = 2")
    expected = msgspec.to_builtins(preset("debug", "mlp"))
    expected["transformer"]["num_layers"] = 3
    expected["vae"]["scale_factor"] = 0.5
    expected["diffusion"]["shift_scale"] = 2.0
    assert msgspec.to_builtins(resolve_config(path, preset="debug", ttt="mlp").model) == expected


def test_text_lengths_are_taken_whole(write: Write) -> None:
    """Those of the preset would not fit the width."""
    path = write("width = 112\ntext_lengths = { 3s = 132 }\nlength = '3s'")
    assert resolve_config(path).model.text_lengths == {"3s": 132}
    assert resolve_config(path, lengths=["9s"]).model.text_lengths == {"3s": 132}


def test_the_file_of_the_docs_is_a_whole_model(write: Write) -> None:
    """The same over every preset."""
    _, _, section = (ROOT / "docs/formats.md").read_text("utf-8").partition("## Model config")
    path = write(section.split("```toml\n")[1].split("```")[0])
    found = [resolve_config(path, preset=name) for name in ("tiny", "debug", "5B")]
    assert found[0] == found[1] == found[2]
    assert found[0].lengths == ("3s",)
    assert (found[0].model.name, found[0].model.width, found[0].model.text_lengths) == ("mine", 128, {"3s": 96})


# The kind of TTT


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ("", "mlp", ("mlp", 64, 0.1)),
        ('ttt = "mlp"', None, ("mlp", 64, 0.1)),
        ('ttt = "mlp"\ntransformer.ttt = "mlp"', None, ("mlp", 64, 0.1)),
        ("transformer.num_layers = 3", "mlp", ("mlp", 64, 0.1)),
        # Values beside their kind are taken as they stand.
        ('ttt = "mlp"\ntransformer.mini_batch_size = 16', None, ("mlp", 16, 0.1)),
        ('ttt = "mlp"\ntransformer.mini_batch_size = 16', "mlp", ("mlp", 16, 0.1)),
        ("transformer.mini_batch_size = 32", "linear", ("linear", 32, 1.0)),
    ],
)
def test_values_follow_the_kind(
    write: Write, content: str, kind: TTTKind | None, expected: tuple[str, int, float]
) -> None:
    # 64 patches a frame: full mini-batches for every size below.
    path = write(f"text_lengths = {{ 9s = 128 }}\nwidth = 128\nheight = 128\n{content}")
    assert inner_of(resolve_config(path, ttt=kind).model) == expected


@pytest.mark.parametrize(
    ("content", "kind", "values"),
    [
        (
            'ttt = "linear"\ntransformer.mini_batch_size = 16',
            "mlp",
            ("transformer.mini_batch_size", 16, "linear", "--ttt", "mlp", 'ttt = "mlp"'),
        ),
        ("transformer.mini_batch_size = 16", "mlp", ("transformer.mini_batch_size", 16, "linear", "--ttt", "mlp")),
        (
            'transformer = { ttt = "mlp", ttt_base_lr = 0.1 }',
            "linear",
            ("transformer.ttt_base_lr", 0.1, "mlp", "--ttt", "linear"),
        ),
        ('ttt = "mlp"\ntransformer.ttt = "linear"', None, ("ttt", "mlp", "transformer.ttt", "linear")),
    ],
)
def test_values_of_the_other_kind_are_refused(
    write: Write, content: str, kind: TTTKind | None, values: tuple[object, ...]
) -> None:
    names(error_of(write(content), ttt=kind), "my.toml", *values)


# Files that do not fit


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("transformer.num_layer = 3", ("transformer.num_layer", "num_layers")),
        ("widht = 96", ("widht", "width")),
        ("lengths = '9s'", ("lengths", "length")),
        ("[vea]", ("vea", "vae")),
        ("[vae]\nch_mul = [1]", ("vae.ch_mul", "ch_mult")),
        ("[text_encoder]\nvocabulary = 2", ("text_encoder.vocabulary", "vocab_size")),
        ("[diffusion]\nbeta = 2", ("diffusion.beta", "beta_end")),
        ("text_lengths.20s = 1", ("text_lengths", "20s", "18s", "21s")),
        ("[xyz]", ("xyz", "preset", "ttt", "length", "dtype", "seed", "transformer", "name", "width")),
        ('"a\\nb" = 1', ("a\\nb", "preset", "ttt", "length")),
        ("transformer.xyz = 1", ("transformer.xyz", "ttt", "model_dim", "num_heads")),
        ("output = 'x'", ("output",)),
        ("name = 3", ("name", "docs/formats.md")),
        ("width = '96'", ("width",)),
        ("seed = -1", ("seed", 0)),
        ("seed = true", ("seed",)),
        ("length = '7s'", ("length", "7s")),
        ("length = ['9s', '7s']", ("length[1]", "7s")),
        ("length = []", ("length", 1)),
        ("dtype = 'int8'", ("dtype", "int8")),
        ("ttt = 'cubic'", ("ttt", "cubic")),
        ("transformer.ttt = 'cubic'", ("transformer.ttt", "cubic")),
        ("transformer = 3", ("transformer",)),
        ("vae = 3", ("vae",)),
        ("width = { pixels = 3 }", ("width",)),
        ("text_lengths = 3", ("text_lengths",)),
        ("text_lengths.9s = 'x'", ("text_lengths",)),
        ("vae.ch_mult = [1, 'x']", ("vae.ch_mult[1]",)),
        ("preset = 'huge'", ("preset", "huge", "tiny", "debug", "5B")),
        ("width = 100", ("width", 100, 16, 2, 8, 96)),
        ("transformer.num_heads = 3", ("num_heads", 3, "model_dim", 64, "transformer")),
        ("width = 3 =", (line(1), column(11))),
        ("width = 96\nwidth = 96\nseed = 1", (line(2), column(11))),
        ("width = " + "[" * 5000, ()),
    ],
)
def test_a_file_that_does_not_fit_is_refused(write: Write, content: str, values: tuple[object, ...]) -> None:
    names(error_of(write(content)), "my.toml", *values)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"name = '\xff'")
    names(error_of(path), "my.toml", "0xff")
    names(error_of(tmp_path / "absent.toml"), "absent.toml")


# The command


@pytest.fixture
def exported(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Any, ...]]:
    """Runs `export` up to where the work starts: (model, lengths, dtype, seed) that it would do."""
    from ttt_video_engine.export import build

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(build, "export_bundle", lambda *arguments, **named: calls.append(arguments))

    def export(*options: object) -> tuple[Any, ...]:
        code, _, err = run("export", "--output", tmp_path / "bundle", *options)
        assert code == 0, err
        source, _, lengths, dtype, *_ = calls.pop()
        return source.model, lengths, dtype, source.seed

    return export


def test_export_takes_a_shipped_file_and_what_goes_before_it(
    exported: Callable[..., tuple[Any, ...]], tmp_path: Path
) -> None:
    # With a factor, as the folder holds no weights that could state one.
    shipped = ("--config", ROOT / "configs/ttt-mlp/9s.toml", "--checkpoint", tmp_path, "--vae-scale-factor", 1)
    model = preset("5B", "mlp")
    assert exported(*shipped) == (model, ("9s",), "bfloat16", 0)
    assert exported(*shipped, "--length", "63s") == (model, ("63s",), "bfloat16", 0)
    assert exported(*shipped, "--length", "3s", "--length", "9s", "--dtype", "fp16", "--seed", 5, "--preset", "5B") == (
        model,
        ("3s", "9s"),
        "float16",
        5,
    )
    sized, *_ = exported(*shipped, "--width", 656, "--height", 352, "--ttt", "mlp")
    assert (sized.width, sized.height) == (656, 352)


def test_export_takes_what_a_file_states(exported: Callable[..., tuple[Any, ...]], write: Write) -> None:
    path = write('preset = "debug"\nttt = "mlp"\nlength = ["3s", "9s"]\ndtype = "fp16"\nseed = 3')
    assert exported("--config", path) == (preset("debug", "mlp"), ("3s", "9s"), "float16", 3)
    options = ("--preset", "tiny", "--ttt", "linear", "--length", "9s", "--dtype", "float32", "--seed", 0)
    assert exported("--config", path, *options) == (preset("tiny", "linear"), ("9s",), "float32", 0)
    assert exported() == (preset("tiny", "linear"), ("9s",), "float32", 0)


@pytest.mark.parametrize(
    ("field", "value", "options"),
    [("transformer.num_layer", 3, ()), ("transformer.mini_batch_size", 16, ("--ttt", "mlp"))],
)
def test_export_refuses_a_file_in_one_line(
    run: Run, write: Write, tmp_path: Path, field: str, value: int, options: tuple[str, ...]
) -> None:
    path = write(f"{field} = {value}")
    names(refusal(run("export", "--config", path, "--output", tmp_path / "bundle", *options)), path, field)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_states_how_sample_renders(write: Write) -> None:
    found = resolve_config(
        write('[sampling]\nguidance = "constant"\nguidance_scale = 4.0\nguidance_interval = [0, 0.5]\n')
    )
    assert found.sampling == Settings(guidance="constant", guidance_scale=4.0, guidance_interval=(0.0, 0.5))
    assert resolve_config().sampling == Settings()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("guidance_scale = 0.5", "guidance scale"),
        ("guidance_interval = [0.5, 0.2]", "guidance interval"),
        ("step_cache = -1.0", "step_cache"),
        ("num_steps = 0", "num_steps"),
        ('guidance = "none"', "guidance"),
        ("seeds = 1", "sampling.seeds"),
    ],
)
def test_settings_that_cannot_render_are_refused(write: Write, line: str, name: str) -> None:
    names(error_of(write(f"[sampling]\n{line}\n")), name)


def test_help_shows_the_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("export", "--help")
    for default in ("tiny", "9s", "float32", "linear", "the preset's", "0"):
        assert f"[default: ({default})]" in out
