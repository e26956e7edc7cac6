"""What a run came to on rows that it is not trained on: of each set its figures by version, and the one that says most
in a line for a person."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from troupe.messages import Evaluated, EvaluatedRow
from troupe.messages.evaluations import HELD_OUT, changed
from troupe.rewards.estimates import Comparison, compared, scores_by_row
from troupe.runtime.terminal import arrows, one_line

_ERROR = "_se"
_MOST_TELLING = ("accuracy", "avg@")
"""Figures, those with @ for any number; a set is told by the first of them that it has, of several by the last."""
_SHARES = ("accuracy", "pass@", "maj@", "clipped", "missing")
"""Those that are parts of 1."""
_TOLD = ("accuracy", "avg@", "pass@", "maj@", "length")
"""Those that are told first."""
_WORDS = {"length": "tokens a completion", "clipped": "cut at the limit", "missing": "without a score"}


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What one version came to."""

    version: int
    value: float
    se: float | None
    """Standard error; None where it is not known."""


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """One run on one set."""

    name: str
    """Of the set."""
    figures: Mapping[str, tuple[Point, ...]]
    """`accuracy`, `avg@4`, `pass@4` and so on → what it was, by version; at least one."""
    changes: Mapping[int, tuple[str, ...]] = {}
    """Version → which conditions of the set changed with it, in words: figures before cannot be compared with it."""
    rows: tuple[EvaluatedRow, ...] = ()
    """Of the newest version; none where they are not stored."""
    first_rows: tuple[EvaluatedRow, ...] = ()
    """Of the first version that can be compared with it, where that is another."""

    @property
    def versions(self) -> list[int]:
        """Those that were evaluated, ascending."""
        return sorted({point.version for points in self.figures.values() for point in points})

    @property
    def since(self) -> int:
        """The first version that can be compared with the newest."""
        return max(self.changes, default=self.versions[0])

    def compared(self, figure: str) -> tuple[Point, ...]:
        """What a figure was at the versions that can be compared with the newest; empty where none has it."""
        return tuple(point for point in self.figures.get(figure, ()) if point.version >= self.since)

    def stretches(self, figure: str) -> list[tuple[Point, ...]]:
        """All points of a figure, those together that can be compared; none of them is empty."""
        starts = sorted(self.changes)
        found: list[list[Point]] = [[] for _ in range(len(starts) + 1)]
        for point in self.figures.get(figure, ()):
            found[bisect_right(starts, point.version)].append(point)
        return [tuple(stretch) for stretch in found if stretch]

    @property
    def newest(self) -> int:
        """The newest version that was evaluated."""
        return self.versions[-1]

    @property
    def headline(self) -> str:
        """The figure that tells most."""
        there = [figure for figure in self.figures if self.compared(figure)]
        return most_telling(there) or there[0]

    @property
    def gained(self) -> Comparison | None:
        """The newest version against the first, row by row; None where there is one only, or rows are not stored."""
        return compared(scores_by_row(self.first_rows), scores_by_row(self.rows))

    def __str__(self) -> str:
        figure = self.headline
        points = self.compared(figure)
        first, newest = points[0], points[-1]
        error = "" if newest.se is None else f" ± {_told(figure, newest.se)}"
        line = f"{_told(figure, newest.value)}{error} at step {newest.version:,}"
        if first is not newest:
            best = max(points, key=lambda point: (point.value, point.version))
            of_best = f"{_told(figure, best.value)} at step {best.version:,}"
            line = f"{_told(figure, first.value)} → {line}, {'its best' if best is newest else f'best {of_best}'}"
        return f"{figure} {line}" + (f" (other conditions before step {self.since:,})" if self.changes else "")

    @property
    def short(self) -> str:
        """The newest figure, and the first, for where there is little room."""
        figure = self.headline
        first, newest = (self.compared(figure)[place] for place in (0, -1))
        of_first = "" if first is newest else f" (from {_told(figure, first.value)})"
        return f"{figure} {_told(figure, newest.value)}{of_first}"


