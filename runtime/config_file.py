"""Config files: how to export a model, in TOML, laid over a preset. `docs/formats.md` lists the fields.

Those of the public TTT-Video code are taken as well: `public_config.py` puts them into the form of ours.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from ttt_video_engine.runtime import presets
from ttt_video_engine.runtime.config import LengthName, ModelConfig, TTTChoice, num_scenes
from ttt_video_engine.runtime.dtypes import DTYPES, DType, Precision
from ttt_video_engine.runtime.errors import ConfigError, hint
from ttt_video_engine.runtime.passes import check_steps
from ttt_video_engine.runtime.public_config import export_table, is_public, with_placeholders_quoted
from ttt_video_engine.runtime.settings import Seed, Settings, settings_for

MAX_FILE_BYTES = 64 << 10

Table = dict[str, Any]


class ExportConfig(Struct, frozen=True, kw_only=True):
    """What to export. Every length is one that the model can have; `seed` is that of random weights, `sampling` are the
    settings of rendering that the bundle states.

    `vae_scale_stated` says that an option or the file states the VAE scale factor, so a checkpoint does not change it.
    `warnings` are lines about a file of the public code: what of it has no meaning here.
    """

    model: ModelConfig
    lengths: tuple[str, ...]
    dtype: DType
    seed: int
    sampling: Settings
    vae_scale_stated: bool = False
    warnings: tuple[str, ...] = ()


def resolve_config(
    path: Path | None = None,
    *,
    preset: str | None = None,
    ttt: TTTChoice | None = None,
    lengths: Sequence[str] | None = None,
    dtype: Precision | None = None,
    width: int | None = None,
    height: int | None = None,
    vae_scale_factor: float | None = None,
    seed: int | None = None,
    with_stored_sizes: Callable[[ModelConfig], ModelConfig] | None = None,
) -> ExportConfig:
    """What is asked for, else what the file at `path` states, else the default.

    The model is the preset, made for the kind of TTT, then the file's fields, then `width` and `height` in pixels and
    the `scale_factor` of the VAE. For a model without TTT, `with_stored_sizes` gives the preset, 5B by default, the
    sizes of a checkpoint. Raises ConfigError, which names the file where there is one, and the field.
    """
    table, warnings = ({}, []) if path is None else _read(path)
    size = {name: pixels for name, pixels in (("width", width), ("height", height)) if pixels is not None}
    with naming(path):
        stated = msgspec.convert(table, _Stated)
        kind = _kind(stated, ttt)
    resized = with_stored_sizes if kind == "none" else None
    base = presets.preset(preset or stated.preset or ("5B" if resized else "tiny"), kind)
    base = resized(base) if resized else base
    fields = {name: value for name, value in table.items() if name in ModelConfig.__struct_fields__}
    merged = _overlay(msgspec.to_builtins(base), fields | size)
    merged["transformer"]["ttt"] = kind
    options = [f"--{name} {pixels}" for name, pixels in size.items()]
    if vae_scale_factor is not None:
        options.append(f"--vae-scale-factor {vae_scale_factor}")
    # What is asked for may be what does not fit the file: the error names both.
    with naming(path, *options):
        model = msgspec.convert(merged, ModelConfig)
        if vae_scale_factor is not None:
            model = replace(model, vae=replace(model.vae, scale_factor=vae_scale_factor))
        # Without TTT, scenes know little of each other: one is the length that CogVideoX was trained for.
        chosen = tuple(lengths or stated.lengths or ("3s" if kind == "none" else "9s",))
        for length in chosen:
            model.clip_size(length)
    with naming(path):
        sampling = msgspec.convert(_overlay(msgspec.to_builtins(settings_for(kind)), stated.sampling), Settings)
        check_steps(sampling, model.diffusion)
    return ExportConfig(
        model=model,
        lengths=chosen,
        dtype=DTYPES[dtype or stated.dtype or "float32"],
        seed=next(value for value in (seed, stated.seed, 0) if value is not None),
        sampling=sampling,
        vae_scale_stated=vae_scale_factor is not None or "scale_factor" in table.get("vae", {}),
        warnings=tuple(f"{path}: {warning}" for warning in warnings),
    )


class _Inner(Struct, frozen=True):
    """Those fields of the transformer that go with its kind of TTT."""

    ttt: TTTChoice | None = None
    mini_batch_size: int | None = None
    ttt_base_lr: float | None = None


class _Stated(Struct, frozen=True, kw_only=True):
    """The options of `export` that a file may state; None where it does not."""

    preset: str | None = None
    ttt: TTTChoice | None = None
    length: LengthName | Annotated[list[LengthName], Meta(min_length=1)] | None = None
    dtype: Precision | None = None
    seed: Seed | None = None
    transformer: _Inner = _Inner()
    sampling: Table = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset is not None:
            presets.preset(self.preset)  # raises for a name that is not there
        for number, length in enumerate(self.lengths or (), 1):
            try:
                num_scenes(length)
            except ConfigError as error:
                place = f"length[{number - 1}], " if isinstance(self.length, list) else ""
                raise ConfigError(f"{place}{error}") from error

    @property
    def lengths(self) -> list[LengthName] | None:
        return self.length if self.length is None or isinstance(self.length, list) else [self.length]


def _names(struct: type[Struct]) -> Table:
    """The fields of a struct, each with those of its own."""
    nested = ((field.name, field.type) for field in msgspec.structs.fields(struct))
    return {name: _names(kind) if isinstance(kind, type) and issubclass(kind, Struct) else {} for name, kind in nested}


_KNOWN = _names(_Stated) | _names(ModelConfig) | {"sampling": _names(Settings)}


def _read(path: Path) -> tuple[Table, list[str]]:
    """The content of a file in our form, in which every name is known, and warnings."""
    table, warnings = read_toml(path), list[str]()
    with naming(path):
        if is_public(table):
            table, warnings = export_table(table)
        _check_names(table, _KNOWN, "")
    return table, warnings


def read_toml(path: Path) -> Table:
    """The content of a TOML file. Raises ConfigError where it is too large or no TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is over {MAX_FILE_BYTES >> 10} KiB; give a TOML file of sizes and options")
    try:
        text = content.decode("utf-8-sig")  # some editors put a byte order mark first
        return tomllib.loads(with_placeholders_quoted(text))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested a thousand deep
        raise ConfigError(f"{path}: is not TOML ({error}); see docs/formats.md") from error


