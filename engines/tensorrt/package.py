"""Imports TensorRT: the package `tensorrt` for data centre GPUs or `tensorrt_rtx` for RTX GPUs, with the same API.

A GPU needs only one of them, so each is imported when it is first used. Neither has type hints.
"""

import atexit
import ctypes
import importlib
import importlib.util
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ttt_video_engine.engines.tensorrt.engine import PackageName
from ttt_video_engine.runtime.dtypes import TensorDType
from ttt_video_engine.runtime.errors import BackendError, ConfigError

RTX_GPUS = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""The architectures that TensorRT-RTX builds for. It also supports sm_75, but not the float32 matrix products that the
TTT layers need there."""


class StatedMemory:
    """Bytes that the builder's log gives: scratch memory in the order of the profiles, and weights of the engine."""

    def __init__(self) -> None:
        self.activations: list[int] = []
        self.weights = 0

    def clear(self) -> None:
        """To be called before a build."""
        self.activations.clear()
        self.weights = 0

    def read(self, message: str) -> None:
        """Takes the size that a message gives, if any."""
        found = re.match(r"Total (Activation|Weights) Memory: (\d+) bytes", message)
        if found is not None and found[1] == "Activation":
            self.activations.append(int(found[2]))
        elif found is not None:
            self.weights = max(self.weights, int(found[2]))


@dataclass(frozen=True)
class TensorRT:
    """An imported package. `api` is its module.

    `errors` are the messages that `logger` has received. `stated` are the sizes in bytes that a build's log gave since
    it was last cleared.
    """

    name: PackageName
    api: Any
    version: str
    logger: Any
    errors: list[str] = field(default_factory=list)
    stated: StatedMemory = field(default_factory=StatedMemory)

    @property
    def dtypes(self) -> dict[TensorDType, Any]:
        """TensorRT's `DataType` for each dtype."""
        kinds = self.api.DataType
        return {"float32": kinds.FLOAT, "float16": kinds.HALF, "bfloat16": kinds.BF16, "int64": kinds.INT64}

    def take_errors(self) -> str:
        """The first error since the last call, as one line; clears `errors`."""
        line = " ".join(self.errors[0].split()) if self.errors else "no reason was given"
        self.errors.clear()
        return line[:300]


def package_for(gpu: str) -> PackageName:
    """The package for a GPU architecture such as "sm_89". Raises ConfigError for anything else."""
    if not re.fullmatch(r"sm_\d{2,3}", gpu):
        raise ConfigError(f"--gpu is {gpu!r}: must be an architecture such as {', '.join(RTX_GPUS)} or sm_90")
    return "tensorrt_rtx" if gpu in RTX_GPUS else "tensorrt"


@cache
def load_package(name: PackageName) -> TensorRT:
    """The imported package. Raises BackendError where it is not installed or does not load."""
    if importlib.util.find_spec(name) is None:
        wheel, extra = name.replace("_", "-"), " (or 'ttt-video-engine[tensorrt]')" if name == "tensorrt_rtx" else ""
        raise BackendError(f"{name} is not installed; run: pip install {wheel}{extra}")
    try:
        if name == "tensorrt_rtx":
            _give_library_its_plain_name()
        api = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} does not load ({error}); install it again") from error
    errors: list[str] = []
    stated = StatedMemory()
    return TensorRT(name, api, api.__version__, _logger(api, errors, stated), errors, stated)


@cache
def _give_library_its_plain_name() -> None:
    """Loads TensorRT-RTX from a folder of links that has its library under two names.

    For a graph with plugins the parser opens `libtensorrt_rtx.so` in its own folder, and aborts the process where that
    file is missing. The wheel (1.7) contains `libtensorrt_rtx.so.1` only. Raises BackendError where other code has
    imported the package already: its library is loaded from the wheel then, and the abort could not be prevented.
    """
    if "tensorrt_rtx" in sys.modules:
        raise BackendError("tensorrt_rtx was imported by other code first; call load_package before that import")
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        return  # not from a wheel; a system package has all names
    (libraries, *_) = spec.submodule_search_locations
    folder = Path(tempfile.mkdtemp(prefix="tensorrt-rtx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for library in sorted(
        Path(libraries).glob("lib*.so.*"), reverse=True
    ):  # reversed: the core before the parser, which needs it
        (folder / library.name).symlink_to(library)
        (folder / (library.name.partition(".so.")[0] + ".so")).symlink_to(library)
        ctypes.CDLL(str(folder / library.name))


def _logger(api: Any, errors: list[str], stated: StatedMemory) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]  # the base has no types
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.INTERNAL_ERROR, api.ILogger.Severity.ERROR):
                errors.append(message)
            elif severity == api.ILogger.Severity.INFO:
                stated.read(message)

    return Logger()
