"""The loader of runners that options choose, and those options."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ttt_video_engine.engines.guidance_pair import PairLoader
from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader, ProviderName, num_cores
from ttt_video_engine.engines.sharded import ShardedLoader
from ttt_video_engine.engines.tensorrt.memory import parse_memory
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import Bundle
from ttt_video_engine.runtime.errors import BackendError, BundleError, ConfigError
from ttt_video_engine.runtime.settings import BackendName

if TYPE_CHECKING:
    from ttt_video_engine.engines.torch.runner import TorchLoader

ProviderOption = Annotated[
    ProviderName | None,
    typer.Option(
        "--provider", help="Where ONNX Runtime or torch runs them.", show_default="cuda where it has it, else cpu"
    ),
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", help="Most that a TensorRT engine may take, such as 20GB.", show_default="all that is free"
    ),
]


def make_loader(
    bundle: Bundle,
    engine: BackendName,
    provider: ProviderName | None,
    gpu_memory: str | None,
    *,
    low_memory: bool,
    num_threads: int = 0,
) -> "OnnxRuntimeLoader | TensorRTLoader | TorchLoader":
    """Loads graphs of a bundle. `num_threads` are ONNX Runtime's on a CPU, 0 for all cores.

    Raises ConfigError for an option of another engine.
    """
    if engine == "tensorrt":
        if provider is not None:
            raise ConfigError("--provider is for --engine onnxruntime and torch: leave out one of the two")
        limit = None if gpu_memory is None else parse_memory(gpu_memory)
        return TensorRTLoader(bundle, low_memory=low_memory, gpu_memory=limit)
    if gpu_memory is not None:
        raise ConfigError("--gpu-memory is for --engine tensorrt: leave it out, or name that engine")
    if engine == "torch":
        return _torch_loader(bundle, provider)
    return OnnxRuntimeLoader(bundle, provider=provider, num_threads=num_threads)


def make_pair_loader(
    bundle: Bundle, engine: BackendName, provider: ProviderName | None, gpu_memory: str | None
) -> PairLoader:
    """As `make_loader`, with each branch of guidance in a process of its own, which has half of the cores."""
    half = partial(
        make_loader, bundle, engine, provider, gpu_memory, low_memory=True, num_threads=max(1, num_cores() // 2)
    )
    return PairLoader(bundle, make_loader(bundle, engine, provider, gpu_memory, low_memory=True), half)


def make_sharded_loader(
    bundle: Bundle, engine: BackendName, provider: ProviderName | None, gpu_memory: str | None, devices: int
) -> ShardedLoader:
    """As `make_loader`, with the transformer over so many processes, each with its part of the cores.

    Raises ConfigError for another engine than ONNX Runtime on the CPU, BundleError where the bundle is not exported for
    so many devices.
    """
    if engine != "onnxruntime" or provider not in (None, "cpu"):
        raise ConfigError("--devices runs in ONNX Runtime on CPUs alone: leave out --engine and --provider")
    if devices not in bundle.manifest.devices:
        raise BundleError(
            f"{bundle.root}: has no transformer for {devices} devices; export it again with --devices {devices}"
        )
    whole = make_loader(bundle, engine, "cpu", gpu_memory, low_memory=True)
    return ShardedLoader(bundle, whole, devices, max(1, num_cores() // devices))


def _torch_loader(bundle: Bundle, provider: ProviderName | None) -> "TorchLoader":
    if provider not in (None, "cpu", "cuda"):
        raise ConfigError(f"--provider {provider} is for --engine onnxruntime: give cpu or cuda")
    try:
        from ttt_video_engine.engines.torch.runner import TorchLoader
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ttt_video_engine"):
            raise
        raise BackendError(f"{error.name} is not installed; run: pip install 'ttt-video-engine[torch]'") from error
    loader = TorchLoader(bundle, device=provider)
    if loader.warning:
        typer.echo(f"warning: {loader.warning}", err=True)
    return loader
