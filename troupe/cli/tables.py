"""Tables as lines of text, as wide as the terminal: columns that matter least go first where there is no room."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence

import msgspec
from rich.cells import cell_len, set_cell_size

from troupe.runtime.terminal import one_line

_GAP = "  "
ANY_WIDTH = 10_000
"""Where lines are not cut."""


class Column(msgspec.Struct, frozen=True):
    """A column of a table."""

    title: str
    right: bool = False
    """Whether what is in it stands at its right edge, as figures do."""
    goes: int = 0
    """Columns with the highest number go first where there is no room; one with 0 stays."""
    most: int = 40
    """Cells of the screen that it takes at most."""


def screen_width() -> int:
    """Cells of the terminal's lines; what goes into a file or a pipe is not cut."""
    is_fixed = os.environ.get("COLUMNS", "").isdecimal()
    return shutil.get_terminal_size().columns if is_fixed or sys.stdout.isatty() else ANY_WIDTH


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The lines of a table, with its titles. A row that has fewer cells than there are columns ends with a text that
    goes on over the others. Whatever acts on a terminal is shown as an escape."""
    lines = [[one_line(cell) for cell in row] for row in rows]
    lines = [row if len(row) < len(columns) else _cut_to(columns, row) for row in lines]
    there = _that_fit(columns, lines, width)
    widths = {at: _width(columns, lines, at) for at in there}
    yield _line([(columns[at].title, widths[at], columns[at].right) for at in there])
    for row in lines:
        if len(row) == len(columns):
            yield _line([(row[at], widths[at], columns[at].right) for at in there])
        else:
            cells = [(cell, widths.get(at, 0), False) for at, cell in enumerate(row[:-1])]
            yield _cut(_line([*cells, (row[-1], 0, False)]), width)


def lines_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Cells that a table with all its columns takes."""
    cut = [_cut_to(columns, [one_line(cell) for cell in row]) for row in rows]
    return _whole_width(columns, cut, range(len(columns)))


def _that_fit(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The places of the columns that there is room for; those without anything in them are left out, too."""
    whole = [row for row in rows if len(row) == len(columns)]
    there = [at for at, column in enumerate(columns) if not column.goes or any(row[at] for row in whole)]
    while _whole_width(columns, rows, there) > width:
        goes = max(there, key=lambda at: columns[at].goes)
        if not columns[goes].goes:
            break
        there.remove(goes)
    return there


def _whole_width(columns: Sequence[Column], rows: Sequence[Sequence[str]], there: Sequence[int]) -> int:
    return sum(_width(columns, rows, at) + len(_GAP) for at in there) - len(_GAP)


def _width(columns: Sequence[Column], rows: Sequence[Sequence[str]], at: int) -> int:
    cells = (row[at] for row in rows if len(row) == len(columns) or at < len(row) - 1)
    return max(cell_len(columns[at].title), *map(cell_len, cells), 1)


def _line(cells: Sequence[tuple[str, int, bool]]) -> str:
    padded = []
    for text, width, right in cells:
        room = " " * max(0, width - cell_len(text))
        padded.append(room + text if right else text + room)
    return _GAP.join(padded).rstrip()


def _cut_to(columns: Sequence[Column], row: Sequence[str]) -> list[str]:
    return [_cut(cell, column.most) for column, cell in zip(columns, row, strict=True)]


def _cut(text: str, most: int) -> str:
    return text if cell_len(text) <= most else set_cell_size(text, most - 1).rstrip() + "…"