def _check_names(table: Table, known: Mapping[str, Table], place: str) -> None:
    for name, value in table.items():
        if name not in known:
            # repr: a name in quotes may hold a line break.
            raise ConfigError(f"{place}{repr(name)[1:-1][:60]} is unknown; {hint(name, known)}")
        if isinstance(value, dict) and known[name]:
            _check_names(value, known[name], f"{place}{name}.")


def _kind(stated: _Stated, asked: TTTChoice | None) -> TTTChoice:
    """The kind of TTT: asked for, stated, or linear. Raises ConfigError where the file states values of another."""
    inner = stated.transformer
    if stated.ttt and inner.ttt and stated.ttt != inner.ttt:
        raise ConfigError(f"ttt is {stated.ttt!r} and transformer.ttt is {inner.ttt!r}; leave one out")
    own = stated.ttt or inner.ttt or "linear"
    kind = asked or own
    for name in ("mini_batch_size", "ttt_base_lr"):
        value = getattr(inner, name)
        if kind != own and value is not None:
            cure = f'leave it or --ttt out, or state ttt = "{kind}" in the file, with values for it'
            raise ConfigError(f"transformer.{name} is {value} for ttt {own}, and --ttt is {kind}; {cure}")
    return kind


def _overlay(base: Table, over: Table) -> Table:
    """`base` with what `over` states; tables field by field.

    But text_lengths as a whole: the lengths of the base need not fit the sizes of the file.
    """
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict) and name != "text_lengths"
        merged[name] = _overlay(base[name], value) if both else value
    return merged


@contextmanager
def naming(path: Path | None, *options: str) -> Iterator[None]:
    """Makes what is wrong a ConfigError that starts with the file, and with the options that go before it."""
    place = "" if path is None else f"{', '.join((str(path), *options))}: "
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from error
    except msgspec.ValidationError as error:
        cure = "" if isinstance(error.__cause__, ConfigError) else "; see docs/formats.md for the fields"
        raise ConfigError(f"{place}{error}{cure}") from error
