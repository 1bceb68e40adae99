"""What the training commands share."""

import argparse
from pathlib import Path
from typing import NamedTuple


class Folders(NamedTuple):
    """`start_from`: a published checkpoint whose weights a new training begins with, or None."""

    output: Path
    start_from: Path | None


def output_folder(description: str | None) -> Path:
    """The folder that `--output` names, made where it is missing."""
    return _made(_parser(description).parse_args().output)


def training_folders(description: str | None) -> Folders:
    """The folders that `--output` and `--start-from` name; the first is made where it is missing."""
    parser = _parser(description)
    parser.add_argument("--start-from", type=Path, help="checkpoint folder whose weights a new training begins with")
    arguments = parser.parse_args()
    return Folders(_made(arguments.output), arguments.start_from)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint and log")
    return parser


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
