"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder made by export.", show_default=False)]
