"""The bundle: the folder that `export` writes and `sample` reads. `bundle.json`, the manifest, lists its content.

A bundle is not trusted: no file name may leave the folder, every file must have its digest, and the graphs must have
the shapes that follow from the model's config.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from ttt_video_engine.runtime.config import ClipSize, ModelConfig
from ttt_video_engine.runtime.dtypes import DType
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BundleError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.graph_files import check_external_data
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.runner import TensorSpec
from ttt_video_engine.runtime.settings import Settings
from ttt_video_engine.runtime.verified import is_verified, mark_verified

FORMAT_VERSION = 2
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer/tokenizer.json"
ENGINES = "engines/"
CACHE_IN, CACHE_OUT = "cache_in.", "cache_out."
"""Prefixes of the VAE's cache inputs and outputs, which pass from one window to the next."""
TEXT_ENCODER, VAE_FIRST, VAE_NEXT = "text_encoder", "vae_decoder-first", "vae_decoder-next"


def transformer_graph_name(length: str) -> str:
    """Name of the transformer's graph for a length such as "9s"."""
    return f"transformer-{length}"


RANK = "rank"
"""The input of a graph for several devices that numbers them: [1] int64, from 0."""


def sharded_name(graph: str, devices: int) -> str:
    """Name of the graph that each of several devices runs in place of a transformer's graph."""
    return f"{graph}-{devices}devices"


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and digest of one file of the bundle."""

    sha256: str
    size: int


class ParityCheck(Struct, frozen=True, forbid_unknown_fields=True):
    """Errors of a graph against the reference on one set of inputs, relative to the largest reference value.

    `part` names the part of the model that was compared; it is empty where the whole model was.
    """

    inputs: str
    max_error: float
    mean_error: float
    tolerance: float
    part: str = ""


class GraphEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph: its files, inputs, outputs and parity results. `key` lists what it was built from."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: tuple[ParityCheck, ...]
    key: dict[str, str]


class Manifest(
    Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"stored_quantize": "quantize", "stored_devices": "devices"},
):
    """The content of `bundle.json`. `stored_quantize` and `stored_devices` are not written where they say nothing."""

    format_version: int = FORMAT_VERSION
    model: ModelConfig
    dtype: DType
    stored_quantize: Quantization | UnsetType = UNSET
    stored_devices: tuple[int, ...] | UnsetType = UNSET
    opset: int
    lengths: tuple[str, ...]
    graphs: dict[str, GraphEntry]
    tokenizer_key: dict[str, str]
    weight_keys: dict[str, dict[str, str]] = field(default_factory=dict)  # since format version 2
    files: dict[str, FileEntry]
    defaults: Settings = field(default_factory=Settings)
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def quantize(self) -> Quantization:
        """How the transformer is quantised."""
        return "none" if self.stored_quantize is UNSET else self.stored_quantize

    @property
    def devices(self) -> tuple[int, ...]:
        """Numbers of devices that the transformer also has graphs for."""
        return () if self.stored_devices is UNSET else self.stored_devices


class _Version(Struct):
    format_version: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Opening reads only the manifest: call `check` or `verify` before use."""

    root: Path
    manifest: Manifest

    @property
    def sha256(self) -> str:
        """Digest of `bundle.json`, which contains the digests of all other files."""
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
        """Reads a graph and its weights. Raises BundleError unless both have the digests in `bundle.json`."""
        graph = self.graph(name)
        for file in (graph.file, graph.weights):
            self._stat(file)
            self._check_digest(file)

    def path(self, name: str) -> Path:
        """Path of a file, by its name in the manifest."""
        return self.root / name

    def check(self) -> None:
        """Raises BundleError for the first file that is missing or has changed since the export. Reads few files.

        A file is read only if it is newer than `bundle.json`: because it was changed, or copied without its time. A
        file with the right digest is recorded in the user's cache, and is not read again until it changes. Engines are
        not checked here: each is verified when it is loaded.
        """
        exported = (self.root / MANIFEST).stat().st_mtime_ns
        for name in self._file_names():
            status, sha256 = self._stat(name), self.manifest.files[name].sha256
            if status.st_mtime_ns > exported and not is_verified(status, sha256):
                self._check_digest(name)
                mark_verified(status, sha256)
        self._check_graphs()

    def verify(self) -> None:
        """As `check`, but reads every file."""
        for name in self._file_names():
            self._stat(name)
            self._check_digest(name)
        self._check_graphs()

    def _check_graphs(self) -> None:
        """Raises BundleError unless each graph reads only the weight file that the manifest lists for it."""
        for graph in self.manifest.graphs.values():
            weights = self.manifest.files[graph.weights].size
            check_external_data(self.path(graph.file), self.path(graph.weights), weights)

    def _file_names(self) -> list[str]:
        """All files except those of engines."""
        return [name for name in self.manifest.files if not name.startswith(ENGINES)]

    def _stat(self, name: str) -> os.stat_result:
        """Status of a file. Raises BundleError where it is missing or of another size."""
        path = self.path(name)
        if not path.is_file():
            raise BundleError(f"{self.root}: {name} is missing; {EXPORT_AGAIN}")
        status = path.stat()
        if status.st_size != self.manifest.files[name].size:
            raise BundleError(f"{self.root}: {name} has changed since the export; {EXPORT_AGAIN}")
        return status

    def _check_digest(self, name: str) -> None:
        if sha256_of(self.path(name)) != self.manifest.files[name].sha256:
            raise BundleError(f"{self.root}: {name} has changed since the export; {EXPORT_AGAIN}")


