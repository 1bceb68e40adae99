"""`ttt-video sample`: from a storyboard to a video."""

from pathlib import Path
from typing import Annotated

import onnxruntime as ort
import typer
from msgspec.structs import replace

from ttt_video_engine.commands.options import BundleOption, Debug
from ttt_video_engine.commands.progress import ProgressDisplay
from ttt_video_engine.engines.onnxruntime import PROVIDERS, OnnxRuntimeLoader, ProviderName, available_providers
from ttt_video_engine.engines.tensorrt.checks import parse_memory
from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
from ttt_video_engine.runtime.bundle import TEXT_ENCODER, Bundle, open_bundle
from ttt_video_engine.runtime.config import LengthName
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.pipeline import graphs_needed, prepare_jobs, render
from ttt_video_engine.runtime.settings import MAX_SEED, BackendName, Guidance, Sampler
from ttt_video_engine.runtime.storyboard import check_length, load_storyboards
from ttt_video_engine.runtime.text_cache import TextCache
from ttt_video_engine.runtime.user_cache import cache_folder


def sample(
    storyboard: Annotated[Path, typer.Argument(help="JSON or JSONL file of scenes.", show_default=False)],
    bundle: BundleOption,
    output_dir: Annotated[Path, typer.Option(help="Every video gets a folder in it.")] = Path("output"),
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="50")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance at its strongest.", show_default="6")] = None,
    guidance: Annotated[
        Guidance | None,
        typer.Option(help="dynamic grows from 1 to the scale; upstream is the public code's.", show_default="dynamic"),
    ] = None,
    sampler: Annotated[
        Sampler | None, typer.Option(help="dpmpp-2m-sde is what the public code runs.", show_default="ddim")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the mp4.", show_default="16")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", min=0, max=MAX_SEED, show_default="42")] = None,
    length: Annotated[LengthName | None, typer.Option(help="States the length that the scenes must make.")] = None,
    engine: Annotated[BackendName, typer.Option(help="What runs the graphs.")] = "onnxruntime",
    provider: Annotated[
        ProviderName | None,
        typer.Option(help="Where ONNX Runtime runs them.", show_default="cuda where it has it, else cpu"),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Most that a TensorRT engine may take, such as 20GB.", show_default="all that is free"),
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Run the branches of guidance one after the other.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace videos that exist.")] = False,
    debug: Debug = False,
) -> None:
    """Render the videos of a storyboard file."""

    if engine == "tensorrt" and provider is not None:
        raise ConfigError("--provider is for --engine onnxruntime: leave out one of the two")
    if engine != "tensorrt" and gpu_memory is not None:
        raise ConfigError("--gpu-memory is for --engine tensorrt: leave it out, or name that engine")
    storyboards = load_storyboards(storyboard)
    if length is not None:
        check_length(storyboards, length)
    opened = open_bundle(bundle)
    settings = opened.manifest.defaults
    low_memory = low_memory or settings.low_memory
    loader = _loader(opened, engine, provider, gpu_memory, low_memory=low_memory)
    opened.check()
    asked = {
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "guidance": guidance,
        "sampler": sampler,
        "fps": fps,
        "seed": seed,
        "low_memory": low_memory,
    }
    settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
    jobs = prepare_jobs(opened, storyboards, settings, output_dir, overwrite=overwrite)
    loader.check(graphs_needed(jobs))
    for board in storyboards:
        for warning in board.warnings:
            typer.echo(f"warning: {warning}", err=True)
    for job in jobs:
        for truncation in job.prompts.truncations:
            typer.echo(f"warning: {job.storyboard.source}: {truncation.message}", err=True)
    cache = _text_cache(opened, engine, provider)
    with ProgressDisplay() as display:
        for video in render(opened, loader, jobs, settings, cache, display.update):
            typer.echo(f"video: {video}")


def _text_cache(bundle: Bundle, engine: BackendName, provider: ProviderName | None) -> TextCache:
    providers = available_providers() if provider is None else PROVIDERS[provider]
    runs_on = " ".join((engine, ort.__version__, *providers)) if engine == "onnxruntime" else engine
    return TextCache(
        cache_folder("text"),
        f"{bundle.component_digest(TEXT_ENCODER)} {runs_on}",
        width=bundle.manifest.model.text_encoder.d_model,
        verify=lambda: bundle.verify_component(TEXT_ENCODER),
    )


def _loader(
    bundle: "Bundle", engine: BackendName, provider: ProviderName | None, gpu_memory: str | None, *, low_memory: bool
) -> "OnnxRuntimeLoader | TensorRTLoader":
    if engine == "onnxruntime":
        from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader

        return OnnxRuntimeLoader(bundle, provider=provider)

    limit = None if gpu_memory is None else parse_memory(gpu_memory)
    return TensorRTLoader(bundle, low_memory=low_memory, gpu_memory=limit)
