"""The static parts of pages: style, charts, templates. Knows nothing of what they show."""

from __future__ import annotations

from importlib.resources import files


def read_asset(name: str) -> str:
    """The text of a file of this folder, such as `style.css`."""
    return (files(__name__) / name).read_text(encoding="utf-8")
