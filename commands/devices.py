"""`ttt-video devices`: which backends can run graphs on this machine."""

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.engines.devices import survey
from ttt_video_engine.planning.table import text_table


def devices(json: Json = False, debug: Debug = False) -> None:
    """Show which backends can run graphs on this machine, and why the others cannot."""

    found = survey()
    if json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    rows = [
        (backend.name, backend.version or "not installed", "yes" if backend.usable else "no", backend.reason)
        for backend in found.backends
    ]
    for line in text_table([("backend", "version", "usable", "reason"), *rows]):
        typer.echo(line)
    for gpu in found.gpus:
        memory = f"{gpu.free_memory / 2**30:.1f} of {gpu.total_memory / 2**30:.1f} GiB free"
        typer.echo(f"GPU {gpu.index}: {gpu.name}, {gpu.gpu}, {memory}, driver supports CUDA {gpu.driver}")
