"""What one call of a reward reports beside its scores. Knows nothing of scores and of who reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from troupe.errors import RewardError
from troupe.rewards.attempts import described
from troupe.rewards.plain import plain

_MOST_NAMES = 1000
"""Columns, and metrics, of one call."""
_SHOWN = 3  # faults of a call that are told one by one


class RewardLog:
    """What one call reported beside its scores, by TRL's `log_extra(column, values)` and `log_metric(name, value)`.

    Both read what they are given at once, on the thread that calls them, and keep plain data. What cannot be kept is
    left out, and is one of the `faults`: the scores do not suffer from it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.extra: dict[str, tuple[Any, ...]] = {}
        """Column → (G,) values for the table of completions, plain data."""
        self.logged: dict[str, list[float]] = {}
        """Name → every value logged."""
        self.why: dict[int, str] = {}
        """Completion → why the function could not score it."""
        self._faults: list[str] = []
        self._count = 0

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """RewardError for another number of values than there are completions."""
        name = self._name("log_extra", column, self.extra)
        if name is None:
            return
        try:
            given = tuple(values)
        except BaseException as error:
            self._leave_out(f"log_extra({_shown(name)}, …): the values are no list", error)
            return
        if len(given) != self.size:
            raise RewardError(
                f"log_extra({_shown(name)}, …) got {len(given)} values for {self.size} completions; give one for each"
            )
        self.extra[name] = tuple(self._value(name, index, value) for index, value in enumerate(given))

    def log_metric(self, name: str, value: float) -> None:
        """Once more under the same name: the mean counts."""
        key = self._name("log_metric", name, self.logged)
        if key is None:
            return
        try:
            number = float(value)
        except BaseException as error:
            self._leave_out(f"log_metric({_shown(key)}, …): the value is no number", error)
            return
        self.logged.setdefault(key, []).append(number)

    @property
    def metrics(self) -> dict[str, float]:
        """Name → mean of the values logged."""
        return {name: mean(values) for name, values in dict(self.logged).items()}

    @property
    def faults(self) -> list[str]:
        """What could not be kept and why: the first few, and how many more there are."""
        more = self._count - len(self._faults)
        return [*self._faults, f"{more} more values that it logged cannot be kept"] if more else list(self._faults)

    def _name(self, function: str, name: Any, there: dict[str, Any]) -> str | None:
        if not issubclass(type(name), str):  # an object may lie about its class, or raise
            self._leave_out(f"{function}(…): the name is of type {type(name).__name__}; give a text")
            return None
        text: str = plain(name)
        if text not in there and len(there) >= _MOST_NAMES:
            self._leave_out(f"{function}({_shown(text)}, …): a call may log {_MOST_NAMES} names")
            return None
        return text

    def _value(self, column: str, index: int, value: Any) -> Any:
        try:
            return plain(value)
        except BaseException as error:
            kind = type(value).__name__
            self._leave_out(f"log_extra({_shown(column)}, …): value {index}, of type {kind}, cannot be read", error)
            return None

    def _leave_out(self, what: str, error: BaseException | None = None) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        self._count += 1
        if len(self._faults) < _SHOWN:
            self._faults.append(what if error is None else f"{what}: {described(error)}")


def mean(values: Sequence[float]) -> float:
    """NaN of infinities that cancel out."""
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is no number, yet the mean is
        return math.fsum(value / len(values) for value in values)
    except ValueError:
        return math.nan


def _shown(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "…'"
