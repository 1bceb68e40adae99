"""The loader of runners that options choose, and those options."""

from typing import Annotated

import typer

from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, ProviderName
from ttt_video_engine.engines.tensorrt.memory import parse_memory
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.settings import BackendName

ProviderOption = Annotated[
    ProviderName | None,
    typer.Option("--provider", help="Where ONNX Runtime runs them.", show_default="cuda where it has it, else cpu"),
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", help="Most that a TensorRT engine may take, such as 20GB.", show_default="all that is free"
    ),
]


def make_loader(
    bundle: Bundle, engine: BackendName, provider: ProviderName | None, gpu_memory: str | None, *, low_memory: bool
) -> OnnxRuntimeLoader | TensorRTLoader:
    """Loads graphs of a bundle. Raises ConfigError for an option of the other engine."""
    if engine == "tensorrt":
        if provider is not None:
            raise ConfigError("--provider is for --engine onnxruntime: leave out one of the two")
        limit = None if gpu_memory is None else parse_memory(gpu_memory)
        return TensorRTLoader(bundle, low_memory=low_memory, gpu_memory=limit)
    if gpu_memory is not None:
        raise ConfigError("--gpu-memory is for --engine tensorrt: leave it out, or name that engine")
    return OnnxRuntimeLoader(bundle, provider=provider)
