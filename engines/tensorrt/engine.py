"""Engine files of a bundle, and the JSON that describes each.

TensorRT deserialises an engine only on a GPU, and does not validate its content. The JSON makes it possible to check
an engine before it is deserialised.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BackendError, export_for_gpu
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.runner import TensorSpec

FORMAT_VERSION = 3
FOLDER, KERNELS = "engines", "engines/kernels"
SUFFIX = ".engine"

Shape = tuple[int, ...]
PackageName = Literal["tensorrt", "tensorrt_rtx"]


class ShapeRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one input that a profile accepts: from `min` to `max`, optimised for `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def __str__(self) -> str:
        return " … ".join(str(list(shape)) for shape in dict.fromkeys((self.min, self.opt, self.max)))


Profile = dict[str, ShapeRange]
"""The shape range of each input with dynamic axes, by name."""


class BuildSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the builder. `workspace` is in bytes; None means as much as the model is estimated to need."""

    optimization_level: int = 3
    workspace: int | None = None
    weight_streaming: bool = False
    plugins: bool = True


class EngineEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of the JSON beside an engine.

    `plugins` maps the name of each plugin layer to that of the cubin of its scan; `kernels` are all that it launches,
    empty where that is the scan alone. `fallback` says why TTT layers run as standard
    operators; it is empty where none do. `activations` is the scratch memory of each profile, of the only one where
    `profiles` is empty, as TensorRT logged it; empty where it did not. `size`, `weights` (the weights that the engine
    loads) and `activations` are in bytes, `seconds` is the build time, `key` lists what the engine was built from.
    """

    format_version: int = FORMAT_VERSION
    graph: str
    gpu: str
    dtype: DType
    package: PackageName
    package_version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    plugins: dict[str, str]
    fallback: str = ""
    settings: BuildSettings = field(default_factory=BuildSettings)
    activations: tuple[int, ...] = ()
    size: int
    weights: int
    sha256: str
    seconds: float
    key: dict[str, str]
    kernels: tuple[str, ...] = ()

    @property
    def cubins(self) -> list[str]:
        """Names of all cubins that the plugins launch, sorted."""
        return sorted({*self.plugins.values(), *self.kernels})


@dataclass(frozen=True)
class EngineFile:
    """An engine of a bundle: its file, and the content of its JSON."""

    path: Path
    entry: EngineEntry

    def verify(self) -> None:
        """Raises BackendError where the file is missing or has changed since it was built."""
        if not self.path.is_file():
            raise BackendError(f"{self.path}: is missing; {export_for_gpu(self.entry.gpu)}")
        if self.path.stat().st_size != self.entry.size or sha256_of(self.path) != self.entry.sha256:
            raise BackendError(f"{self.path}: has changed since it was built; {export_for_gpu(self.entry.gpu)}")


def engine_name(graph: str, dtype: DType, package: PackageName, version: str, gpu: str) -> str:
    """File name of an engine: all properties that must match for it to run."""
    return f"{graph}.{dtype}.{package}-{version}.{gpu}{SUFFIX}"


def entry_path(engine: Path) -> Path:
    """The JSON beside an engine."""
    return engine.with_name(engine.name + ".json")


def list_engines(bundle: Path) -> list[EngineFile]:
    """All engines of a bundle, sorted by name. Raises BackendError with the path of a JSON that cannot be read."""
    return [_read(path) for path in _entry_paths(bundle)]


def readable_engines(bundle: Path) -> list[EngineFile]:
    """As `list_engines`, without those whose JSON cannot be read."""
    engines = []
    for path in _entry_paths(bundle):
        with suppress(BackendError):
            engines.append(_read(path))
    return engines


def find_engine(bundle: Path, graph: str, gpu: str) -> EngineFile:
    """The engine of a graph for a GPU. Raises BackendError that names the GPUs that have one, and the cure."""
    engines = [engine for engine in list_engines(bundle) if engine.entry.graph == graph]
    for engine in engines:
        if engine.entry.gpu == gpu:
            return engine
    others = ", ".join(sorted({engine.entry.gpu for engine in engines})) or "no GPU"
    raise BackendError(f"{bundle}: {graph} is built for {others}, not for {gpu}; {export_for_gpu(gpu)}")


def _entry_paths(bundle: Path) -> list[Path]:
    return sorted((bundle / FOLDER).glob(f"*{SUFFIX}.json"))


def _read(path: Path) -> EngineFile:
    try:
        entry = msgspec.json.decode(path.read_bytes(), type=EngineEntry)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BackendError(f"{path}: {error}; {EXPORT_AGAIN} with --engine tensorrt") from error
    if entry.format_version > FORMAT_VERSION:
        raise BackendError(
            f"{path}: format_version is {entry.format_version}; this program reads versions up to {FORMAT_VERSION}; "
            f"update ttt-video-engine or {EXPORT_AGAIN}"
        )
    return EngineFile(path.with_name(path.name.removesuffix(".json")), entry)
