"""`ttt-video devices`: what can run graphs on this machine."""

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.engines.devices import survey


def devices(json: Json = False, debug: Debug = False) -> None:
    """Show what can run graphs on this machine, and why the rest cannot."""

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
