"""`ttt-video parity`: the reference and its graphs against recordings of the public code."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.runtime.errors import CheckFailed


def parity(
    golden: Annotated[Path, typer.Option(help="Folder of recordings (.safetensors).", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold the reference and freshly exported graphs to recordings of the public code."""

    from ttt_video_engine.export.parity.recordings import TOLERANCE, Comparison, compare_recordings

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
