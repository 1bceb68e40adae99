"""A plan, which is what TensorRT calls a built engine, and the JSON beside it that says what it is.

Reading a plan needs a GPU and trust; everything that can be known without either stands in the JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from ttt_video_engine.runtime.config import DType
from ttt_video_engine.runtime.engine import TensorSpec
from ttt_video_engine.runtime.errors import EngineError
from ttt_video_engine.runtime.files import sha256_of

FORMAT_VERSION = 1
FOLDER, KERNELS = "engines", "engines/kernels"
SUFFIX = ".plan"

Shape = tuple[int, ...]
PackageName = Literal["tensorrt", "tensorrt_rtx"]


class ShapeRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one input that a profile takes: from `min` to `max`, tuned for `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def __str__(self) -> str:
        return " … ".join(str(list(shape)) for shape in dict.fromkeys((self.min, self.opt, self.max)))


Profile = dict[str, ShapeRange]
"""Input → shapes, for the inputs that have free axes."""


class BuildSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the builder was asked for. `workspace` is in bytes; None leaves it to TensorRT."""

    optimization_level: int = 3
    workspace: int | None = None
    weight_streaming: bool = False
    plugins: bool = True


class PlanEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of the JSON beside a plan.

    `plugins` names the layers that run a kernel of ours and the cubin of each; `fallback` says why TTT layers run as
    standard operators instead, and is empty where none do. `weights` are the bytes of weights that were built in.
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
    size: int
    weights: int
    sha256: str
    seconds: float
    key: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """A plan in a bundle: its file, and what the JSON says of it."""

    path: Path
    entry: PlanEntry

    def verify(self) -> None:
        """Raises EngineError where the plan is not the file that was built."""
        if not self.path.is_file():
            raise EngineError(f"{self.path}: is missing; {_cure(self.entry.gpu)}")
        if self.path.stat().st_size != self.entry.size or sha256_of(self.path) != self.entry.sha256:
            raise EngineError(f"{self.path}: has changed since it was built; {_cure(self.entry.gpu)}")


def plan_name(graph: str, dtype: DType, package: PackageName, version: str, gpu: str) -> str:
    """File name of a plan; everything in it makes a plan useless elsewhere."""
    return f"{graph}.{dtype}.{package}-{version}.{gpu}{SUFFIX}"


def entry_path(plan: Path) -> Path:
    """The JSON beside a plan."""
    return plan.with_name(plan.name + ".json")


def list_plans(bundle: Path) -> list[Plan]:
    """All plans of a bundle, by name. Raises EngineError naming a JSON that cannot be read."""
    return [_read(path) for path in sorted((bundle / FOLDER).glob(f"*{SUFFIX}.json"))]


def find_plan(bundle: Path, graph: str, gpu: str) -> Plan:
    """The plan of a graph for a GPU. Raises EngineError that says which there are, and how to build the one missing."""
    plans = [plan for plan in list_plans(bundle) if plan.entry.graph == graph]
    for plan in plans:
        if plan.entry.gpu == gpu:
            return plan
    others = ", ".join(sorted({plan.entry.gpu for plan in plans})) or "no GPU"
    raise EngineError(f"{bundle}: {graph} is built for {others}, not for {gpu}; {_cure(gpu)}")


def _read(path: Path) -> Plan:
    try:
        entry = msgspec.json.decode(path.read_bytes(), type=PlanEntry)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: {error}; export the bundle again with --engine tensorrt") from error
    if entry.format_version > FORMAT_VERSION:
        raise EngineError(
            f"{path}: format_version is {entry.format_version}, this program reads up to {FORMAT_VERSION}; "
            "update ttt-video-engine or export the bundle again"
        )
    return Plan(path.with_name(path.name.removesuffix(".json")), entry)


def _cure(gpu: str) -> str:
    return f"run: ttt-video export --engine tensorrt --gpu {gpu}"
