"""Draw docs/images/house.svg: the rooms of `troupe/` on their floors, and what each imports of the others.

`python -m scripts.draw_house` writes the picture. Sentences are the first lines of the rooms' docstrings, and lines
between rooms are counted from the imports in their files, so the picture shows the house as it is.
"""

from __future__ import annotations

import ast
import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

import msgspec

HOUSE = Path(__file__).parent.parent / "troupe"
PICTURE = HOUSE.parent / "docs" / "images" / "house.svg"

FLOORS = (
    ("run", "daemon", "cli"),
    ("checkpoint", "records", "actors"),
    ("runtime", "dataset", "rewards", "environments", "cluster"),
    ("messages", "policy", "grpo"),
)
"""From the top: imports go down, or to the left."""
COLOURS = ("#6366f1", "#0ea5e9", "#10b981", "#f59e0b")
"""Of each floor's boxes, and of the lines that leave them."""

_WIDTH, _SIDE, _BOX, _HEIGHT, _GAP, _TOP = 1120, 48, 164, 112, 74, 54
_PITCH = (_WIDTH - 2 * _SIDE - _BOX) / 4
_COLUMNS = {3: (0.5, 2.0, 3.5), 5: (0.0, 1.0, 2.0, 3.0, 4.0)}
"""Rooms of a floor → how many pitches from the left each lies, so that there are aisles through all floors."""
_BESIDE = (_PITCH - _BOX) / 2
_AISLES = (_SIDE / 2, *(_SIDE + _PITCH * k - _BESIDE for k in (2, 3)), _WIDTH - _SIDE / 2)
"""Where lines pass by a floor, from the left."""
_LANE = 5
_LINE = 22
"""Characters of a sentence that a box has room for on a line."""


class Room(msgspec.Struct, frozen=True):
    """One room as it is on the disk."""

    name: str
    sentence: str
    files: int
    lines: int


