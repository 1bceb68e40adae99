"""Tables as plain text, the same in a terminal and in a pipe."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

_WIDEST = 10_000
"""Columns: more than any table has, so that nothing is cut or wrapped."""


def text_table(rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> list[str]:
    """Lines of columns that are two spaces apart, without a frame. Columns in `numbers` are aligned to the right."""
    cells = [list(row) for row in rows]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, cells), default=0)):
        table.add_column(justify="right" if column in numbers else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=_WIDEST, color_system=None, markup=False, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]
