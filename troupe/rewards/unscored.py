"""A score that could not be had, and why."""

from __future__ import annotations

import math


class Unscored(float):
    """A NaN, in the place of a score, that says why there is none: told as a fault of its completion."""

    why: str

    def __new__(cls, why: str) -> Unscored:
        score = super().__new__(cls, math.nan)
        score.why = why
        return score
