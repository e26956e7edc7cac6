"""How evaluations stand: of each set the figure that says most, first, now and at its best, in a line for a person."""

from collections.abc import Iterable, Mapping

import msgspec

from troupe.messages.evaluations import HELD_OUT
from troupe.runtime.terminal import arrows, one_line

_PREFIX = "eval/"
_ERROR = "_se"
_MOST_TELLING = ("accuracy", "avg@")
"""Figures, those with @ for any number; a set is told by the first of them that it has, of several by the last."""
_SHARES = ("accuracy", "pass@", "maj@", "clipped", "missing")
"""Those that are parts of 1."""


class SetStanding(msgspec.Struct, frozen=True, kw_only=True):
    """One set so far."""

    figure: str
    """What stands after `eval/NAME/`."""
    values: Mapping[int, float] = {}
    """Version → its value, in the order in which they were told."""
    errors: Mapping[int, float] = {}
    """Version → the standard error of its value, where that is known."""

    def __str__(self) -> str:
        def told(value: float) -> str:
            return f"{value:.1%}" if is_share(self.figure) else f"{value:.3f}"

        versions = list(self.values)
        first, newest = versions[0], versions[-1]
        error = f" ± {told(self.errors[newest])}" if newest in self.errors else ""
        line = f"{told(self.values[newest])}{error} at step {newest:,}"
        if first == newest:
            return f"{self.figure} {line}"
        best = max(self.values, key=lambda version: self.values[version])
        return f"{self.figure} {told(self.values[first])} → {line}, best {told(self.values[best])} at step {best:,}"


class HeldOut:
    """Takes the figures of evaluations, in the order of versions. May be read while it takes some."""

    def __init__(self) -> None:
        self.sets: Mapping[str, SetStanding] = {}

    def add(self, version: int, name: str, metrics: Mapping[str, float]) -> None:
        """The figures `eval/NAME/…` of one set with one version."""
        figures = {key.removeprefix(f"{_PREFIX}{name}/"): value for key, value in metrics.items()}
        before, figure = self.sets.get(name), most_telling(figures)
        if figure is None:
            return
        if before is None or _place(figure) < _place(before.figure):  # what was told before had no score
            before = SetStanding(figure=figure)
        if before.figure not in figures:
            return
        values = {**before.values, version: figures[before.figure]}
        errors = {place: error for place, error in before.errors.items() if place != version}
        if (error := figures.get(before.figure + _ERROR)) is not None:
            errors[version] = error
        self.sets = {**self.sets, name: SetStanding(figure=before.figure, values=values, errors=errors)}

    def lines(self, encoding: str = "utf-8") -> list[tuple[str, str]]:
        """(name, in words) of each set; of one that is alone with the rows of `data.eval_path` without its name."""
        sets = self.sets
        names = [""] if list(sets) == [HELD_OUT] else [one_line(name, encoding) for name in sets]
        return [(name, arrows(str(standing), encoding)) for name, standing in zip(names, sets.values(), strict=True)]


def is_share(figure: str) -> bool:
    """Whether a figure of a set is a part of its rows or samples."""
    return any(_is(figure, kind) for kind in _SHARES)


def most_telling(figures: Iterable[str]) -> str | None:
    """The figure that a set is told by; None where there is none."""
    names = [name for name in figures if not name.endswith(_ERROR)]
    for kind in _MOST_TELLING:
        if found := [name for name in names if _is(name, kind)]:
            return found[-1]
    return names[0] if names else None


def _place(figure: str) -> int:
    """The lower, the more it tells."""
    return next((i for i, kind in enumerate(_MOST_TELLING) if _is(figure, kind)), len(_MOST_TELLING))


def _is(figure: str, kind: str) -> bool:
    """A reward may be called `accuracy_reward`, which is not the accuracy."""
    return figure.startswith(kind) if kind.endswith("@") else figure == kind
