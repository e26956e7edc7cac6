"""Two rewards by regular expression: one of the text alone, one that a column of the dataset takes part in."""

from __future__ import annotations

import re
from typing import Any


def tidy(completions: list[str], **columns: Any) -> list[float]:
    """1 for a whole number without a leading zero, and nothing else."""
    return [1.0 if re.fullmatch(r"0|[1-9]\d*", text) else 0.0 for text in completions]


def fits(completions: list[str], pattern: list[str], **columns: Any) -> list[float]:
    """1 for what the row's `pattern` describes: columns come by name, one value a completion."""
    return [1.0 if re.fullmatch(wanted, text) else 0.0 for text, wanted in zip(completions, pattern, strict=True)]
