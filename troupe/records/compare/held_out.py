"""What runs came to on rows that they are not trained on: each set's figures by version, and two runs row by row."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

import msgspec

from troupe.messages import Evaluated, EvaluatedRow
from troupe.messages.evaluations import HELD_OUT
from troupe.records.held_out import most_telling
from troupe.records.standing import Summary
from troupe.rewards.estimates import Comparison, compared, scores_by_row

HEADLINES = ("accuracy", "avg@", "pass@")
"""How figures of what is wanted begin."""
_WORDS = {"length": "tokens a completion", "clipped": "cut at the limit", "missing": "without a score"}
_TOLD = ("accuracy", "avg@", "pass@", "maj@", "length")


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
    figures: dict[str, tuple[Point, ...]]
    """`accuracy`, `avg@4`, `pass@4` and so on → what it was, by version; at least one."""
    rows: tuple[EvaluatedRow, ...] = ()
    """Of the newest version; none where they are not stored."""
    first_rows: tuple[EvaluatedRow, ...] = ()
    """Of the first version, where that is another."""

    @property
    def versions(self) -> list[int]:
        """Those that were evaluated, ascending."""
        return sorted({point.version for points in self.figures.values() for point in points})

    @property
    def newest(self) -> int:
        """The newest version that was evaluated."""
        return self.versions[-1]

    @property
    def headline(self) -> str:
        """The figure that tells most."""
        return most_telling(self.figures) or next(iter(self.figures))

    @property
    def gained(self) -> Comparison | None:
        """The newest version against the first, row by row; None where there is one only, or rows are not stored."""
        return compared(scores_by_row(self.first_rows), scores_by_row(self.rows))


def held_out_of(evaluations: Sequence[Evaluated]) -> dict[str, HeldOut]:
    """Set → what the run came to on it, from all evaluations in order; sets without a figure are left out."""
    found: dict[str, dict[str, list[Point]]] = {}
    for one in evaluations:
        figures = found.setdefault(one.name, {})
        for metric, value in one.metrics.items():
            name = metric.removeprefix(f"eval/{one.name}/")
            if not name.endswith("_se"):
                point = Point(version=one.version, value=value, se=one.metrics.get(f"{metric}_se"))
                figures.setdefault(name, []).append(point)
    return {
        name: HeldOut(name=name, figures={metric: tuple(points) for metric, points in _in_order(figures)})
        for name, figures in found.items()
        if figures
    }


def held_out_before(summary: Summary) -> dict[str, HeldOut]:
    """The same of a run of an older Troupe, which looked before and after training only."""
    figures = {"accuracy": (summary.accuracy_before, summary.accuracy_after)}
    for name in {**summary.rewards_before, **summary.rewards_after}:
        figures[name] = (summary.rewards_before.get(name), summary.rewards_after.get(name))
    points = {
        name: tuple(
            Point(version=version, value=value, se=None)
            for version, value in zip((0, summary.steps), ends, strict=True)
            if value is not None
        )
        for name, ends in figures.items()
    }
    there = {name: told for name, told in points.items() if told}
    return {HELD_OUT: HeldOut(name=HELD_OUT, figures=there)} if there else {}


def paired(first: HeldOut, second: HeldOut) -> Comparison | None:
    """The newest versions of two runs on the rows that both were asked; None where they share none."""
    return compared(_by_prompt(first.rows), _by_prompt(second.rows))


def distinct_figures(runs: Sequence[HeldOut]) -> dict[str, list[str]]:
    """The figures of one set, each with those that were the same in all of the runs at every version: with one sample
    a row and scores of 0 and 1, `accuracy`, `avg@1` and `pass@1` are."""
    found: dict[str, list[str]] = {}
    for figure in dict.fromkeys(figure for run in runs for figure in run.figures):
        for other, same in found.items():
            if all(_are_alike(run.figures.get(figure, ()), run.figures.get(other, ())) for run in runs):
                same.append(figure)
                break
        else:
            found[figure] = []
    return found


def _are_alike(one: Sequence[Point], other: Sequence[Point]) -> bool:
    return len(one) == len(other) and all(
        a.version == b.version and isclose(a.value, b.value, abs_tol=1e-9) for a, b in zip(one, other, strict=True)
    )


def in_words(figure: str) -> str:
    """A figure of a set for people."""
    return _WORDS.get(figure, figure)


def prompt_key(prompt: Any) -> str:
    """A prompt as a text by which others are compared with it."""
    return msgspec.json.encode(prompt, order="sorted").decode()


def _by_prompt(rows: Sequence[EvaluatedRow]) -> Mapping[tuple[str, int], Sequence[float | None]]:
    """Scores by prompt, and which of the rows with that prompt it is: rows of two files may be numbered differently."""
    found: dict[tuple[str, int], Sequence[float | None]] = {}
    seen: dict[str, int] = {}
    for row in rows:
        key = prompt_key(row.prompt)
        number = seen[key] = seen.get(key, 0) + 1
        found[key, number] = [sample.score for sample in row.samples]
    return found


def _in_order(figures: Mapping[str, list[Point]]) -> list[tuple[str, list[Point]]]:
    """Those that tell most first."""

    def place(name: str) -> int:
        return next((at for at, start in enumerate(_TOLD) if name.startswith(start)), len(_TOLD))

    return sorted(figures.items(), key=lambda item: place(item[0]))
