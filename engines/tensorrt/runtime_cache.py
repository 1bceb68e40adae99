"""The kernels that TensorRT-RTX compiles when it loads and first runs an engine, kept in a file for the next start.

The file is beside the engine. Its name has the engine's and a key of the GPU, the driver and the package. Its first
line has the digests of the engine and of the content that follows. A file that is damaged, or of another engine, is
ignored and replaced. Without a file, or where none can be written, an engine runs as well, and starts later.
"""

import hashlib
from contextlib import suppress
from typing import Any

from ttt_video_engine.engines.cuda import Device
from ttt_video_engine.engines.tensorrt.engine import EngineFile
from ttt_video_engine.engines.tensorrt.package import TensorRT
from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write

SUFFIX = ".cache"


class RuntimeCache:
    """The compiled kernels of one engine on one GPU. TensorRT-RTX only."""

    def __init__(self, engine: EngineFile, package: TensorRT, gpu: Device) -> None:
        self._package = package
        self._engine = engine.entry.sha256
        environment = "\n".join((gpu.name, gpu.gpu, gpu.driver, package.name, package.version))
        key = hashlib.sha256(environment.encode()).hexdigest()[:16]
        self.path = engine.path.with_name(f"{engine.path.name}.{key}{SUFFIX}")
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Gives a runtime configuration the kernels of the file, and collects those that are compiled from now on."""
        self._cache = config.create_runtime_cache()
        content = self._read()
        if content and self._cache.deserialize(content):
            self._stored = _digest(content)
        self._package.errors.clear()  # of a file that TensorRT refuses
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the file, unless it has these kernels already or its folder cannot be written."""
        serialised = None if self._cache is None else self._cache.serialize()
        if serialised is None:
            return
        content = bytes(serialised)
        digest = _digest(content)
        if digest == self._stored:
            return
        with suppress(OSError, OutputError):
            with atomic_write(self.path) as partial, partial.open("wb") as file:
                file.write(self._header(digest))
                file.write(content)
            self._stored = digest

    def _read(self) -> bytes:
        """The content of the file; empty where it is missing, damaged, or of another engine."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return b""
        header, _, kernels = content.partition(b"\n")
        return kernels if header + b"\n" == self._header(_digest(kernels)) else b""

    def _header(self, digest: bytes) -> bytes:
        return self._engine.encode() + b" " + digest + b"\n"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
