"""`ttt-video sample`: from storyboards to videos."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from msgspec.structs import replace

from ttt_video_engine.commands.loaders import GpuMemoryOption, ProviderOption
from ttt_video_engine.commands.options import Debug, codec_option, crf_option
from ttt_video_engine.commands.ray_render import Cluster, render_on_ray
from ttt_video_engine.commands.render_display import RenderDisplay
from ttt_video_engine.commands.rendering import run_and_report
from ttt_video_engine.commands.replica import Engine, Order, Replica, local_bundle, warn_on_terminal
from ttt_video_engine.commands.wandb_log import wandb_log
from ttt_video_engine.planning.bundle_options import explain_bundle_options
from ttt_video_engine.replicas.store import is_uri
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import LengthName
from ttt_video_engine.runtime.dtypes import Precision
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.jobs import check_inputs, in_shard
from ttt_video_engine.runtime.phases import RenderOptions
from ttt_video_engine.runtime.prompts import storyboard_of_prompts, with_negative_prompt
from ttt_video_engine.runtime.public_config import SamplingOptions
from ttt_video_engine.runtime.sampling_file import sampling_options
from ttt_video_engine.runtime.settings import FAST, MAX_SEED, BackendName, Codec, Guidance, Sampler
from ttt_video_engine.runtime.storyboard import Storyboard, check_length, load_storyboards

_RESUMING, _FILES = "Stopping, resuming, queues", "What is written beside"
_WORKERS = "Many workers"
_PROMPTS, _PASSES, _BUNDLE = "Prompts", "Fewer passes of the transformer", "What the bundle must have"

T = TypeVar("T")


def sample(
    storyboards: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON or JSONL files of scenes (eval.input_file).", show_default=False),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="Folder or URI of one made by export.", show_default="the demo model")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text of a scene, in place of a file; once for each scene.", rich_help_panel=_PROMPTS),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="For scenes without neg_text.", rich_help_panel=_PROMPTS)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of the public code: its sampling part. Options override it (job.config_file)."),
    ] = None,
    output_dir: Annotated[
        str, typer.Option(help="Folder or URI. Every video gets a folder in it (eval.output_dir).")
    ] = "output",
    num_steps: Annotated[
        int | None, typer.Option(help="Denoising steps (eval.num_denoising_steps).", show_default="50")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance at its strongest (guider.scale).", show_default="6")
    ] = None,
    guidance: Annotated[
        Guidance | None,
        typer.Option(help="dynamic grows from 1 to the scale; upstream is the public code's.", show_default="dynamic"),
    ] = None,
    sampler: Annotated[
        Sampler | None, typer.Option(help="dpmpp-2m-sde is what the public code runs.", show_default="ddim")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer passes, as docs/quality.md recommends.", rich_help_panel=_PASSES)
    ] = False,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LO:HI",
            help="Part of the steps that is guided; the others take one pass, not two.",
            show_default="0:1",
            rich_help_panel=_PASSES,
        ),
    ] = None,
    step_cache: Annotated[
        float | None,
        typer.Option(
            help="Reuse the last pass until the estimated deviation reaches this (EasyCache).",
            show_default="off",
            rich_help_panel=_PASSES,
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the mp4 (eval.sampling_fps).", show_default="16")
    ] = None,
    codec: Annotated[Codec | None, codec_option("h264")] = None,
    crf: Annotated[int | None, crf_option("18, 20 or 30 by codec")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise (job.seed).", min=0, max=MAX_SEED, show_default="42")
    ] = None,
    length: Annotated[LengthName | None, typer.Option(help="States the length that the scenes must make.")] = None,
    engine: Annotated[BackendName, typer.Option(help="What runs the graphs.")] = "onnxruntime",
    provider: ProviderOption = None,
    gpu_memory: GpuMemoryOption = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Run the branches of guidance one after the other.")
    ] = False,
    guidance_parallel: Annotated[
        bool, typer.Option("--guidance-parallel", help="Run the branches of guidance in two processes, on two GPUs.")
    ] = False,
    devices: Annotated[
        int, typer.Option(help="Run the transformer over so many processes; the bundle must be for them.", min=1)
    ] = 1,
    width: Annotated[
        int | None, typer.Option(help="Pixels that the bundle must have (eval.image_width).", rich_help_panel=_BUNDLE)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels that the bundle must have (eval.image_height).", rich_help_panel=_BUNDLE)
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="Latent frames that the scenes must make, 13 for 3 s (eval.sampling_num_frames).",
            rich_help_panel=_BUNDLE,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision that the bundle must have (eval.dtype).", rich_help_panel=_BUNDLE),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Restart videos that exist or were begun.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps from one saved state to the next.", min=1, rich_help_panel=_RESUMING)
    ] = 1,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop each video when so many steps are done.", min=1, rich_help_panel=_RESUMING)
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(help="Steps from one preview.png to the next.", min=1, rich_help_panel=_FILES),
    ] = None,
    keep_latents: Annotated[
        bool, typer.Option(help="Keep the finished latents beside the video.", rich_help_panel=_FILES)
    ] = True,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Render part I of N, 1/N to N/N.", show_default="all", rich_help_panel=_RESUMING
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Render with workers of Ray: of the cluster at ADDRESS, or of one that is found or started here.",
            show_default="off",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Workers of --ray.", min=1, show_default="all GPUs, or 1", rich_help_panel=_WORKERS),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="GPUs of each, such as 0.5.", min=0, show_default="1, or 0", rich_help_panel=_WORKERS),
    ] = None,
    log_json: Annotated[
        Path | None, typer.Option(help="File of events, a JSON line each; - is stdout.", rich_help_panel=_FILES)
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT",
            help="Log to this project of Weights & Biases (wandb.project).",
            show_default="off",
            rich_help_panel=_FILES,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Render the videos of storyboard files. The same command again resumes them."""

    boards = _storyboards(storyboards or [], prompt or [], negative_prompt)
    stated = SamplingOptions() if config is None else sampling_options(config)
    for warning in stated.warnings:
        typer.echo(f"warning: {warning}", err=True)
    opened = open_bundle(local_bundle(bundle, warn_on_terminal))
    framed = explain_bundle_options(
        opened,
        width=_first(width, stated.width),
        height=_first(height, stated.height),
        num_frames=_first(num_frames, stated.num_frames),
        dtype=_first(dtype, stated.dtype),
    )
    for asked_length in (length, framed):
        if asked_length is not None:
            check_length(boards, asked_length)
    boards = _part(boards, shard)
    settings = replace(opened.manifest.defaults, **(FAST if fast else {}))
    if guidance_parallel and low_memory:
        raise ConfigError("--guidance-parallel already takes the memory of --low-memory on each GPU; leave out one")
    if guidance_parallel and devices > 1:
        raise ConfigError("--guidance-parallel and --devices both share out a video: leave out one")
    asked = {
        "num_steps": _first(num_steps, stated.num_steps),
        "guidance_scale": _first(guidance_scale, stated.guidance_scale),
        "guidance": guidance,
        "sampler": sampler,
        "fps": _first(fps, stated.fps),
        "codec": codec,
        "crf": crf,
        "seed": _first(seed, stated.seed),
        "low_memory": (low_memory or settings.low_memory) and not guidance_parallel,
        "guidance_interval": None if guidance_interval is None else _interval(guidance_interval),
        "step_cache": step_cache,
    }
    if codec not in (None, settings.codec):
        settings = replace(settings, crf=None)  # of the bundle's codec
    settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
    options = RenderOptions(
        checkpoint_every=checkpoint_every, keep_latents=keep_latents, stop_after=stop_after, preview_every=preview_every
    )
    order = Order(
        bundle, output_dir, settings, Engine(engine, provider, gpu_memory, guidance_parallel, devices), options
    )
    cluster = _cluster(ray, workers, gpus_per_worker)
    if wandb is not None and (cluster is not None or is_uri(output_dir)):
        raise ConfigError("--wandb reads the files of a video: leave it out with --ray and with a URI")
    on_ray = cluster is not None
    display = RenderDisplay(several=len(boards) > 1 or on_ray, quiet=log_json == Path("-"), at_once=on_ray)
    if cluster is None:
        replica = Replica(opened, order, warn_on_terminal)
        jobs = replica.prepare(boards, overwrite=overwrite)
        run_and_report(
            [job.name for job in jobs],
            lambda on_event, _: replica.run(jobs, on_event),
            display,
            log_json=log_json,
            wandb=wandb_log(wandb, jobs, display.progress.line),
        )
    else:
        check_inputs(opened, boards, settings)
        run_and_report(
            [board.name for board in boards],
            lambda on_event, signals: render_on_ray(cluster, order, boards, overwrite, on_event, signals),
            display,
            log_json=log_json,
            wandb=nullcontext(lambda event: None),
        )


