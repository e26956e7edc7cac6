"""How evaluations stand: of each set the figure that says most, first, now and at its best, in a line for a person."""

from collections.abc import Mapping

import msgspec

from troupe.messages.evaluations import HELD_OUT
from troupe.runtime.terminal import arrows, one_line

_PREFIX = "eval/"
_ERROR = "_se"
_MOST_TELLING = ("accuracy", "avg@")
"""Beginnings of figures' names; a set is told by the first of them that it has, of several by the last."""
_SHARES = ("accuracy", "pass@", "maj@")
"""Those that are parts of 1."""


class SetStanding(msgspec.Struct, kw_only=True):
    """One set so far."""

    figure: str
    """What stands after `eval/NAME/`."""
    values: dict[int, float] = {}
    """Version → its value, in the order in which they were told."""
    error: float | None = None
    """Standard error of the newest."""

    @property
    def is_share(self) -> bool:
        """Whether it is a part of 1."""
        return self.figure.startswith(_SHARES)

    def __str__(self) -> str:
        def told(value: float) -> str:
            return f"{value:.1%}" if self.is_share else f"{value:.3f}"

        first, newest = next(iter(self.values)), next(reversed(self.values))
        error = "" if self.error is None else f" ± {told(self.error)}"
        line = f"{told(self.values[newest])}{error} at step {newest:,}"
        if first == newest:
            return f"{self.figure} {line}"
        best = max(self.values, key=lambda version: self.values[version])
        return f"{self.figure} {told(self.values[first])} → {line}, best {told(self.values[best])} at step {best:,}"


class HeldOut:
    """Takes the figures of evaluations, in the order of versions."""

    def __init__(self) -> None:
        self.sets: dict[str, SetStanding] = {}

    def add(self, version: int, name: str, metrics: Mapping[str, float]) -> None:
        """The figures `eval/NAME/…` of one set with one version."""
        figures = {key.removeprefix(f"{_PREFIX}{name}/"): value for key, value in metrics.items()}
        standing = self.sets.get(name)
        if standing is None:
            if (figure := most_telling(figures)) is None:
                return
            standing = self.sets[name] = SetStanding(figure=figure)
        if standing.figure in figures:
            standing.values[version] = figures[standing.figure]
            standing.error = figures.get(standing.figure + _ERROR)

    def lines(self, encoding: str = "utf-8") -> list[tuple[str, str]]:
        """(name, in words) of each set; of one that is alone with the rows of `data.eval_path` without its name."""
        names = [""] if list(self.sets) == [HELD_OUT] else [one_line(name, encoding) for name in self.sets]
        return [
            (name, arrows(str(standing), encoding)) for name, standing in zip(names, self.sets.values(), strict=True)
        ]


def most_telling(figures: Mapping[str, float]) -> str | None:
    """The figure that a set is told by; None where there is none."""
    names = [name for name in figures if not name.endswith(_ERROR)]
    for beginning in _MOST_TELLING:
        if found := [name for name in names if name.startswith(beginning)]:
            return found[-1]
    return names[0] if names else None
