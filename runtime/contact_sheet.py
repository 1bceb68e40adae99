"""A video at a glance: pictures of its scenes with their texts, as one PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ttt_video_engine.runtime.errors import ConfigError, printable
from ttt_video_engine.runtime.files import atomic_write

SCENE_SECONDS = 3.0
"""Of the 48 frames of a scene at 16 frames per second."""

_CELL, _GAP, _MARGIN = 240, 8, 20
"""Pixels: the width of a picture, between two of them, around all."""
_TEXT, _SMALL, _TITLE = 15, 12, 20
"""Sizes of the font in pixels."""
_LEADING = 1.35
_MAX_LINES = 2
_PAPER, _INK, _GREY = (250, 250, 248), (24, 24, 24), (110, 110, 110)

Colour = tuple[int, int, int]


def scene_frames(num_scenes: int, num_frames: int, columns: int) -> list[list[int]]:
    """For each scene, the numbers of `columns` frames at even distances, none of them at an end of the scene.

    The first frame of a video belongs to no scene's share: scene i of n = (num_frames - 1) / num_scenes frames has
    those from 1 + n·i to n + n·i. Raises ConfigError where the frames do not divide, or a scene has too few.
    """
    share, rest = divmod(num_frames - 1, num_scenes)
    if rest or not 1 <= columns <= share:
        raise ConfigError(
            f"{num_frames} frames cannot show {num_scenes} scenes in {columns} columns: "
            "must be one more than a multiple of the scenes, with a frame for each column"
        )
    return [[1 + share * i + share * (2 * k + 1) // (2 * columns) for k in range(columns)] for i in range(num_scenes)]


def draw_contact_sheet(
    target: Path,
    frames: NDArray[np.uint8],
    captions: Sequence[str],
    footer: str,
    *,
    scene_seconds: float = SCENE_SECONDS,
) -> None:
    """Draws frames [S, C, H, W, 3], a row for each scene and its caption below, as a PNG that replaces `target`.

    Columns are labelled with the time in a scene that `scene_frames` gives them. The same input gives the same bytes.
    Raises OutputError where the file cannot be written.
    """
    num_scenes, columns, height, width, _ = frames.shape
    cell = (_CELL, max(1, round(_CELL * height / width)))
    content = columns * (_CELL + _GAP) - _GAP
    header, line = _line_height(_SMALL) + _GAP, _line_height(_TEXT)
    row = cell[1] + _GAP + _MAX_LINES * line + 2 * _GAP
    notes = _wrap(footer, _SMALL, content, max_lines=8)
    size = (content, header + num_scenes * row + len(notes) * _line_height(_SMALL))
    sheet, draw = _paper(size)
    for column in range(columns):
        label = f"{scene_seconds * (2 * column + 1) / (2 * columns):.1f} s"
        _write(draw, (_MARGIN + column * (_CELL + _GAP), _MARGIN), [label], _SMALL, _GREY)
    y = _MARGIN + header
    for index, (pictures, caption) in enumerate(zip(frames, captions, strict=True)):
        for column, pixels in enumerate(pictures):
            sheet.paste(_picture(pixels, cell), (_MARGIN + column * (_CELL + _GAP), y))
        lines = _wrap(f"{index + 1}. {caption}", _TEXT, content)
        _write(draw, (_MARGIN, y + cell[1] + _GAP), lines, _TEXT, _INK)
        y += row
    _write(draw, (_MARGIN, y), notes, _SMALL, _GREY)
    _save(sheet, target)


def draw_preview(target: Path, frames: NDArray[np.uint8], captions: Sequence[str], title: str) -> None:
    """Draws frames [S, H, W, 3] in a grid with their captions, as a PNG that replaces `target` in one step.

    A viewer that follows the file never sees half of it. The same input gives the same bytes. Raises OutputError where
    the file cannot be written.
    """
    num_scenes, height, width, _ = frames.shape
    columns = max(2, math.ceil(math.sqrt(num_scenes)))  # room for the title above a single picture
    cell = (_CELL, max(1, round(_CELL * height / width)))
    heading = _wrap(title, _TITLE, columns * (_CELL + _GAP) - _GAP, max_lines=1)
    header = _line_height(_TITLE) + _GAP
    row = cell[1] + _GAP + _MAX_LINES * _line_height(_SMALL) + _GAP
    sheet, draw = _paper((columns * (_CELL + _GAP) - _GAP, header + math.ceil(num_scenes / columns) * row - _GAP))
    _write(draw, (_MARGIN, _MARGIN), heading, _TITLE, _INK)
    for index, (pixels, caption) in enumerate(zip(frames, captions, strict=True)):
        x = _MARGIN + index % columns * (_CELL + _GAP)
        y = _MARGIN + header + index // columns * row
        sheet.paste(_picture(pixels, cell), (x, y))
        _write(draw, (x, y + cell[1] + _GAP // 2), _wrap(f"{index + 1}. {caption}", _SMALL, _CELL), _SMALL, _INK)
    _save(sheet, target)


def _paper(content: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet for content of this size, inside its margins."""
    sheet = Image.new("RGB", (content[0] + 2 * _MARGIN, content[1] + 2 * _MARGIN), _PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _picture(pixels: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow. It draws a box for a character that it lacks, as those of many scripts."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line_height(size: int) -> int:
    return round(size * _LEADING)


def _wrap(text: str, size: int, width: int, max_lines: int = _MAX_LINES) -> list[str]:
    """`text` on lines of at most `width` pixels; what does not fit on the last is left out for an ellipsis."""
    font = _font(size)
    lines: list[str] = []
    rest = printable(" ".join(text.split()))
    while rest and len(lines) < max_lines:
        length = _fitting(font, rest, width)
        if length < len(rest):
            space = rest.rfind(" ", 0, length + 1)
            length = space if space > length // 2 else length  # long words, and scripts without spaces, are cut
        lines.append(rest[:length])
        rest = rest[length:].lstrip()
    if rest:
        last = lines[-1]
        lines[-1] = last[: _fitting(font, last, width - math.ceil(font.getlength("…")))].rstrip() + "…"
    return lines


def _fitting(font: ImageFont.FreeTypeFont, text: str, width: int) -> int:
    """How many characters fit, at least one."""
    low, high = 1, min(len(text), width)  # none is narrower than a pixel; a caption may have 20,000 characters
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int, colour: Colour) -> None:
    for index, text in enumerate(lines):
        draw.text((at[0], at[1] + index * _line_height(size)), text, fill=colour, font=_font(size))


def _save(sheet: Image.Image, target: Path) -> None:
    with atomic_write(target) as partial:
        sheet.save(partial, format="PNG")
