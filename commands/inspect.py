"""`ttt-video inspect`: the content of a bundle, and whether it is undamaged."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.engines.tensorrt.engine import list_engines
from ttt_video_engine.export.engines import stale_engines
from ttt_video_engine.export.keys import stale_graphs
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.config import ttt_label
from ttt_video_engine.runtime.quantization import precision


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder made by export.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a bundle contains, verify its files, and list what the next export rebuilds."""

    opened = open_bundle(bundle)
    opened.verify()
    engine_files = list_engines(bundle)
    for file in engine_files:
        file.verify()
    manifest, stale, stale_files = opened.manifest, stale_graphs(opened), stale_engines(opened.manifest, engine_files)
    if json:
        engines = {file.path.name: file.entry for file in engine_files}
        content = {"manifest": manifest, "engines": engines, "rebuild": {**stale, **stale_files}}
        typer.echo(msgspec.json.encode(content).decode())
        return
    model = manifest.model
    stored = precision(manifest.dtype, manifest.quantize)
    typer.echo(f"{bundle}: {model.name}, {ttt_label(model.transformer.ttt)}, {stored}, opset {manifest.opset}")
    typer.echo(f"video: {model.width}x{model.height}, lengths {', '.join(manifest.lengths)}")
    for name, graph in manifest.graphs.items():
        worst = max(check.max_error for check in graph.parity)
        graph_bytes, weight_bytes = manifest.files[graph.file].size, manifest.files[graph.weights].size
        typer.echo(f"\n{name}: {graph.file} {graph_bytes:,} bytes, weights {weight_bytes:,} bytes, parity {worst:.1e}")
        inputs = [spec for spec in graph.inputs if not spec.name.startswith("cache_")]
        outputs = [spec for spec in graph.outputs if not spec.name.startswith("cache_")]
        caches = len(graph.outputs) - len(outputs)
        typer.echo(f"  inputs {'; '.join(map(str, inputs))}")
        typer.echo(f"  outputs {'; '.join(map(str, outputs))}" + (f"; {caches} caches" if caches else ""))
        typer.echo(f"  rebuild: {', '.join(stale[name]) or 'no, up to date'}")
    for file in engine_files:
        entry = file.entry
        typer.echo(f"\n{file.path.name}: {entry.size:,} bytes, built in {entry.seconds:.1f} s")
        for profile in entry.profiles:
            typer.echo(f"  profile {'; '.join(f'{name} {shapes}' for name, shapes in profile.items())}")
        if entry.plugins:
            typer.echo(f"  {len(entry.plugins)} plugin layers, cubin {', '.join(entry.cubins)}")
        if entry.fallback:
            typer.echo(f"  TTT as standard operators: {entry.fallback}")
        typer.echo(f"  rebuild: {', '.join(stale_files[file.path.name]) or 'no, up to date'}")
