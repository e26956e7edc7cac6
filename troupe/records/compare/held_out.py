"""Several runs on the same rows: two of them row by row, which figures say the same, and runs of older Troupes."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

import msgspec

from troupe.messages import EvaluatedRow
from troupe.messages.evaluations import HELD_OUT
from troupe.records.held_out import HeldOut, Point
from troupe.records.standing import Summary
from troupe.rewards.estimates import Comparison, compared

HEADLINES = ("accuracy", "avg@", "pass@")
"""How figures of what is wanted begin."""


def held_out_before(summary: Summary) -> dict[str, HeldOut]:
    """Set → what a run of an older Troupe came to on it, which looked before and after training only."""
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
        if not any(run.compared(figure) for run in runs):
            continue
        for other, same in found.items():
            if all(_are_alike(run.compared(figure), run.compared(other)) for run in runs):
                same.append(figure)
                break
        else:
            found[figure] = []
    return found


def _are_alike(one: Sequence[Point], other: Sequence[Point]) -> bool:
    return len(one) == len(other) and all(
        a.version == b.version and isclose(a.value, b.value, abs_tol=1e-9) for a, b in zip(one, other, strict=True)
    )


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