def retired_folder(root: Path) -> Path:
    """Where a bundle is kept while a new one replaces it, on systems that cannot swap two names."""
    return root.with_name(f".{root.name}.previous")


def open_bundle(root: Path) -> Bundle:
    """Reads and checks the manifest. Raises BundleError that names the folder, the field and the cure.

    Where an export was killed while it replaced a bundle, the old bundle is opened.
    """
    if not os.path.lexists(root) and (retired_folder(root) / MANIFEST).is_file():
        root = retired_folder(root)
    manifest_path = root / MANIFEST
    try:
        content = manifest_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        cause = "is not a file" if isinstance(error, IsADirectoryError) else "is missing"
        raise BundleError(f"{root}: is not a bundle ({MANIFEST} {cause}); make one with ttt-video export") from error
    except OSError as error:
        raise BundleError(f"{manifest_path}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        version = msgspec.json.decode(content, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{manifest_path}: format_version is {version}; this program reads versions up to {FORMAT_VERSION}; "
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
    """Raises BundleError for a file name that leaves the folder, and for a file of a graph that has no digest."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise BundleError(f"{source}: files: {name!r} is outside the bundle; {EXPORT_AGAIN}")
    used = {name for graph in manifest.graphs.values() for name in (graph.file, graph.weights)} | {TOKENIZER}
    for name in sorted(used - set(manifest.files)):
        raise BundleError(f"{source}: files: {name!r} is used but not listed; {EXPORT_AGAIN}")


def _check_shapes(source: Path, manifest: Manifest) -> None:
    """Raises BundleError unless every component exists and has the inputs that follow from the model's config."""
    for name, expected in _expected_inputs(source, manifest).items():
        if name not in manifest.graphs:
            raise BundleError(f"{source}: graphs: {name} is missing; {EXPORT_AGAIN}")
        found = {spec.name: spec for spec in manifest.graphs[name].inputs}
        for input_name, shape in expected.items():
            spec = found.get(input_name)
            if spec is None or spec.shape != shape:
                raise BundleError(
                    f"{source}: graphs.{name}: has {spec or f'no input {input_name}'}; the model needs {list(shape)}; "
                    f"{EXPORT_AGAIN}"
                )


def _expected_inputs(source: Path, manifest: Manifest) -> dict[str, dict[str, tuple[int | str, ...]]]:
    """Input shapes by graph and name, without the VAE's caches, whose number depends on the decoder."""
    model = manifest.model
    if not manifest.lengths:
        raise BundleError(f"{source}: lengths: is empty; {EXPORT_AGAIN}")
    expected: dict[str, dict[str, tuple[int | str, ...]]] = {TEXT_ENCODER: {"ids": ("batch", "tokens")}}
    for length in manifest.lengths:
        if length not in model.text_lengths:
            raise BundleError(f"{source}: lengths: {length!r} is unknown; {EXPORT_AGAIN}")
        size = model.clip_size(length)
        name = transformer_graph_name(length)
        shapes: dict[str, tuple[int | str, ...]] = {
            "latents": ("batch", *latent_shape(model, size)),
            "text": ("batch", size.num_scenes, size.text_length, model.transformer.text_dim),
            "timestep": ("batch",),
        }
        expected[name] = shapes
        for devices in manifest.devices:
            expected[sharded_name(name, devices)] = {**shapes, RANK: (1,)}
    size = model.clip_size(manifest.lengths[0])
    _, channels, height, width = latent_shape(model, size)
    window = model.vae.temporal_window
    expected[VAE_FIRST] = {"latents": (1, window + 1, channels, height, width)}
    expected[VAE_NEXT] = {"latents": (1, window, channels, height, width)}
    return expected


def latent_shape(model: ModelConfig, size: ClipSize) -> tuple[int, int, int, int]:
    """(frames, channels, height, width) of a clip's latents."""
    return size.num_frames, model.transformer.in_channels, size.height, size.width