def rooms() -> dict[str, Room]:
    """Every room by name."""
    found = {}
    for name in (name for floor in FLOORS for name in floor):
        files = sorted((HOUSE / name).rglob("*.py"))
        sentence = ast.get_docstring(ast.parse((HOUSE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        found[name] = Room(name, sentence.partition("\n")[0].rstrip("."), len(files), lines)
    return found


def imports() -> Counter[tuple[str, str]]:
    """Room and other room → how many times a file of the one imports a module of the other."""
    found: Counter[tuple[str, str]] = Counter()
    names = {name for floor in FLOORS for name in floor}
    for room in names:
        for file in (HOUSE / room).rglob("*.py"):
            modules = set()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "troupe":
                    modules |= {f"troupe.{alias.name}" for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add(node.module or "")
                elif isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
            others = [module.split(".")[1] for module in modules if module.startswith("troupe.")]
            found.update((room, other) for other in others if other != room and other in names)
    return found


def picture(rooms: dict[str, Room], imports: Counter[tuple[str, str]]) -> str:
    """The whole SVG."""
    height = _TOP + 4 * _HEIGHT + 3 * _GAP + 52
    lines = "\n".join(_lines(imports))
    boxes = "\n".join(_box(room) for room in rooms.values())
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="title" \
font-family="system-ui, -apple-system, 'Segoe UI', sans-serif" font-size="14">
  <title id="title">Four floors of rooms; imports go down, or to the left</title>
  <!-- written by scripts/draw_house.py -->
  <rect x="1" y="1" width="{_WIDTH - 2}" height="{height - 2}" rx="12" fill="#f8fafc" stroke="#cbd5e1"/>
  <g fill="none" stroke-linecap="round">
{lines}
  </g>
{boxes}
  <text x="{_WIDTH // 2}" y="{height - 22}" text-anchor="middle" fill="#64748b" font-size="12">a line: a room imports \
one that lies lower, or to the left; the thicker, the more imports</text>
</svg>
"""


def _place(name: str) -> tuple[int, int]:
    return next((floor, row.index(name)) for floor, row in enumerate(FLOORS) if name in row)


def _corner(name: str) -> tuple[float, float]:
    floor, side = _place(name)
    return _SIDE + _COLUMNS[len(FLOORS[floor])][side] * _PITCH, _TOP + floor * (_HEIGHT + _GAP)


def _lines(imports: Counter[tuple[str, str]]) -> Iterator[str]:
    """The lines between rooms; those that pass by a floor do so in an aisle, side by side."""
    aisles = {pair: _aisle(*pair) for pair in imports if _place(pair[1])[0] - _place(pair[0])[0] > 1}
    for pair in sorted(imports, key=lambda pair: (-imports[pair], pair)):
        width = 0.8 + 0.5 * math.sqrt(imports[pair])
        lane = 0.0
        if pair in aisles:
            together = sorted((each for each in aisles if aisles[each] == aisles[pair]), key=_slope)
            lane = aisles[pair] + _LANE * (together.index(pair) - (len(together) - 1) / 2)
        yield (
            f'    <path data-from="{pair[0]}" data-to="{pair[1]}" d="{_path(pair, imports, lane)}" '
            f'stroke="{COLOURS[_place(pair[0])[0]]}" stroke-width="{width:.1f}" stroke-opacity="0.5"/>'
        )


def _slope(pair: tuple[str, str]) -> tuple[float, ...]:
    return _corner(pair[0])[0] + _corner(pair[1])[0], _corner(pair[1])[1], *_corner(pair[0])


def _aisle(above: str, below: str) -> float:
    """The aisle that is least out of the way."""
    start, end = _corner(above)[0] + _BOX / 2, _corner(below)[0] + _BOX / 2
    return min(_AISLES, key=lambda aisle: abs(start - aisle) + 1.01 * abs(end - aisle))


def _port(name: str, other: str, goes_to: dict[str, float]) -> float:
    """Where on the edge of a box a line begins: all side by side, in the order of where they go."""
    order = sorted(goes_to, key=lambda each: (goes_to[each], each))
    return _corner(name)[0] + _BOX * (order.index(other) + 1) / (len(order) + 1)


def _path(pair: tuple[str, str], imports: Counter[tuple[str, str]], lane: float) -> str:
    above, below = pair
    (x, y), (to_x, to_y) = _corner(above), _corner(below)
    (floor, side), (to_floor, to_side) = _place(above), _place(below)
    if floor == to_floor and side - to_side == 1:
        return f"M{x:.0f} {y + _HEIGHT / 2:.0f}H{to_x + _BOX:.0f}"
    if floor == to_floor:
        x, to_x = x + 40, to_x + _BOX - 40
        return f"M{x:.0f} {y:.0f}C{x - 20:.0f} {y - 30:.0f} {to_x + 20:.0f} {y - 30:.0f} {to_x:.0f} {y:.0f}"
    start = _port(above, below, {b: _first(a, b) for a, b in imports if a == above and _place(b)[0] > floor})
    end = _port(below, above, {a: _last(a, b) for a, b in imports if b == below and _place(a)[0] < to_floor})
    y += _HEIGHT
    half = _GAP / 2
    if not lane:
        return f"M{start:.0f} {y:.0f}C{start:.0f} {y + half:.0f} {end:.0f} {to_y - half:.0f} {end:.0f} {to_y:.0f}"
    return (
        f"M{start:.0f} {y:.0f}C{start:.0f} {y + half:.0f} {lane:.0f} {y + half:.0f} {lane:.0f} {y + _GAP:.0f}"
        f"V{to_y - _GAP:.0f}C{lane:.0f} {to_y - half:.0f} {end:.0f} {to_y - half:.0f} {end:.0f} {to_y:.0f}"
    )


def _first(above: str, below: str) -> float:
    """Where a line goes first, from the left."""
    return _aisle(above, below) if _place(below)[0] - _place(above)[0] > 1 else _corner(below)[0] + _BOX / 2


def _last(above: str, below: str) -> float:
    """Where a line comes from at last, from the left."""
    return _aisle(above, below) if _place(below)[0] - _place(above)[0] > 1 else _corner(above)[0] + _BOX / 2


def _box(room: Room) -> str:
    (x, y), colour = _corner(room.name), COLOURS[_place(room.name)[0]]
    middle = x + _BOX / 2
    most = 1 if len(room.sentence) <= _LINE else 2 if len(room.sentence) <= 1.8 * _LINE else 3
    said = next(
        rows
        for width in range(12, 99)
        if len(rows := textwrap.wrap(room.sentence, width, break_on_hyphens=False)) <= most
    )
    size = f"{room.files} files · {room.lines:,} lines"
    sentence = "\n".join(
        f'    <text x="{middle:.0f}" y="{y + 46 + 16 * number + 8 * (3 - len(said)):.0f}" fill="#475569" '
        f'font-size="12">{escape(row)}</text>'
        for number, row in enumerate(said)
    )
    return f"""\
  <g data-room="{room.name}" text-anchor="middle">
    <rect x="{x:.0f}" y="{y:.0f}" width="{_BOX}" height="{_HEIGHT}" rx="8" fill="#ffffff" stroke="{colour}" \
stroke-width="1.6"/>
    <text x="{middle:.0f}" y="{y + 25:.0f}" fill="#0f172a" font-size="15" font-weight="600">{room.name}</text>
{sentence}
    <text x="{middle:.0f}" y="{y + 100:.0f}" fill="#94a3b8" font-size="11">{size}</text>
  </g>"""


if __name__ == "__main__":
    PICTURE.write_text(picture(rooms(), imports()), encoding="utf-8")
