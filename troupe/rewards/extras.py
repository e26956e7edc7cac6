"""What a reward function is handed beside columns, as by TRL: `trainer_state`, `log_extra` and `log_metric`.

What is logged is read at once, on the thread of whoever made it, as plain data (None, booleans, numbers, texts, lists
and objects of these, never huge), so that nothing lazy and no user's object goes further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from troupe.errors import RewardError, sayable
from troupe.rewards.faults import described

_MOST_NAMES = 1000
"""Columns, and metrics, of one call."""
_SHOWN = 3  # faults of a call that are told one by one


class TrainerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a reward function gets as `trainer_state`: the fields of the object of that name in transformers that mean
    something here, under their names.

    It is a function of the group's slot alone, so a schedule in a reward (a bonus that fades, say) does not depend on
    timing: steps that end while the group is being scored are not counted. Nothing that depends on the machine or the
    moment is there: best_metric, total_flos, num_input_tokens_seen, log_history's entries.
    """

    global_step: int
    """Learner batch k ≥ 0 that the completions are for: batches done when it begins. In TRL: optimizer updates, which
    is the same where num_iterations is 1."""
    max_steps: int
    """Learner batches of the whole run."""
    epoch: float
    """Passes over the dataset before the batch, with the fraction."""
    num_train_epochs: int = 1
    """Passes that the run takes at most, rounded up."""
    train_batch_size: int = 1
    """Completions in a batch, P × G."""
    is_world_process_zero: bool = True
    """Always: one process trains."""
    is_local_process_zero: bool = True
    """Always."""
    is_hyper_param_search: bool = False
    """Never."""
    log_history: tuple[dict[str, Any], ...] = ()
    """Always empty."""

    @classmethod
    def at(cls, step: int, *, max_steps: int, prompts: int, num_generations: int, rows: int) -> TrainerState:
        """For batch `step` of `prompts` prompts each, of a dataset of `rows`."""
        return cls(
            global_step=step,
            max_steps=max_steps,
            epoch=step * prompts / rows,
            num_train_epochs=-(-max_steps * prompts // rows),
            train_batch_size=prompts * num_generations,
        )


class RewardLog:
    """What one call reported beside its scores. What cannot be kept is left out, and is one of the `faults`: the scores
    do not suffer from it.
    """

    def __init__(
        self,
        size: int,
        extra: dict[str, tuple[Any, ...]] | None = None,
        logged: dict[str, list[float]] | None = None,
    ) -> None:
        self.size = size
        self.extra = {} if extra is None else extra
        """Column → (G,) values for the table of completions, plain data."""
        self.logged = {} if logged is None else logged
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


LONGEST = 100_000
"""Characters of all texts of one value."""
MOST = 10_000
"""Numbers, texts and so on of one value."""
DEEPEST = 32
"""Lists and objects inside each other."""


def plain(value: Any, *, most: int = MOST, longest: int = LONGEST) -> Any:
    """The value as msgpack and JSON have it, cut where it is larger than the limits, which a text in it says.

    Arrays of any library become numbers or lists of numbers, sets lists in a fixed order, keys texts; whole numbers of
    more than 64 bits, dates and all other objects their text; lone surrogates their escapes.

    Raises:
        Whatever the value raises when it is looked at.
    """
    return _Reading(most, longest).of(value, 0)


class _Reading:
    """One value being read, and how much of it may still be taken."""

    def __init__(self, values: int, characters: int) -> None:
        self._values, self._characters = values, characters

    def of(self, value: Any, depth: int) -> Any:
        self._values -= 1
        if value is None or value is True or value is False:
            return value
        # by the built-in types' own methods: those of a subclass may do anything
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            number = int.__index__(value)
            return number if -(2**63) <= number < 2**64 else self._text(str(number))
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, (bytes, bytearray)):
            return self._text(bytes(value[:LONGEST]).decode(errors="backslashreplace"))
        if depth == DEEPEST and isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return "…"
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if isinstance(value, (list, tuple)):
            return self._list(value, len(value), depth)
        if isinstance(value, (set, frozenset)):
            return sorted(self._list(value, len(value), depth), key=repr)
        tolist = getattr(value, "tolist", None)
        return self._text(str(value)) if tolist is None else self._array(value, tolist, depth)

    def _text(self, text: str) -> str:
        text = str.__str__(text)
        if len(text) > self._characters:
            cut = len(text) - self._characters
            text = f"{text[: self._characters]}… ({cut} more characters)"
        self._characters = max(0, self._characters - len(text))
        return sayable(text)

    def _list(self, values: Iterable[Any], size: int, depth: int) -> list[Any]:
        taken = max(0, min(size, self._values))
        read = [self.of(item, depth + 1) for item in islice(values, taken)]
        return read if taken == size else [*read, f"… ({size - taken} more)"]

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        taken = max(0, min(len(value), self._values))
        read = {self._key(key): self.of(item, depth + 1) for key, item in islice(value.items(), taken)}
        return read if taken == len(value) else {**read, "…": f"{len(value) - taken} more"}

    def _key(self, key: Any) -> str:
        return self._text(key if isinstance(key, str) else str(key))

    def _array(self, value: Any, tolist: Callable[[], Any], depth: int) -> Any:
        size = getattr(value, "size", None)
        if callable(size):  # PyTorch's
            size = value.numel()
        if isinstance(size, int) and size > self._values:
            first = value.reshape(-1)[: max(0, self._values)].tolist()
            return [*self._list(first, len(first), depth), f"… ({size - len(first)} more)"]
        read = tolist()
        if getattr(read, "tolist", None) is not None:
            return self._text(str(value))
        return self.of(read, depth)