class Standings:
    """Takes evaluations as they come, also once more. May be read while it takes some."""

    def __init__(self, evaluations: Iterable[Evaluated] = ()) -> None:
        self._told: dict[tuple[int, str], Evaluated] = {}
        self.sets: Mapping[str, HeldOut] = {}
        self._take({(one.version, one.name): one for one in evaluations})

    def add(self, evaluated: Evaluated) -> None:
        """One that takes the place of what the version came to on the set before."""
        self._take({(evaluated.version, evaluated.name): evaluated})

    def lines(self, encoding: str = "utf-8", *, short: bool = False) -> list[tuple[str, str]]:
        """(name, in words) of each set; of one that is alone with the rows of `data.eval_path` without its name."""
        sets = self.sets
        names = [""] if list(sets) == [HELD_OUT] else [one_line(name, encoding) for name in sets]
        told = [one.short if short else arrows(str(one), encoding) for one in sets.values()]
        return list(zip(names, told, strict=True))

    def _take(self, told: Mapping[tuple[int, str], Evaluated]) -> None:
        if any(self._told.get(key) != one for key, one in told.items()):
            self._told |= {key: msgspec.structs.replace(one, rows=()) for key, one in told.items()}
            self.sets = held_out_of(sorted(self._told.values(), key=lambda one: one.version))


def held_out_of(evaluations: Iterable[Evaluated]) -> dict[str, HeldOut]:
    """Set → what the run came to on it, from all evaluations in order; sets without a figure are left out."""
    found: dict[str, dict[str, list[Point]]] = {}
    conditions: dict[str, Mapping[str, str]] = {}
    changes: dict[str, dict[int, tuple[str, ...]]] = {}
    for one in evaluations:
        figures = found.setdefault(one.name, {})
        if differing := changed(conditions.get(one.name, {}), one.conditions):
            changes.setdefault(one.name, {})[one.version] = differing
        conditions[one.name] = one.conditions
        for metric, value in one.metrics.items():
            name = metric.removeprefix(f"eval/{one.name}/")
            if metric.removesuffix(_ERROR) == metric or metric.removesuffix(_ERROR) not in one.metrics:
                point = Point(version=one.version, value=value, se=one.metrics.get(f"{metric}{_ERROR}"))
                figures.setdefault(name, []).append(point)
    return {
        name: HeldOut(
            name=name,
            figures={metric: tuple(points) for metric, points in _in_order(figures)},
            changes=changes.get(name, {}),
        )
        for name, figures in found.items()
        if figures
    }


def is_share(figure: str) -> bool:
    """Whether a figure of a set is a part of its rows or samples."""
    return any(_is(figure, kind) for kind in _SHARES)


def changes_told(held_out: HeldOut) -> list[str]:
    """A sentence for each change of the conditions under which a set is evaluated."""
    return [
        f"From step {version:,} on it is asked otherwise, and not to be compared with before: {'; '.join(differing)}."
        for version, differing in held_out.changes.items()
    ]


def in_words(figure: str) -> str:
    """A figure of a set for people."""
    return _WORDS.get(figure, figure)


def most_telling(figures: Iterable[str]) -> str | None:
    """The figure that a set is told by; None where there is none."""
    names = [name for name in figures if not name.endswith(_ERROR)]
    for kind in _MOST_TELLING:
        if found := [name for name in names if _is(name, kind)]:
            return found[-1]
    return names[0] if names else None


def _told(figure: str, value: float) -> str:
    return f"{value:.1%}" if is_share(figure) else f"{value:.3f}"


def _in_order(figures: Mapping[str, Sequence[Point]]) -> list[tuple[str, Sequence[Point]]]:
    """Those that tell most first."""

    def place(name: str) -> int:
        return next((at for at, kind in enumerate(_TOLD) if _is(name, kind)), len(_TOLD))

    return sorted(figures.items(), key=lambda item: place(item[0]))


def _is(figure: str, kind: str) -> bool:
    """A reward may be called `accuracy_reward`, which is not the accuracy."""
    return figure.startswith(kind) if kind.endswith("@") else figure == kind
