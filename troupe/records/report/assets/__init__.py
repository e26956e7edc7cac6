"""The static parts of pages: style, charts, templates."""

from __future__ import annotations

from pathlib import Path

_SHARED = Path(__file__).parent


def read_asset(name: str, folder: Path = _SHARED) -> str:
    """The text of a page's file, such as `style.css`: of the given folder, or else of those that pages share."""
    path = folder / name
    return (path if path.is_file() else _SHARED / name).read_text(encoding="utf-8")
