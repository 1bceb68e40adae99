"""Formats tables as plain text, the same in a terminal and in a pipe."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

_WIDEST = 10_000
"""Width in columns, larger than any table, so that nothing is cut or wrapped."""


def text_table(rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> list[str]:
    """Lines of a table without a frame, columns two spaces apart. Columns in `numbers` are right-aligned."""
    cells = [list(row) for row in rows]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, cells), default=0)):
        table.add_column(justify="right" if column in numbers else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=_WIDEST, color_system=None, markup=False, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]
