"""Checks an engine before it is loaded, without a GPU: its JSON, bundle and package."""

from collections.abc import Mapping

from ttt_video_engine.engines.tensorrt.engine import KERNELS, EngineFile, Profile, Shape, find_engine, list_engines
from ttt_video_engine.engines.tensorrt.package import TensorRT, load_package
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import EXPORT_AGAIN, BackendError, export_for_gpu


def usable_engine(bundle: Bundle, graph: str, gpu: str) -> tuple[EngineFile, TensorRT]:
    """The verified engine of a graph for a GPU such as "sm_89", and the package that runs it.

    After an update of the package a bundle may have several engines: the first that passes all checks is returned.
    Raises BackendError with the reason where none passes: not built, package missing or of another version, from an
    earlier export, or damaged.
    """
    first = find_engine(bundle.root, graph, gpu)
    fault: BackendError | None = None
    for engine in [
        engine for engine in list_engines(bundle.root) if (engine.entry.graph, engine.entry.gpu) == (graph, gpu)
    ]:
        try:
            package = load_package(engine.entry.package)
            check_engine(engine, bundle, package.version)
            engine.verify()
            return engine, package
        except BackendError as error:
            fault = fault or error
    raise fault or BackendError(f"{first.path}: has been removed; {export_for_gpu(gpu)}")


def check_engine(engine: EngineFile, bundle: Bundle, version: str) -> None:
    """Raises BackendError unless an engine matches the package `version` and the bundle, and its kernels exist."""
    entry, manifest = engine.entry, bundle.manifest
    graph = bundle.graph(entry.graph)
    again = export_for_gpu(entry.gpu)
    if entry.package_version != version:
        wheel = entry.package.replace("_", "-")
        raise BackendError(
            f"{engine.path}: was built with {entry.package} {entry.package_version}; version {version} is installed; "
            f"{again} (or pip install {wheel}=={entry.package_version})"
        )
    bundled = {
        "graph": manifest.files[graph.file].sha256,
        "weights": manifest.files[graph.weights].sha256,
        "precision": manifest.dtype,
    }
    built_from = {"precision": entry.dtype, **entry.key}
    for part, value in bundled.items():
        if built_from.get(part) != value:
            raise BackendError(f"{engine.path}: is from another export ({part} differs); {again}")
    for cubin in entry.cubins:
        if not list(bundle.path(KERNELS).glob(f"{cubin}.*")):
            raise BackendError(f"{engine.path}: its kernel {cubin} is not in {bundle.path(KERNELS)}; {again}")
    for side, expected, found in (
        ("has inputs", graph.inputs, entry.inputs),
        ("has outputs", graph.outputs, entry.outputs),
    ):
        if set(expected) != set(found):
            listed, has = (", ".join(map(str, sorted(specs, key=str))) for specs in (expected, found))
            raise BackendError(f"{engine.path}: {side} {has}; the bundle lists {listed}; {again}")


def choose_profile(graph: str, profiles: tuple[Profile, ...], shapes: Mapping[str, Shape]) -> int:
    """Index of the first profile that is optimised for `shapes`, or else of the first that accepts them.

    Raises BackendError that names the first input that no profile accepts, its shape, and the accepted shapes.
    """
    if not profiles:
        return 0
    fitting = [number for number, profile in enumerate(profiles) if not _misfits(profile, shapes)]
    for number in fitting:
        if all(shapes[name] == shape.opt for name, shape in profiles[number].items()):
            return number
    if fitting:
        return fitting[0]
    name = _misfits(profiles[0], shapes)[0]
    allowed = " or ".join(f"{list(profile[name].min)} … {list(profile[name].max)}" for profile in profiles)
    raise BackendError(
        f"{graph}: input {name} is {list(shapes[name])}; the engine was built for {allowed}; "
        f"{EXPORT_AGAIN} with the lengths to render"
    )


def _misfits(profile: Profile, shapes: Mapping[str, Shape]) -> list[str]:
    """Inputs whose shape a profile does not accept."""
    return [
        name
        for name, shape in profile.items()
        if not all(low <= n <= high for low, n, high in zip(shape.min, shapes[name], shape.max, strict=True))
    ]
