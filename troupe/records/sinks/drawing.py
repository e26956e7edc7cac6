"""What a display is put together from: lines of known width, bars, panels beside each other, and what is left out where
a window is low."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, chop_cells
from rich.text import Text

from troupe.runtime.terminal import can_write

LABEL_WIDTH = 10
"""Of what stands before a line."""
GAP = 3
"""Between panels."""
NOTHING = "–"
"""In the place of what has not come yet."""
BADGE = "black on yellow"
"""Style of what somebody should look at: seen on dark and on light."""
Figures = Sequence[tuple[str, str]]
"""(label, value) of each line of a panel."""


class Block(NamedTuple):
    """Lines that are shown together, or not at all."""

    lines: list[Text]
    rank: int = 0
    """The larger, the sooner it is left out; 0: never."""


def fitting(blocks: Sequence[Block], height: int) -> list[Text]:
    """The lines of the blocks for which there is room, those of the lowest ranks first, in their order."""
    shown: set[int] = set()
    for at, block in sorted(enumerate(blocks), key=lambda each: each[1].rank):
        if not block.rank or len(block.lines) <= height:
            shown.add(at)
            height -= len(block.lines)
    return [line for at, block in enumerate(blocks) if at in shown for line in block.lines]


def row(label: str, *parts: tuple[str, str]) -> Text:
    """A line with a label before it."""
    return line((f"{label:<{LABEL_WIDTH}}", "dim"), *parts)


def told(label: str, badge: str, text: str, width: int, most: int) -> list[Text]:
    """What somebody should look at, in `most` lines at most: what it is, and all that is told of it."""
    room = max(1, width - LABEL_WIDTH)
    whole = textwrap.wrap(f" {badge}  {text}", room, max_lines=most, placeholder=" …", break_on_hyphens=False)
    lines = whole or [""]
    end = min(len(badge) + 2, len(lines[0]))
    first = row(label, (lines[0][:end], BADGE), (lines[0][end:], "yellow"))
    return [first, *(row("", (" " + rest, "yellow")) for rest in lines[1:])]


def line(*parts: tuple[str, str]) -> Text:
    """A line of (text, style), cut where the window ends."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis", end="\n")


def fitted(text: str, width: int) -> str:
    """A line of at most `width` cells; of a longer one the beginning and the end."""
    if cell_len(text) <= width:
        return text
    head = chop_cells(text, max(1, (width - 3) // 2))[0]
    tail = text[len(head) :][-width:]
    while cell_len(head) + 3 + cell_len(tail) > width:
        tail = tail[1:]
    return f"{head} … {tail}"


def bar(part: float, width: int, encoding: str = "utf-8") -> tuple[tuple[str, str], ...]:
    """How much of it is done, in parts of a line: strong what is, faint what is not, on dark and on light."""
    done, half, open_ = "━╾─" if can_write("━╾─", encoding) else "==-"
    halves = min(max(int(2 * width * part), 0), 2 * width)
    full, begun = divmod(halves, 2)
    style = "green" if part >= 1.0 else "cyan"
    return (done * full + half * begun, style), (open_ * (width - full - begun), "dim")


def shaded(area: Sequence[str], style: str) -> list[list[tuple[str, str]]]:
    """The lines of an area, the highest first, as parts of which the top of each column is strong and what lies below
    it faint."""
    found: list[list[tuple[str, str]]] = []
    above = ""
    for text in area:
        parts: list[tuple[str, str]] = []
        for at, letter in enumerate(text):
            strength = f"dim {style}" if above[at : at + 1].strip() else style
            if parts and parts[-1][1] == strength:
                parts[-1] = (parts[-1][0] + letter, strength)
            else:
                parts.append((letter, strength))
        found.append(parts)
        above = text
    return found


def panel(heading: str, figures: Figures, width: int) -> list[Text]:
    """Figures below their heading, each line `width` cells."""
    lines = [_cell((heading, "bold cyan"), ("", ""), width)]
    return lines + [
        _cell((label, "dim"), (value, "dim" if value == NOTHING else ""), width) for label, value in figures
    ]


def beside(columns: Sequence[Sequence[Text]], gap: int = GAP) -> list[Text]:
    """Columns beside each other; of each, all lines are as wide as its first."""
    widths = [column[0].cell_len if column else 0 for column in columns]
    lines = []
    for at in range(max(map(len, columns), default=0)):
        whole = Text(no_wrap=True, overflow="ellipsis", end="\n")
        for place, (column, width) in enumerate(zip(columns, widths, strict=True)):
            whole.append(" " * gap if place else "")
            whole.append_text(column[at] if at < len(column) else Text(" " * width))
        lines.append(whole)
    return lines


def padded(text: Text, width: int) -> Text:
    """The line, cut or filled to a width."""
    text.truncate(width, overflow="ellipsis", pad=True)
    return text


def _cell(label: tuple[str, str], value: tuple[str, str], width: int) -> Text:
    """A label on the left, of which is cut what the value on the right needs."""
    room = max(0, width - cell_len(value[0]) - 1)
    left = padded(Text.assemble(label), room)
    return padded(Text.assemble(left, " ", value), width)
