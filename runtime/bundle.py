"""The bundle: the one artefact between `export` and `sample`, a folder that `bundle.json` describes whole.

Nothing in a bundle is trusted: names stay inside the folder, bytes must have their digest, and the graphs must have the
shapes that the model's config calls for.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import Struct, field

from ttt_video_engine.runtime.config import ClipSize, ModelConfig
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BundleError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.graph_files import check_external_data
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.verified import is_noted, note

FORMAT_VERSION = 2
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer/tokenizer.json"
ENGINES = "engines/"
CACHE_IN, CACHE_OUT = "cache_in.", "cache_out."
"""Prefixes of the VAE's inputs and outputs that one window hands to the next."""
TEXT_ENCODER, VAE_FIRST, VAE_NEXT = "text_encoder", "vae_decoder-first", "vae_decoder-next"


def transformer_graph_name(length: str) -> str:
    """Name of the transformer's graph for a length such as "9s"."""
    return f"transformer-{length}"


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and digest of one file of the bundle."""

    sha256: str
    size: int


class ParityCheck(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a graph was from the reference on one set of inputs, relative to the largest reference value.

    `part` is empty, or what of the model was run where all of it is too large to run where it is exported.
    """

    inputs: str
    max_error: float
    mean_error: float
    tolerance: float
    part: str = ""


class GraphEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph: its file and weights, what it takes and gives, how it did in parity, what it was built from."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: tuple[ParityCheck, ...]
    key: dict[str, str]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of `bundle.json`."""

    format_version: int = FORMAT_VERSION
    model: ModelConfig
    dtype: DType
    opset: int
    lengths: tuple[str, ...]
    graphs: dict[str, GraphEntry]
    tokenizer_key: dict[str, str]
    weight_keys: dict[str, dict[str, str]] = field(default_factory=dict)  # since format version 2
    files: dict[str, FileEntry]
    defaults: Settings = field(default_factory=Settings)
    tools: dict[str, str] = field(default_factory=dict)


class _Version(Struct):
    format_version: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `check` or `verify` before use: opening reads the manifest only."""

    root: Path
    manifest: Manifest

    @property
    def sha256(self) -> str:
        """Digest of `bundle.json`, which holds those of all other files."""
        return sha256_of(self.root / MANIFEST)

    def graph(self, name: str) -> GraphEntry:
        """Raises BundleError where the bundle has no such graph."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(f"{self.root}: has no graph {name}; it has {', '.join(self.manifest.graphs)}") from None

    def component_digest(self, name: str) -> str:
        """Digest of a graph and its weights. Raises BundleError where the bundle has no such graph."""
        graph = self.graph(name)
        return f"{self.manifest.files[graph.file].sha256} {self.manifest.files[graph.weights].sha256}"

    def verify_component(self, name: str) -> None:
        """Reads a graph and its weights. Raises BundleError where they do not have the digest of `bundle.json`."""
        graph = self.graph(name)
        for file in (graph.file, graph.weights):
            self._status(file)
            self._verify(file)

    def path(self, name: str) -> Path:
        """A file of the bundle by its name in the manifest."""
        return self.root / name

    def check(self) -> None:
        """Raises BundleError for the first file that is missing or is not what was exported, in no time.

        Only a file that is newer than `bundle.json` is read, as one is that was changed, or copied without its time;
        that it has its digest is noted in the user's cache, and holds until the file is touched. Engines aside: the one
        that is used verifies itself when it is loaded.
        """
        exported = (self.root / MANIFEST).stat().st_mtime_ns
        for name in self._checked():
            status, sha256 = self._status(name), self.manifest.files[name].sha256
            if status.st_mtime_ns > exported and not is_noted(status, sha256):
                self._verify(name)
                note(status, sha256)
        self._check_graphs()

    def verify(self) -> None:
        """As `check`, but reads every file."""
        for name in self._checked():
            self._status(name)
            self._verify(name)
        self._check_graphs()

    def _check_graphs(self) -> None:
        """Graphs read the file that the manifest lists as their weights, and nothing else."""
        for graph in self.manifest.graphs.values():
            weights = self.manifest.files[graph.weights].size
            check_external_data(self.path(graph.file), self.path(graph.weights), weights)

    def _checked(self) -> list[str]:
        return [name for name in self.manifest.files if not name.startswith(ENGINES)]

    def _status(self, name: str) -> os.stat_result:
        path = self.path(name)
        if not path.is_file():
            raise BundleError(f"{self.root}: {name} is missing; {EXPORT_AGAIN}")
        status = path.stat()
        if status.st_size != self.manifest.files[name].size:
            raise BundleError(f"{self.root}: {name} has changed since the export; {EXPORT_AGAIN}")
        return status

    def _verify(self, name: str) -> None:
        if sha256_of(self.path(name)) != self.manifest.files[name].sha256:
            raise BundleError(f"{self.root}: {name} has changed since the export; {EXPORT_AGAIN}")


def retired_folder(root: Path) -> Path:
    """Where a bundle lies for the moment in which its successor takes its place, where two names cannot be swapped."""
    return root.with_name(f".{root.name}.previous")


def open_bundle(root: Path) -> Bundle:
    """Reads and checks the manifest. Raises BundleError naming the folder, the field and the cure.

    Where an export was killed as it took the bundle's place, the bundle before it is opened.
    """
    if not os.path.lexists(root) and (retired_folder(root) / MANIFEST).is_file():
        root = retired_folder(root)
    manifest_path = root / MANIFEST
    try:
        content = manifest_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        cause = "is no file" if isinstance(error, IsADirectoryError) else "is missing"
        raise BundleError(f"{root}: is not a bundle ({MANIFEST} {cause}); make one with ttt-video export") from error
    except OSError as error:
        raise BundleError(f"{manifest_path}: cannot be read ({error.strerror}); check who may read it") from error
    try:
        version = msgspec.json.decode(content, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{manifest_path}: format_version is {version}, this program reads up to {FORMAT_VERSION}; "
                f"update ttt-video-engine or {EXPORT_AGAIN}"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{manifest_path}: {error}; {EXPORT_AGAIN}") from error
    _check_names(manifest_path, manifest)
    _check_shapes(manifest_path, manifest)
    return Bundle(root, manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """`bundle.json` as bytes, indented for people."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _check_names(source: Path, manifest: Manifest) -> None:
    """Every file stays inside the folder, and every file that is used has a digest."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise BundleError(f"{source}: files: {name!r} leads out of the bundle; {EXPORT_AGAIN}")
    used = {name for graph in manifest.graphs.values() for name in (graph.file, graph.weights)} | {TOKENIZER}
    for name in sorted(used - set(manifest.files)):
        raise BundleError(f"{source}: files: {name!r} is used but not listed; {EXPORT_AGAIN}")


def _check_shapes(source: Path, manifest: Manifest) -> None:
    """Every component is there, and takes what the model's config calls for."""
    for name, expected in _expected_inputs(source, manifest).items():
        if name not in manifest.graphs:
            raise BundleError(f"{source}: graphs: {name} is missing; {EXPORT_AGAIN}")
        found = {spec.name: spec for spec in manifest.graphs[name].inputs}
        for input_name, shape in expected.items():
            spec = found.get(input_name)
            if spec is None or spec.shape != shape:
                raise BundleError(
                    f"{source}: graphs.{name}: takes {spec or f'no {input_name}'}, the model calls for {list(shape)}; "
                    f"{EXPORT_AGAIN}"
                )


