"""`ttt-video parity`: the reference and its graphs against recordings of the public code."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.planning.table import text_table
from ttt_video_engine.runtime.errors import CheckFailed


def parity(
    golden: Annotated[Path, typer.Option(help="Folder of recordings (.safetensors).", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold the reference and freshly exported graphs to recordings of the public code."""

    from ttt_video_engine.export.parity.recordings import TOLERANCE, compare_recordings

    rows = list(compare_recordings(golden))
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    else:
        header = ("recording", "kind", "reference", "onnx")
        cells = ((row.recording, row.kind, f"{row.reference_error:.1e}", f"{row.onnx_error:.1e}") for row in rows)
        typer.echo("\n".join(text_table([header, *cells], numbers=(2, 3))))
    failed = [row.recording for row in rows if not max(row.reference_error, row.onnx_error) <= TOLERANCE]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} over {TOLERANCE:.0e}: {', '.join(failed)}")
