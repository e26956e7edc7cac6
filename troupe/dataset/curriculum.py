"""The `[curriculum]` section, and what it makes of the scores that a row was given: a pass rate, and a pool."""

from collections.abc import Sequence
from typing import Annotated

import msgspec

from troupe.messages import Pool

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Weight = Annotated[float, msgspec.Meta(ge=0, le=1)]


class CurriculumConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[curriculum]` section: rows are drawn by how often the policy gets them right."""

    enabled: bool = False
    """Draw rows by their pass rates; otherwise every epoch has each row once."""
    reward: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Name of the reward function that says whether a completion passes; None: the weighted sum of all."""
    passes_from: float | None = None
    """A completion with at least this score passes. None: the score itself, cut to 0…1, is the part of it that did."""
    window: Annotated[int, msgspec.Meta(ge=1)] = 3
    """A row's pass rate is the mean over so many of its newest groups."""
    easy_threshold: _Share = 0.8
    """Rows with at least this pass rate are easy."""
    hard_threshold: _Share = 0.2
    """Rows with at most this pass rate are hard; all others, and those never seen, are normal."""
    easy_weight: _Weight = 0.1
    """How often an easy row is drawn, for one draw of a normal row; 0: only where there are no others."""
    hard_weight: _Weight = 0.2
    """The same for a hard row."""
    retire_at: _Share | None = None
    """A row with at least this pass rate is drawn no more. None: no row is retired."""
    retire_after: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Groups that a row must have had before it is retired."""
    revisit_every: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Steps after which a retired row is easy again, until it has proved itself once more. None: never."""
    stop_when_retired: bool = False
    """End the run when every row is retired; otherwise it goes on with the rows of the lowest pass rates."""

    def __post_init__(self) -> None:
        if self.hard_threshold >= self.easy_threshold:
            raise ValueError(
                f"curriculum.hard_threshold is {self.hard_threshold:g}, but must be below curriculum.easy_threshold "
                f"({self.easy_threshold:g})"
            )
        if self.retire_at is None and (self.revisit_every is not None or self.stop_when_retired):
            idle = "stop_when_retired" if self.stop_when_retired else "revisit_every"
            raise ValueError(f"curriculum.{idle} needs curriculum.retire_at: without it no row is ever retired")

    def weight_of(self, pool: Pool) -> float:
        """How often a row of a pool is drawn, for one draw of a normal row."""
        return {"easy": self.easy_weight, "normal": 1.0, "hard": self.hard_weight, "retired": 0.0}[pool]


def pass_rate(scores: Sequence[float | None], passes_from: float | None) -> float | None:
    """Which part of the completions passed, of those that have a score; None where none has."""
    there = [score for score in scores if score is not None]
    if not there:
        return None
    if passes_from is None:
        return sum(min(1.0, max(0.0, score)) for score in there) / len(there)
    return sum(score >= passes_from for score in there) / len(there)


def mean_rate(rates: Sequence[float], window: int) -> float:
    """The pass rate of a row, from those of its groups, the newest one last; at least one."""
    newest = rates[-window:]
    return sum(newest) / len(newest)


def pool_of(rates: Sequence[float], visits: int, config: CurriculumConfig) -> Pool:
    """Where a row belongs that was seen so often, with these pass rates at the end."""
    if not rates:
        return "normal"
    rate = mean_rate(rates, config.window)
    if config.retire_at is not None and visits >= config.retire_after and rate >= config.retire_at:
        return "retired"
    if rate >= config.easy_threshold:
        return "easy"
    return "hard" if rate <= config.hard_threshold else "normal"
