"""Evaluate: a version of the policy is to be looked at; Evaluated: what it came to on one set of rows that it is not
trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

HELD_OUT = "held_out"
"""Name of the set of `data.eval_path`."""

MOST_ROWS, MOST_SETS = 2**32, 2**10
"""Of a set, and of a run: by them groups that are evaluated have their gids, which are below 0."""


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Which conditions of a set differ, in words. Nothing where either is not known, as of older Troupes' results."""
    return tuple(
        f"{name} {before[name]} → {now[name]}" for name in before if before[name] != now.get(name, before[name])
    )


def gid_of(version: int, number: int, row: int) -> int:
    """Of a row that is evaluated with a version; `number`: of its set."""
    return -1 - ((version * MOST_SETS + number) * MOST_ROWS + row)


def row_of(gid: int) -> int:
    """The row of a group that was evaluated."""
    return (-1 - gid) % MOST_ROWS if gid < 0 else gid


def told_of_row(gid: int, sets: Sequence[str]) -> str:
    """Which row of which set a group is that is evaluated, for a person. `sets`: their names, by number."""
    number = (-1 - gid) // MOST_ROWS % MOST_SETS
    return f"evaluation{f' of {sets[number]}' if number < len(sets) else ''}, row {row_of(gid)}"


class Evaluate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Learner → Evaluator: look at a version. Its weights go by reference: never serialized."""

    version: int
    weights: Mapping[str, Any]
    """Hugging Face tensor name → evaluated `mx.array`."""


class EvaluatedSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion of a row."""

    text: str
    tokens: int
    finish_reason: str
    score: float | None
    """Weighted sum of the set's rewards; None where none gave one, or one is missing through a fault."""
    scores: Mapping[str, float | None] = {}
    """By reward."""


class EvaluatedRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of a set."""

    row: int
    prompt: Any
    """A text, or messages."""
    columns: Mapping[str, Any]
    samples: tuple[EvaluatedSample, ...]


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Evaluator → Metrics: a set was evaluated with a version; once for each of both."""

    version: int
    """Learner batches that the policy had learned from."""
    name: str
    """Of the set."""
    metrics: Mapping[str, float]
    """`eval/NAME/…`, such as `eval/NAME/avg@4`, its standard error `eval/NAME/avg@4_se`, `eval/NAME/pass@4`."""
    rows: tuple[EvaluatedRow, ...]
    """In order."""
    seconds: float = 0.0
    """From its first token to its last score."""
    conditions: Mapping[str, str] = {}
    """What the figures depend on besides the policy, such as `num_samples` → `4`; empty where that is not known. Only
    figures of equal conditions can be compared."""
