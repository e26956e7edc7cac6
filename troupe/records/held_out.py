"""How evaluations stand: of each set the figure that says most, first, now and at its best, in a line for a person."""

from collections.abc import Mapping

import msgspec

_PREFIX = "eval/"
_ERROR = "_se"
_MOST_TELLING = ("accuracy", "avg@")
"""Beginnings of figures' names; a set is told by the first of them that it has, of several by the last."""
_SHARES = ("accuracy", "pass@", "maj@")
"""Those that are parts of 1."""


class SetStanding(msgspec.Struct):
    """One set so far."""

    figure: str
    """What stands after `eval/NAME/`."""
    first: float
    newest: float
    version: int
    """Of the newest evaluation."""
    best: float
    best_version: int
    error: float | None = None
    """Standard error of the newest."""

    def __str__(self) -> str:
        def told(value: float) -> str:
            return f"{value:.1%}" if self.figure.startswith(_SHARES) else f"{value:.3f}"

        way = told(self.newest) if self.version == 0 else f"{told(self.first)} → {told(self.newest)}"
        error = "" if self.error is None else f" ± {told(self.error)}"
        best = "" if self.version == 0 else f", best {told(self.best)} at step {self.best_version:,}"
        return f"{self.figure} {way}{error} at step {self.version:,}{best}"


class HeldOut:
    """Takes the figures of evaluations, in the order of versions."""

    def __init__(self) -> None:
        self.sets: dict[str, SetStanding] = {}

    def add(self, version: int, name: str, metrics: Mapping[str, float]) -> None:
        """The figures `eval/NAME/…` of one set with one version."""
        before = self.sets.get(name)
        figures = {key.removeprefix(f"{_PREFIX}{name}/"): value for key, value in metrics.items()}
        figure = before.figure if before is not None and before.figure in figures else most_telling(figures)
        if figure is None:
            return
        value = figures[figure]
        if before is None or before.figure != figure:
            before = SetStanding(
                figure=figure, first=value, newest=value, version=version, best=value, best_version=version
            )
        is_better = value > before.best
        self.sets[name] = msgspec.structs.replace(
            before,
            newest=value,
            version=version,
            error=figures.get(figure + _ERROR),
            best=value if is_better else before.best,
            best_version=version if is_better else before.best_version,
        )


def most_telling(figures: Mapping[str, float]) -> str | None:
    """The figure that a set is told by; None where there is none."""
    names = [name for name in figures if not name.endswith(_ERROR)]
    for beginning in _MOST_TELLING:
        if found := [name for name in names if name.startswith(beginning)]:
            return found[-1]
    return names[0] if names else None
