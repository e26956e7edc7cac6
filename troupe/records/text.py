"""Figures, times, sizes, prompts and the texts of others as people read them. `format.js` mirrors the numbers."""

import math
import time
from typing import Any

import msgspec

from troupe.runtime.terminal import harmless

MISSING = "–"


def number(value: float | None) -> str:
    """Four digits; whole numbers with commas from a thousand on."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if 1000 <= size < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    if 1e6 <= size < 1e9:
        return f"{value / 1e6:.4g} M".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A part of 1."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    if value < 7200:
        return f"{int(value / 60)} min {int(value % 60)} s"
    return f"{int(value / 3600)} h {int(value % 3600 / 60)} min"


def size(count: float) -> str:
    """Bytes, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def date(unix_s: float | None) -> str:
    """In local time."""
    return MISSING if unix_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def shown(text: str) -> str:
    """The text, with escapes in the place of what would do something to a terminal, or turn its lines around."""
    return harmless(text.expandtabs(4))


def plain_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def prompt_text(prompt: str | list[dict[str, Any]] | None) -> str:
    """A prompt to be read: of a conversation, each turn with who speaks."""
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role', '')}: {plain_text(turn.get('content'))}" for turn in prompt)
    return prompt or ""
