"""Lists the backends that can run graphs on this machine, and why others cannot."""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context

from ttt_video_engine.engines.cuda import Device, devices
from ttt_video_engine.engines.onnxruntime import PROVIDERS, execution_providers
from ttt_video_engine.engines.ort import ort
from ttt_video_engine.engines.plugin_providers import PLUGINS, PluginName, is_installed, package, plugin_devices
from ttt_video_engine.engines.tensorrt.engine import PackageName
from ttt_video_engine.engines.tensorrt.package import load_package, package_for
from ttt_video_engine.runtime.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """One way to run graphs. `reason` says why it is unusable and what to do; it is empty for a usable backend."""

    name: str
    version: str | None
    usable: bool
    reason: str


@dataclass(frozen=True)
class Survey:
    """All backends and GPUs. `no_gpu` says why no GPU was found; it is empty if one was."""

    backends: tuple[Backend, ...]
    gpus: tuple[Device, ...]
    no_gpu: str


def survey() -> Survey:
    """Examines this machine. Imports the installed packages, loads no graph, never raises."""
    gpus: tuple[Device, ...] = ()
    no_gpu = ""
    try:
        gpus = tuple(devices())
    except BackendError as error:
        no_gpu = str(error)
    providers = [_provider(name, no_gpu) for name in PROVIDERS]
    plugins = [_plugin(name) for name in PLUGINS]
    packages = [_package("tensorrt", gpus, no_gpu), _package("tensorrt_rtx", gpus, no_gpu), _torch()]
    return Survey((*providers, *plugins, *packages), gpus, no_gpu)


def _provider(name: str, no_gpu: str) -> Backend:
    try:
        execution_providers(name)  # type: ignore[arg-type]  # a key of PROVIDERS is a name
        reason = "" if name == "cpu" else no_gpu
    except BackendError as error:
        reason = str(error).removeprefix(f"--provider {name}: ")
    return Backend(f"onnxruntime {name}", ort.__version__, not reason, reason)


def _plugin(name: PluginName) -> Backend:
    """Asks in a process of its own: two copies of TensorRT-RTX's libraries do not bear each other in one."""
    title = f"onnxruntime {name}"
    if not is_installed(name):
        return Backend(title, None, False, f"run: pip install {package(name)}")
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            reason = child.submit(_plugin_fault, name).result()
    except BrokenProcessPool:
        reason = f"{package(name)} ends the process that loads it"
    return Backend(title, _distribution_version(package(name)), not reason, reason)


def _plugin_fault(name: PluginName) -> str:
    """Why a plugin provider cannot be used; empty if it can."""
    try:
        plugin_devices(name)
    except BackendError as error:
        return str(error).removeprefix(f"--provider {name}: ")
    return ""


def _package(name: PackageName, gpus: tuple[Device, ...], no_gpu: str) -> Backend:
    """TensorRT needs its package, cuda-core, and a GPU that the package supports."""
    try:
        found = load_package(name).version
    except BackendError as error:
        return Backend(name, _distribution_version(name), False, str(error))
    if not gpus:
        return Backend(name, found, False, no_gpu)
    others = [gpu.gpu for gpu in gpus if package_for(gpu.gpu) != name]
    if len(others) == len(gpus):
        reason = f"{', '.join(others)} needs {package_for(others[0])}; install that package"
        return Backend(name, found, False, reason)
    return Backend(name, found, True, "")


def _torch() -> Backend:
    """torch runs on any CPU, and decides about GPUs when it is imported, which takes seconds."""
    missing = [name for name in ("torch", "transformers") if _distribution_version(name) is None]
    reason = f"{missing[0]} is not installed; run: pip install 'ttt-video-engine[torch]'" if missing else ""
    return Backend("torch", _distribution_version("torch"), not missing, reason)


def _distribution_version(name: str) -> str | None:
    """Version of a package that is installed, whether it loads or not; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
