"""`ttt-video check`: what of a storyboard would be cut or cannot be rendered."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ttt_video_engine.commands.options import Debug, Json
from ttt_video_engine.planning.storyboard_check import check_videos, report_lines
from ttt_video_engine.runtime.bundle import open_bundle
from ttt_video_engine.runtime.storyboard import load_storyboards


def check(
    storyboard: Annotated[Path, typer.Argument(help="JSON or JSONL file of scenes.", show_default=False)],
    bundle: Annotated[
        Path | None, typer.Option(help="Folder made by export: counts tokens and looks for the length's graph.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what of a storyboard file would be cut or cannot be rendered, before it is."""
    boards = load_storyboards(storyboard)
    found = check_videos(boards, None if bundle is None else open_bundle(bundle))
    fine = all(video.fine for video in found)
    if json:
        typer.echo(msgspec.json.encode({"fine": fine, "videos": found}).decode())
    else:
        for line in report_lines(found):
            typer.echo(line)
    if not fine:
        raise typer.Exit(1)
