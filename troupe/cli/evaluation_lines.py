"""What `troupe eval` says: the figures of one model, or of several beside each other, and whether they differ by more
than noise."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from troupe.cli.tables import Column, table
from troupe.records.held_out import in_words, is_share
from troupe.records.text import prompt_text
from troupe.rewards.estimates import Comparison, compared, scores_by_row
from troupe.run.evaluate import Evaluation

_OF_TEXTS = ("length", "clipped", "missing")
_ERROR = "_se"
_MOST_OF_A_PROMPT = 60


class Evaluated(NamedTuple):
    """A model and what it came to."""

    name: str
    found: Evaluation
    seconds: float


def lines_of_one(one: Evaluated, figures: Sequence[str]) -> Iterator[str]:
    """A figure a line."""
    for figure in figures:
        if figure in one.found.figures:
            yield f"{in_words(figure)} {_told(one.found, figure)}"
        elif figure in one.found.rewards:
            yield f"{figure} nan"


def lines_of_many(models: Sequence[Evaluated], figures: Sequence[str], width: int) -> Iterator[str]:
    """A model a line, and then of each but the first how it differs from that."""
    titles = [figure for figure in figures if any(figure in one.found.figures for one in models)]
    columns = [Column("model", most=60)]
    columns += [Column(in_words(title), right=True, goes=place) for place, title in enumerate(titles)]
    cells = [[one.name, *(_told(one.found, title) for title in titles)] for one in models]
    yield from table(
        [*columns, Column("seconds", right=True, goes=99)],
        [[*row, f"{one.seconds:.1f}"] for row, one in zip(cells, models, strict=True)],
        width,
    )
    first, *others = models
    for other in others:
        yield ""
        yield from comparison_lines(first, other)


def figures_shown(one: Evaluation, asked: bool) -> list[str]:
    """The figures that are worth a line, in order; `asked`: whether pass@k was asked for."""
    count, several = len(one.table[0].samples), len(one.rewards) > 1
    names = [name for name in one.figures if not name.endswith(_ERROR) and name not in one.rewards]
    if count == 1:  # the same as the mean of the one reward, and as accuracy
        names = [name for name in names if (several or not name.startswith("avg@")) and (asked or "pass@" not in name)]
    if not one.figures.get("missing"):
        names = [name for name in names if name != "missing"]
    told = [name for name in names if name not in _OF_TEXTS]
    rewards = [
        name for name, mean in one.rewards.items() if several or count == 1 or mean != one.figures.get(f"avg@{count}")
    ]
    return [*told, *rewards, *(name for name in names if name in _OF_TEXTS)]


def comparison_lines(first: Evaluated, other: Evaluated) -> Iterator[str]:
    """How a model differs from the first, and whether by more than noise."""
    found = comparison_of(first, other)
    if found is None:
        yield f"{other.name}: no row has a score of both it and {first.name}"
        return
    interval = "" if found.low is None else f" (95 % between {found.low:+.4f} and {found.high:+.4f})"
    yield f"{other.name} against {first.name}: mean score {found.difference:+.4f}{interval}"
    yield f"  {found.counts}"
    yield f"  {found.verdict}"


def rows_that_differ(first: Evaluated, other: Evaluated) -> Iterator[str]:
    """The rows that one does better than the other, a line each."""
    found = comparison_of(first, other)
    if found is None:
        return
    before, after = (_means(one.found) for one in (first, other))
    for word, rows in (("better", found.better), ("worse", found.worse)):
        for row in rows:
            asked = " ".join(prompt_text(first.found.table[row].prompt).split())
            short = asked if len(asked) <= _MOST_OF_A_PROMPT else f"{asked[: _MOST_OF_A_PROMPT - 1]}…"
            yield f"  {word} row {row}: {before[row]:.4g} → {after[row]:.4g}  {short}"


def comparison_of(first: Evaluated, other: Evaluated) -> Comparison | None:
    """By the weighted sums of the rewards."""
    return compared(scores_by_row(first.found.table), scores_by_row(other.found.table))


def told_in_json(models: Sequence[Evaluated], *, with_rows: bool) -> dict[str, Any]:
    """All of it as one object: of one model, or of several with how each but the first differs from that."""
    told = [
        {
            "rows": one.found.rows,
            "accuracy": one.found.accuracy,
            "rewards": one.found.rewards,
            "figures": one.found.figures,
            "wall_s": one.seconds,
        }
        for one in models
    ]
    if len(models) == 1:
        return told[0]
    comparisons = [_comparison_in_json(models[0], other, with_rows) for other in models[1:]]
    named = [{"model": one.name} | figures for one, figures in zip(models, told, strict=True)]
    return {"models": named, "comparisons": comparisons}


def _comparison_in_json(first: Evaluated, other: Evaluated, with_rows: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"model": other.name, "against": first.name}
    if (found := comparison_of(first, other)) is None:
        return told | {"rows": 0}
    told |= {
        "rows": found.rows,
        "left_out": found.left_out,
        "better": len(found.better),
        "worse": len(found.worse),
        "equal": found.ties,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "test": found.test,
    }
    return told | ({"rows_better": found.better, "rows_worse": found.worse} if with_rows else {})


def _means(found: Evaluation) -> dict[int, float]:
    means = {}
    for row, scores in scores_by_row(found.table).items():
        known = [score for score in scores if score is not None]
        if known:
            means[row] = sum(known) / len(known)
    return means


def _told(found: Evaluation, figure: str) -> str:
    value, error = found.figures.get(figure), found.figures.get(figure + _ERROR)
    if value is None:
        return ""
    if is_share(figure):
        return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")
    if figure == "length":
        return f"{value:.1f}"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
