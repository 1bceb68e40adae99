"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Folder made by export.", show_default="the demo model")
]
"""For `bundle_folder`."""