def _expected_inputs(source: Path, manifest: Manifest) -> dict[str, dict[str, tuple[int | str, ...]]]:
    """Shapes by graph and input, the VAE's caches aside: their number is the decoder's own affair."""
    model = manifest.model
    if not manifest.lengths:
        raise BundleError(f"{source}: lengths: is empty; {EXPORT_AGAIN}")
    expected: dict[str, dict[str, tuple[int | str, ...]]] = {TEXT_ENCODER: {"ids": ("batch", "tokens")}}
    for length in manifest.lengths:
        if length not in model.text_lengths:
            raise BundleError(f"{source}: lengths: {length!r} is unknown; {EXPORT_AGAIN}")
        size = model.clip_size(length)
        expected[transformer_graph_name(length)] = {
            "latents": ("batch", *latent_shape(model, size)),
            "text": ("batch", size.num_scenes, size.text_length, model.transformer.text_dim),
            "timestep": ("batch",),
        }
    size = model.clip_size(manifest.lengths[0])
    _, channels, height, width = latent_shape(model, size)
    window = model.vae.temporal_window
    expected[VAE_FIRST] = {"latents": (1, window + 1, channels, height, width)}
    expected[VAE_NEXT] = {"latents": (1, window, channels, height, width)}
    return expected


def latent_shape(model: ModelConfig, size: ClipSize) -> tuple[int, int, int, int]:
    """(frames, channels, height, width) of a clip's latents."""
    return size.num_frames, model.transformer.in_channels, size.height, size.width
