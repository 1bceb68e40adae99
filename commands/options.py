"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Folder made by export.", show_default="the demo model")
]
"""For `bundle_folder`."""


def codec_option(default: str) -> Any:
    """`default` is what `--help` shows."""
    return typer.Option("--codec", help="Codec of the mp4.", show_default=default)


def crf_option(default: str) -> Any:
    return typer.Option("--crf", help="Quality of the mp4: lower is better and larger.", show_default=default)
