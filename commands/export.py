"""`ttt-video export`: from a preset or a checkpoint to a bundle."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from ttt_video_engine.commands.options import Debug
from ttt_video_engine.commands.progress import ProgressDisplay
from ttt_video_engine.engines.tensorrt.engine import BuildSettings
from ttt_video_engine.export.sources.cogvideox_sizes import with_stored_sizes
from ttt_video_engine.runtime.config import MAX_SCENES, TTTChoice, length_name
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.dtypes import Precision
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.quantization import Quantization, check_quantization
from ttt_video_engine.runtime.settings import MAX_SEED, GraphBackend
from ttt_video_engine.runtime.video import frame_rate


def export(
    output: Annotated[Path, typer.Option(help="Bundle to make or update.", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="tiny, debug or 5B.", show_default="tiny")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder with transformer/, vae/, text_encoder/ and tokenizer/; else weights are random."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file, ours or one of the public code; options given here go before it."),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            help="Seconds at 16 fps, a multiple of 3 such as 9s; may be given several times. 3s without TTT.",
            show_default="9s",
        ),
    ] = None,
    scenes: Annotated[
        list[int] | None,
        typer.Option(
            help="Length in scenes of 3 seconds; may be given several times.", min=1, max=MAX_SCENES, show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", "--precision", help="Precision of weights and activations.", show_default="float32"),
    ] = None,
    ttt: Annotated[
        TTTChoice | None,
        typer.Option(help="Inner model of the TTT layers; none leaves them out: CogVideoX.", show_default="linear"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    vae_scale_factor: Annotated[
        float | None,
        typer.Option(help="What latents are divided by before they are decoded.", show_default="the preset's"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of random weights, and of TTT layers a checkpoint lacks.",
            min=0,
            max=MAX_SEED,
            show_default="0",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames per second of the videos, where sample states none.", show_default="16, 8 without TTT"
        ),
    ] = None,
    engine: Annotated[GraphBackend, typer.Option(help="tensorrt also compiles every graph.")] = "onnxruntime",
    gpu: Annotated[
        list[str] | None, typer.Option(help="Architecture to compile for, such as sm_89; may be given several times.")
    ] = None,
    plugin: Annotated[bool, typer.Option(help="TTT layers as our kernels, or as standard operators.")] = True,
    inline: Annotated[
        bool,
        typer.Option(
            "--inline",
            help="Write TTT nodes as standard operators, for runtimes that know no functions, such as OpenVINO; "
            "no plugin can replace them then.",
        ),
    ] = False,
    quantize: Annotated[
        Quantization,
        typer.Option(help="int8 multiplies the matrices of the transformer's layers in int8: faster on CPUs."),
    ] = "none",
    devices: Annotated[
        list[int] | None,
        typer.Option(
            help="The transformer also over so many devices, for sample --devices; may be given several times.",
            min=2,
            show_default=False,
        ),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="TensorRT's, 0 to 5.", min=0, max=5)] = 3,
    workspace: Annotated[
        int | None,
        typer.Option(help="Limit of an engine's scratch memory in MiB.", min=1, show_default="by the model"),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory, see sample --gpu-memory.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Export a model to a bundle of ONNX graphs, each held to the PyTorch reference, and to TensorRT engines."""
    if (engine == "tensorrt") != bool(gpu):
        raise ConfigError("--engine tensorrt and --gpu go together: name the architectures to compile for, as sm_89")
    if inline and plugin and engine == "tensorrt":
        raise ConfigError("--inline leaves no TTT nodes for --plugin to replace; leave it out, or give --no-plugin")
    chosen = resolve_config(
        config,
        preset=preset,
        ttt=ttt,
        lengths=[*(length or ()), *map(length_name, scenes or ())],
        dtype=dtype,
        width=width,
        height=height,
        vae_scale_factor=vae_scale_factor,
        seed=seed,
        with_stored_sizes=None if checkpoint is None else partial(with_stored_sizes, checkpoint),
    )
    defaults = chosen.sampling
    if fps is not None:
        frame_rate(fps)
        defaults = replace(defaults, fps=fps)
    check_quantization(quantize, chosen.dtype, tensorrt=engine == "tensorrt")
    for warning in chosen.warnings:
        typer.echo(f"warning: {warning}", err=True)

    from ttt_video_engine.export.build import ExportOptions, export_bundle
    from ttt_video_engine.export.engines import EngineRequest
    from ttt_video_engine.export.sources.source import CheckpointSource, SeededSource

    settings = BuildSettings(
        optimization_level=optimization_level,
        workspace=None if workspace is None else workspace << 20,
        weight_streaming=weight_streaming,
        plugins=plugin,
    )
    with ProgressDisplay(passing=True) as display:
        source: SeededSource | CheckpointSource
        if checkpoint is None:
            source = SeededSource(chosen.model, chosen.seed)
        else:
            source = CheckpointSource(chosen.model, checkpoint, chosen.seed, display.line)
            if not chosen.vae_scale_stated:
                source = source.with_stored_scale()
        engines = EngineRequest(tuple(dict.fromkeys(gpu or ())), settings)
        options = ExportOptions(
            engines,
            display.update,
            inline=inline,
            defaults=defaults,
            quantize=quantize,
            devices=tuple(devices or ()),
        )
        export_bundle(source, output, chosen.lengths, chosen.dtype, display.line, options)
    typer.echo(f"bundle: {output}")
