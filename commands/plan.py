"""`ttt-video plan`: what a model needs, before it is built."""

from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.engines.tensorrt.engine import list_engines
from ttt_video_engine.engines.tensorrt.memory import parse_memory
from ttt_video_engine.export.sources.cogvideox_sizes import with_stored_sizes
from ttt_video_engine.planning.devices import device_needs, device_report
from ttt_video_engine.planning.fit import MemorySettings, PlanInput, available_ram, disk_bytes, fit
from ttt_video_engine.planning.measured import measured_activations
from ttt_video_engine.planning.report import commands, report, source_options, verdict
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import MAX_SCENES, TTTChoice, length_name
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.dtypes import Precision
from ttt_video_engine.runtime.errors import ConfigError
from ttt_video_engine.runtime.quantization import Quantization
from ttt_video_engine.runtime.settings import GraphBackend


def plan(
    preset: Annotated[str | None, typer.Option(help="tiny, debug or 5B.", show_default="tiny")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder made by export, in place of a preset.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file, as for export.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of weights; says what it holds as well.")] = None,
    ttt: Annotated[
        TTTChoice | None,
        typer.Option(help="Inner model of the TTT layers; none leaves them out: CogVideoX.", show_default="linear"),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Seconds, a multiple of 3 such as 9s.", show_default="9s, 3s without TTT, or the longest of the bundle"
        ),
    ] = None,
    scenes: Annotated[
        int | None,
        typer.Option(help="Length in scenes of 3 seconds.", min=1, max=MAX_SCENES, show_default=False),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", "--precision", help="Precision of weights and activations.", show_default="float32"),
    ] = None,
    quantize: Annotated[
        Quantization | None,
        typer.Option(help="int8 for the matrices of the transformer's layers, as for export.", show_default="none"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    num_steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 50,
    engine: Annotated[
        GraphBackend | None,
        typer.Option(
            help="What is to run the graphs.", show_default="tensorrt for bfloat16 and --gpu-memory, else onnxruntime"
        ),
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="What the GPU has, such as 24GB.", show_default=False)] = None,
    devices: Annotated[
        int | None, typer.Option(help="Say what each of so many devices needs that share a video.", min=2)
    ] = None,
    interconnect: Annotated[
        float | None,
        typer.Option(help="GB/s that each of --devices sends, such as 450 of NVLink 4.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a model needs before it is built, whether it fits, and with which settings."""

    exported = (preset, config, checkpoint, ttt, dtype, quantize, width, height)
    if bundle is not None and any(option is not None for option in exported):
        raise ConfigError(
            "--bundle says what was exported: give --length, --scenes, --num-steps, --engine, --gpu-memory only"
        )
    if engine == "onnxruntime" and gpu_memory is not None:
        raise ConfigError("--gpu-memory is for --engine tensorrt: leave it out, or name that engine")
    if interconnect is not None and devices is None:
        raise ConfigError("--interconnect is between devices: give --devices too, or leave it out")
    if scenes is not None:
        if length not in (None, length_name(scenes)):
            raise ConfigError(f"--length {length} and --scenes {scenes}, {length_name(scenes)}: leave one out")
        length = length_name(scenes)
    opened = None if bundle is None else open_bundle(bundle)
    if opened is None:
        lengths = None if length is None else [length]
        chosen = resolve_config(
            config,
            preset=preset,
            ttt=ttt,
            lengths=lengths,
            dtype=dtype,
            width=width,
            height=height,
            with_stored_sizes=None if checkpoint is None else partial(with_stored_sizes, checkpoint),
        )
        for warning in chosen.warnings:
            typer.echo(f"warning: {warning}", err=True)
        model = chosen.model
        settings = MemorySettings(length=chosen.lengths[-1], dtype=chosen.dtype, quantize=quantize or "none")
    else:
        manifest = opened.manifest
        model, length = manifest.model, length or manifest.lengths[-1]
        settings = MemorySettings(length=length, dtype=manifest.dtype, quantize=manifest.quantize)
    engine = engine or ("tensorrt" if gpu_memory is not None or settings.dtype == "bfloat16" else "onnxruntime")
    ram = available_ram()
    gpu_limit = None if gpu_memory is None else parse_memory(gpu_memory)
    limit = ram if engine == "onnxruntime" else gpu_limit
    disk = None if opened is None else disk_bytes(opened)
    measured = {} if opened is None else measured_activations(list_engines(opened.root))
    request = PlanInput(model.stating([settings.length]), settings, engine, num_steps, disk, measured)
    found = fit(request, limit, ram)
    typed = commands(found, source_options(model, checkpoint, config), opened, gpu_memory)
    shared = (
        None if devices is None else device_needs(found, devices, None if interconnect is None else interconnect * 1e9)
    )
    stored = {}
    if checkpoint is not None:
        from ttt_video_engine.export.sources.stored_sizes import stored_sizes

        stored = stored_sizes(checkpoint)
    if json:
        content = {"verdict": verdict(found), "commands": typed, "checkpoint": stored, **msgspec.to_builtins(found)}
        if shared is not None:
            content["devices"] = msgspec.to_builtins(shared)
        typer.echo(msgspec.json.encode(content).decode())
    else:
        typer.echo("\n".join(report(found, typed, stored)))
        if shared is not None:
            typer.echo("\n".join(["", *device_report(shared, engine)]))
    if limit is not None and found.chosen is None:
        raise typer.Exit(1)