def _cluster(address: str | None, workers: int | None, gpus_per_worker: float | None) -> Cluster | None:
    """Where the workers of --ray are. Raises ConfigError for options of it without it."""
    if address is None:
        if workers is not None or gpus_per_worker is not None:
            raise ConfigError("--workers and --gpus-per-worker are for --ray: give it too, or leave them out")
        return None
    return Cluster(address, workers, gpus_per_worker)


def _storyboards(paths: list[Path], prompts: list[str], negative_prompt: str | None) -> list[Storyboard]:
    """The videos of the files, or the one that is typed. Raises ConfigError unless it is one of the two."""
    if bool(paths) == bool(prompts):
        raise ConfigError("sample takes STORYBOARD files or --prompt; give one of the two")
    boards = [storyboard_of_prompts(prompts)] if prompts else [one for path in paths for one in load_storyboards(path)]
    if negative_prompt is None:
        return boards
    return [with_negative_prompt(board, negative_prompt) for board in boards]


def _first(option: T | None, stated: T | None) -> T | None:
    """What the command line states, else the file."""
    return stated if option is None else option


def _interval(text: str) -> tuple[float, float]:
    """The numbers of LO:HI. Raises ConfigError where it is not two numbers; their range is checked with the steps."""
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise ConfigError(f"guidance interval is {text!r}: must be LO:HI, such as 0:0.5") from None


def _part(boards: list[Storyboard], shard: str | None) -> list[Storyboard]:
    """The storyboards of a part I/N. Raises ConfigError unless 1 <= I <= N."""
    if shard is None:
        return boards
    index, _, count = shard.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and len(shard) < 20):
        raise ConfigError(f"--shard is {shard!r}: must be I/N, such as 1/4")
    if not 1 <= int(index) <= int(count):
        raise ConfigError(f"--shard is {shard}: the part must lie in 1 … {int(count)}")
    return [board for board in boards if in_shard(board, int(index), int(count))]
