"""The command line: `ttt-video` or `python cli.py`. What a command needs is imported in it, so that help is quick."""

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from msgspec.structs import replace

from ttt_video_engine.runtime.config import LengthName, Precision, TTTKind
from ttt_video_engine.runtime.config_file import resolve_config
from ttt_video_engine.runtime.errors import ConfigError, TTTVideoError
from ttt_video_engine.runtime.settings import Guidance, Sampler

if TYPE_CHECKING:
    from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader
    from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader
    from ttt_video_engine.runtime.bundle import Bundle

PROGRAM = "ttt-video"

app = typer.Typer(
    help="From a storyboard to a video with TTT-Video models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


EngineName = Literal["onnxruntime", "tensorrt"]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder made by export.", show_default=False)]
ProviderName = Literal["cpu", "cuda", "tensorrt"]


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="Bundle to make or update.", show_default=False)],
    preset: Annotated[str | None, typer.Option(help="tiny, debug or 5B.", show_default="tiny")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder with transformer/, vae/, text_encoder/ and tokenizer/; else weights are random."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with options and sizes; options given here go before it.")
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(help="3s, 9s, 18s, 30s or 63s; may be given several times.", show_default="9s"),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", "--precision", help="Precision of weights and activations.", show_default="float32"),
    ] = None,
    ttt: Annotated[TTTKind | None, typer.Option(help="Inner model of the TTT layers.", show_default="linear")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of random weights, and of TTT layers a checkpoint lacks.", min=0, show_default="0"),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="tensorrt also compiles every graph.")] = "onnxruntime",
    gpu: Annotated[
        list[str] | None, typer.Option(help="Architecture to compile for, such as sm_89; may be given several times.")
    ] = None,
    plugin: Annotated[bool, typer.Option(help="TTT layers as our kernels, or as standard operators.")] = True,
    optimization_level: Annotated[int, typer.Option(help="TensorRT's, 0 to 5.", min=0, max=5)] = 3,
    workspace: Annotated[int | None, typer.Option(help="Scratch memory of TensorRT in MiB.", min=1)] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory, see sample --gpu-memory.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Export a model to a bundle of ONNX graphs, each held to the PyTorch reference, and to TensorRT engines."""
    if (engine == "tensorrt") != bool(gpu):
        raise ConfigError("--engine tensorrt and --gpu go together: name the architectures to compile for, as sm_89")
    chosen = resolve_config(
        config, preset=preset, ttt=ttt, lengths=length, dtype=dtype, width=width, height=height, seed=seed
    )
    model = chosen.model

    from ttt_video_engine.engines.tensorrt.plan import BuildSettings
    from ttt_video_engine.export.build import PlanRequest, export_bundle
    from ttt_video_engine.export.source import CheckpointSource, SeededSource
    from ttt_video_engine.runtime.progress import ProgressDisplay

    settings = BuildSettings(
        optimization_level=optimization_level,
        workspace=None if workspace is None else workspace << 20,
        weight_streaming=weight_streaming,
        plugins=plugin,
    )
    with ProgressDisplay(passing=True) as display:
        source = (
            SeededSource(model, chosen.seed)
            if checkpoint is None
            else CheckpointSource(model, checkpoint, chosen.seed, display.line)
        )
        plans = PlanRequest(tuple(dict.fromkeys(gpu or ())), settings)
        export_bundle(source, output, chosen.lengths, chosen.dtype, display.line, plans, display.update)
    typer.echo(f"bundle: {output}")


@app.command()
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
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", min=0, show_default="42")] = None,
    length: Annotated[LengthName | None, typer.Option(help="States the length that the scenes must make.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What runs the graphs.")] = "onnxruntime",
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
    from ttt_video_engine.runtime.bundle import TEXT_ENCODER, open_bundle
    from ttt_video_engine.runtime.pipeline import graphs_of, plan_jobs, render
    from ttt_video_engine.runtime.progress import ProgressDisplay
    from ttt_video_engine.runtime.storyboard import check_length, load_storyboards
    from ttt_video_engine.runtime.text_cache import TextCache, default_folder

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
    jobs = plan_jobs(opened, storyboards, settings, output_dir, overwrite=overwrite)
    loader.check(graphs_of(jobs))
    for job in jobs:
        for truncation in job.prompts.truncations:
            typer.echo(f"warning: {job.storyboard.source}: {truncation.message}", err=True)
    cache = TextCache(default_folder(), f"{opened.component_digest(TEXT_ENCODER)} {engine} {provider}")
    with ProgressDisplay() as display:
        for video in render(opened, loader, jobs, settings, cache, display.update):
            typer.echo(f"video: {video}")


def _loader(
    bundle: "Bundle", engine: EngineName, provider: ProviderName | None, gpu_memory: str | None, *, low_memory: bool
) -> "OnnxRuntimeLoader | TensorRTLoader":
    if engine == "onnxruntime":
        from ttt_video_engine.engines.onnxruntime import OnnxRuntimeLoader

        return OnnxRuntimeLoader(bundle, provider=provider)
    from ttt_video_engine.engines.tensorrt.checks import parse_memory
    from ttt_video_engine.engines.tensorrt.runner import TensorRTLoader

    limit = None if gpu_memory is None else parse_memory(gpu_memory)
    return TensorRTLoader(bundle, low_memory=low_memory, gpu_memory=limit)


@app.command()
def plan(
    preset: Annotated[str | None, typer.Option(help="tiny, debug or 5B.", show_default="tiny")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder made by export, in place of a preset.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file, as for export.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of weights; says what it holds as well.")] = None,
    ttt: Annotated[TTTKind | None, typer.Option(help="Inner model of the TTT layers.", show_default="linear")] = None,
    length: Annotated[
        str | None, typer.Option(help="3s, 9s, 18s, 30s or 63s.", show_default="9s, or the longest of the bundle")
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", "--precision", help="Precision of weights and activations.", show_default="float32"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the preset's")] = None,
    num_steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 50,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            help="What is to run the graphs.", show_default="tensorrt for bfloat16 and --gpu-memory, else onnxruntime"
        ),
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="What the GPU has, such as 24GB.", show_default=False)] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a model needs before it is built, whether it fits, and with which settings."""
    import msgspec

    from ttt_video_engine.engines.fit import Choice, Subject, available_ram, disk_bytes, fit
    from ttt_video_engine.engines.fit_report import commands, report, source_options, verdict
    from ttt_video_engine.engines.tensorrt.checks import parse_memory
    from ttt_video_engine.runtime.bundle import open_bundle

    exported = (preset, config, checkpoint, ttt, dtype, width, height)
    if bundle is not None and any(option is not None for option in exported):
        raise ConfigError("--bundle says what was exported: give --length, --num-steps, --engine, --gpu-memory only")
    if engine == "onnxruntime" and gpu_memory is not None:
        raise ConfigError("--gpu-memory is for --engine tensorrt: leave it out, or name that engine")
    opened = None if bundle is None else open_bundle(bundle)
    if opened is None:
        lengths = None if length is None else [length]
        chosen = resolve_config(
            config, preset=preset, ttt=ttt, lengths=lengths, dtype=dtype, width=width, height=height
        )
        model, choice = chosen.model, Choice(length=chosen.lengths[-1], dtype=chosen.dtype)
    else:
        model = opened.manifest.model
        choice = Choice(length=length or opened.manifest.lengths[-1], dtype=opened.manifest.dtype)
    engine = engine or ("tensorrt" if gpu_memory is not None or choice.dtype == "bfloat16" else "onnxruntime")
    ram = available_ram()
    gpu_limit = None if gpu_memory is None else parse_memory(gpu_memory)
    limit = ram if engine == "onnxruntime" else gpu_limit
    disk = None if opened is None else disk_bytes(opened)
    found = fit(Subject(model, choice, engine, num_steps, disk), limit, ram)
    typed = commands(found, source_options(model, checkpoint, config), opened, gpu_memory)
    stored = {}
    if checkpoint is not None:
        from ttt_video_engine.export.stored_sizes import stored_sizes

        stored = stored_sizes(checkpoint)
    if json:
        content = {"verdict": verdict(found), "commands": typed, "checkpoint": stored, **msgspec.to_builtins(found)}
        typer.echo(msgspec.json.encode(content).decode())
    else:
        typer.echo("\n".join(report(found, typed, stored)))
    if limit is not None and found.chosen is None:
        raise typer.Exit(1)


@app.command()
def devices(json: Json = False, debug: Debug = False) -> None:
    """Show what can run graphs on this machine, and why the rest cannot."""
    import msgspec

    from ttt_video_engine.engines.devices import survey

    found = survey()
    if json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    for backend in found.backends:
        usable = "yes" if backend.usable else f"no   {backend.reason}"
        typer.echo(f"{backend.name:<22} {backend.version or 'not installed':<16} {usable}")
    for gpu in found.gpus:
        memory = f"{gpu.free_memory / 2**30:.1f} of {gpu.total_memory / 2**30:.1f} GiB free"
        typer.echo(f"GPU {gpu.index}: {gpu.name}, {gpu.gpu}, {memory}, driver for CUDA {gpu.driver}")


@app.command()
def parity(
    golden: Annotated[Path, typer.Option(help="Folder of recordings (.safetensors).", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold the reference and freshly exported graphs to recordings of the public code."""
    import msgspec

    from ttt_video_engine.export.golden import TOLERANCE, Comparison, compare_recordings
    from ttt_video_engine.runtime.errors import CheckFailed

    rows: list[Comparison] = []
    for row in compare_recordings(golden):
        if not json and not rows:
            typer.echo(f"{'recording':<28} {'kind':<12} {'reference':>10} {'onnx':>10}")
        rows.append(row)
        if not json:
            typer.echo(f"{row.recording:<28} {row.kind:<12} {row.reference_error:>10.1e} {row.onnx_error:>10.1e}")
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    failed = [row.recording for row in rows if not max(row.reference_error, row.onnx_error) <= TOLERANCE]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} over {TOLERANCE:.0e}: {', '.join(failed)}")


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder made by export.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a bundle holds, whether it is whole, and what would be rebuilt."""
    import msgspec

    from ttt_video_engine.engines.tensorrt.plan import list_plans
    from ttt_video_engine.export.keys import stale_graphs
    from ttt_video_engine.export.plans import stale_plans
    from ttt_video_engine.runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    opened.verify()
    plans = list_plans(bundle)
    for plan in plans:
        plan.verify()
    manifest, stale, stale_engines = opened.manifest, stale_graphs(opened), stale_plans(opened.manifest, plans)
    if json:
        engines = {plan.path.name: plan.entry for plan in plans}
        content = {"manifest": manifest, "engines": engines, "rebuild": {**stale, **stale_engines}}
        typer.echo(msgspec.json.encode(content).decode())
        return
    model = manifest.model
    typer.echo(f"{bundle}: {model.name}, TTT-{model.transformer.ttt}, {manifest.dtype}, opset {manifest.opset}")
    typer.echo(f"video: {model.width}x{model.height}, lengths {', '.join(manifest.lengths)}")
    for name, graph in manifest.graphs.items():
        worst = max(check.max_error for check in graph.parity)
        graph_bytes, weight_bytes = manifest.files[graph.file].size, manifest.files[graph.weights].size
        typer.echo(f"\n{name}: {graph.file} {graph_bytes:,} bytes, weights {weight_bytes:,} bytes, parity {worst:.1e}")
        inputs = [spec for spec in graph.inputs if not spec.name.startswith("cache_")]
        outputs = [spec for spec in graph.outputs if not spec.name.startswith("cache_")]
        caches = len(graph.outputs) - len(outputs)
        typer.echo(f"  takes {'; '.join(map(str, inputs))}")
        typer.echo(f"  gives {'; '.join(map(str, outputs))}" + (f"; {caches} caches" if caches else ""))
        typer.echo(f"  rebuild: {', '.join(stale[name]) or 'no, up to date'}")
    for plan in plans:
        entry = plan.entry
        typer.echo(f"\n{plan.path.name}: {entry.size:,} bytes, built in {entry.seconds:.1f} s")
        for profile in entry.profiles:
            typer.echo(f"  profile {'; '.join(f'{name} {shapes}' for name, shapes in profile.items())}")
        if entry.plugins:
            typer.echo(f"  {len(entry.plugins)} plugin layers, cubin {', '.join(sorted(set(entry.plugins.values())))}")
        if entry.fallback:
            typer.echo(f"  TTT as standard operators: {entry.fallback}")
        typer.echo(f"  rebuild: {', '.join(stale_engines[plan.path.name]) or 'no, up to date'}")


def main() -> None:
    """Runs the command and turns errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name=PROGRAM, standalone_mode=False) or 0)
    except TTTVideoError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except typer.TyperException as error:  # a command line that cannot be read
        typer.echo(f"error: {' '.join(error.format_message().split())} (see {PROGRAM} --help)", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("ttt_video_engine"):
            raise
        extra = "tensorrt" if error.name in ("cuda", "triton") else "export"
        typer.echo(f"error: {error.name} is not installed; run: pip install 'ttt-video-engine[{extra}]'", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
