"""Execution providers of ONNX Runtime that come as packages of their own, through its plugin interface.

None of them knows the TTT operator: ONNX Runtime replaces the node by its function, and the provider takes those of the
standard operators in it that it supports; the CPU runs the others.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, get_args

from ttt_video_engine.engines.ort import ort
from ttt_video_engine.runtime.errors import BackendError

PluginName = Literal["nv-tensorrt-rtx", "openvino"]
PLUGINS: tuple[PluginName, ...] = get_args(PluginName)


def package(plugin: PluginName) -> str:
    """The package that brings a provider, as pip calls it."""
    return f"onnxruntime-ep-{plugin}"


def is_installed(plugin: PluginName) -> bool:
    return find_spec(_module(plugin)) is not None


@cache
def plugin_devices(plugin: PluginName) -> tuple[ort.OrtEpDevice, ...]:
    """Registers the provider's library with ONNX Runtime; the devices that it can use, at least one.

    Raises BackendError where the package is missing, its library does not load, or no device suits it.
    """
    if not is_installed(plugin):
        raise BackendError(f"--provider {plugin}: is not installed; run: pip install {package(plugin)}")
    try:
        module = import_module(_module(plugin))
        name: str = module.get_ep_name()
        ort.register_execution_provider_library(name, module.get_library_path())
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        first_line = str(error).strip().splitlines()[0][:300]
        raise BackendError(f"--provider {plugin}: {package(plugin)} does not load ({first_line})") from error
    devices = tuple(device for device in ort.get_ep_devices() if device.ep_name == name)
    if not devices:
        raise BackendError(f"--provider {plugin}: no device of this machine suits it; use --provider cpu")
    return devices


def _module(plugin: PluginName) -> str:
    return package(plugin).replace("-", "_")
