"""Decoded frames as numbered PNG files, without loss."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttt_video_engine.runtime.errors import OutputError
from ttt_video_engine.runtime.files import atomic_write, check_folder, writing


def check_png_folder(folder: Path) -> None:
    """Raises OutputError unless `folder` is new or empty, and can be written."""
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: holds files already; name a new or an empty folder")


def write_pngs(folder: Path, windows: Iterable[NDArray[np.uint8]], first: int = 0) -> int:
    """Writes frames [T, H, W, 3] as 000000.png, 000001.png, …, counted from `first`, and returns their number.

    Every file is whole or not there. Raises OutputError for a folder that is not empty, or cannot be written.
    """
    check_png_folder(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    number = first
    for window in windows:
        for pixels in window:
            with atomic_write(folder / f"{number:06}.png") as partial:
                Image.fromarray(pixels).save(partial, format="PNG")
            number += 1
    return number - first
