"""What the training commands share."""

import argparse
from pathlib import Path


def output_folder(description: str | None) -> Path:
    """The folder that `--output` names, made where it is missing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint and log")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    return folder
