"""TRL's calling convention for reward functions: which arguments go in, what may come out, on which thread.

A function is called with the keyword arguments `prompts`, `completions`, `completion_ids`, `completion_starts`,
`trainer_state`, `log_extra`, `log_metric` and every dataset column, each column a list of length G; where there are
environments also with `environments` and `environment_rewards`. It gets those that its signature names, or all with
`**kwargs`. It returns one number or None a completion.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Set
from types import CodeType
from typing import Any, Literal, TypeAlias

import msgspec

from troupe.errors import RewardError, sayable
from troupe.rewards.actor import RewardActor
from troupe.rewards.extras import RewardLog
from troupe.runtime.guarding import under_way
from troupe.runtime.isolation import InPlace, in_daemon_thread, in_own_task

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's signature; sync or async."""

Reward: TypeAlias = RewardFunction | RewardActor

Scope: TypeAlias = Literal["group", "batch"]
"""What one call scores: the G completions of a prompt, or all P·G of a step."""

PROVIDED = frozenset(
    {"prompts", "completions", "completion_ids", "completion_starts", "trainer_state", "log_extra", "log_metric"}
)
"""Arguments that every run provides, beside the dataset's columns."""

OF_ENVIRONMENTS = frozenset({"environments", "environment_rewards"})
"""Arguments that a run with environments provides."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def batch_reward(function: RewardFunction) -> RewardFunction:
    """Decorator: call the function once a step, with the completions of all its prompts. Sets `scope = "batch"`."""
    function.scope = "batch"  # type: ignore[attr-defined]
    return function


def unwrapped(reward: Reward) -> Reward:
    """What a partial was made of; anything else itself."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def reward_name(reward: Reward) -> str:
    """Under which the scores are reported: an actor's `name`, a function's `__name__`, else the class's name."""
    if isinstance(reward, RewardActor):
        return reward.name or type(reward).__name__
    reward = unwrapped(reward)
    return str(getattr(reward, "__name__", type(reward).__name__))


def reward_code(reward: Reward) -> CodeType | None:
    """The code of a function, or of what an actor or an object of another class scores with; None where it has none in
    Python."""
    reward = unwrapped(reward)
    scores = type(reward).score if isinstance(reward, RewardActor) else inspect.unwrap(reward)
    code = getattr(scores, "__code__", None)
    if code is None and callable(scores):
        code = getattr(type(scores).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None


def reward_place(reward: Reward) -> str:
    """`FILE:LINE: ` of a function's definition, to start a message with; empty where it cannot be told."""
    reward = unwrapped(reward)
    code = getattr(inspect.unwrap(reward), "__code__", None) if callable(reward) else None
    return f"{code.co_filename}:{code.co_firstlineno}: " if code else ""


def reward_scope(reward: Reward) -> Scope:
    """The attribute `scope` of a function or its class, "group" where there is none.

    Raises:
        RewardError: for another value, or for an actor that is not called by sample.
    """
    scope: Any = getattr(unwrapped(reward), "scope", "group")
    if scope not in ("group", "batch"):
        raise RewardError(f"reward {reward_name(reward)} has scope = {scope!r}; give 'group' or 'batch'")
    if scope == "batch" and isinstance(reward, RewardActor):
        raise RewardError(
            f"reward {reward_name(reward)} has scope = 'batch', but a RewardActor scores one sample a call; "
            "write a function for a whole batch"
        )
    return scope  # type: ignore[no-any-return]


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """What a reward function takes, read once."""

    names: Mapping[str, bool]
    """Parameter name → whether it is required."""
    takes_all: bool
    """Whether there is a `**kwargs`."""
    is_async: bool
    is_quick: bool
    """Whether the function says so of itself (`quick = True`): it takes microseconds, and a thread would take more."""

    @classmethod
    def of(cls, function: RewardFunction) -> Signature:
        """Read it.

        Raises:
            RewardError: no readable signature, or a parameter that cannot be given by keyword.
        """
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {reward_name(function)} has no readable signature; wrap it in a function "
                "(prompts, completions, **columns)"
            ) from None
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
                raise RewardError(
                    f"{reward_place(function)}reward {reward_name(function)} takes {parameter.name!r} by position "
                    "only, but rewards are called by keyword; remove the / from its signature"
                )
        return cls(
            names={p.name: p.default is p.empty for p in parameters if p.kind in _NAMED},
            takes_all=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
            is_async=_is_async(function),
            is_quick=bool(getattr(unwrapped(function), "quick", False)),
        )

    def taken_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that the function takes."""
        return {name: value for name, value in arguments.items() if self.takes_all or name in self.names}


def check_signature(function: RewardFunction) -> Signature:
    """Refuse what cannot be called in TRL's way.

    Raises:
        RewardError: not callable, no readable signature, or one that cannot take `completions` by keyword.
    """
    if not callable(function):
        raise RewardError(f"reward {shown(function)} cannot be called; give a function or a RewardActor")
    signature = Signature.of(function)
    if "completions" not in signature.names and not signature.takes_all:
        raise RewardError(
            f"{reward_place(function)}reward {reward_name(function)} cannot take `completions`; "
            "declare it as (prompts, completions, **columns)"
        )
    return signature


def check_columns(reward: Reward, columns: Set[str]) -> None:
    """Refuse a function that requires an argument which neither a run nor the dataset has.

    Raises:
        RewardError: naming reward and columns.
    """
    if not isinstance(reward, RewardActor):
        check_available(reward, Signature.of(reward), PROVIDED | columns)


def check_available(function: RewardFunction, signature: Signature, available: Set[str]) -> None:
    """RewardError where a required argument is not among those available."""
    missing = sorted(name for name, required in signature.names.items() if required and name not in available)
    if missing:
        if not OF_ENVIRONMENTS.isdisjoint(missing):
            raise RewardError(
                f"{reward_place(function)}reward {reward_name(function)} is about environments, and there are none; "
                "name one by environment.factory, or leave the reward out"
            )
        has = ", ".join(sorted(available - PROVIDED - OF_ENVIRONMENTS)) or "none"
        remedy = "name it by data.answer_column" if missing == ["answer"] else "give the argument a default"
        raise RewardError(
            f"{reward_place(function)}reward {reward_name(function)} requires {', '.join(missing)}, "
            f"but the dataset's columns are: {has}; add the column or {remedy}"
        )


def accepted_arguments(
    function: RewardFunction, arguments: Mapping[str, Any], signature: Signature | None = None
) -> dict[str, Any]:
    """Those of `arguments` that the function takes, copied as `own_copy` does.

    Raises:
        RewardError: where a required one is not there.
    """
    signature = Signature.of(function) if signature is None else signature
    check_available(function, signature, arguments.keys())
    taken = signature.taken_of(arguments)
    return {name: list(value) if name == "environments" else own_copy(value) for name, value in taken.items()}


def own_copy(value: Any) -> Any:
    """Lists and dicts copied all the way down: what a reward changes reaches neither the dataset nor other rewards."""
    if isinstance(value, list):
        if any(isinstance(item, _CONTAINERS) for item in value):
            return [own_copy(item) for item in value]
        return list(value)
    if isinstance(value, dict):
        return {key: own_copy(item) for key, item in value.items()}
    return value


_CONTAINERS = (list, dict)


def checked_score(value: Any, name: str, index: int) -> float | None:
    """One score as a float (which may be NaN or infinite), or None.

    Raises:
        RewardError: for what is no number. A text and a complex number are none; an array of one number is, and
            anything else with `__float__`.
    """
    if value is None:
        return None
    try:
        if getattr(value, "shape", ()) and math.prod(value.shape) == 1:  # an array, whatever library it is of
            value = value.item()
        is_number = hasattr(value, "__float__") and not isinstance(value, str)
        if is_number and (isinstance(value, numbers.Real) or not isinstance(value, numbers.Complex)):
            return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass  # an array of several numbers has __float__ too
    raise RewardError(f"reward {name} returned {shown(value)} for completion {index}; a score is a number or None")


def checked_scores(result: Any, name: str, size: int) -> list[float | None]:
    """A function's result as `size` scores: a list, a tuple or an array of one axis more or less.

    Raises:
        RewardError: for another length or type.
    """
    is_sequence = hasattr(result, "__len__") and hasattr(result, "__getitem__") and getattr(result, "shape", None) != ()
    if not is_sequence or isinstance(result, (str, bytes, bytearray, Mapping)):
        raise RewardError(
            f"reward {name} returned {shown(result)}; return a list of {size} numbers or None, one a completion"
        )
    values = list(result)  # in order, which a table's own index need not be
    if len(values) != size:
        raise RewardError(f"reward {name} returned {len(values)} scores for {size} completions; return one for each")
    return [checked_score(value, name, index) for index, value in enumerate(values)]


class Unscored(float):
    """A NaN, in the place of a score, that says why there is none: told as a fault of its completion."""

    why: str

    def __new__(cls, why: str) -> Unscored:
        score = super().__new__(cls, math.nan)
        score.why = why
        return score


async def call_function(
    function: RewardFunction, name: str, arguments: Mapping[str, Any], size: int, signature: Signature | None = None
) -> tuple[list[float | None], RewardLog]:
    """Call once; a sync function in a thread, an async or quick one in the event loop.

    A cancelled call of a sync function is left to itself: Python cannot stop a thread. An async one that ignores its
    cancellation is left behind.

    Raises:
        RewardError: arguments or result break the convention.
        Whatever the function raises.
    """
    signature = Signature.of(function) if signature is None else signature
    log = RewardLog(size)
    given = {**arguments, "log_extra": log.log_extra, "log_metric": log.log_metric}
    call = functools.partial(function, **accepted_arguments(function, given, signature))
    code = reward_code(function)

    def read(result: Any) -> Any:
        """Numbers are read on the thread that made them: an unevaluated MLX array is no use on another."""
        if isinstance(result, list):
            log.why = {index: score.why for index, score in enumerate(result) if isinstance(score, Unscored)}
        return result if inspect.isawaitable(result) else checked_scores(result, name, size)

    result: Any = None
    if signature.is_quick and not signature.is_async:
        with InPlace(), under_way(name, code):
            result = read(call())
    elif not signature.is_async:
        result = await in_daemon_thread(call, read, under_way(name, code))
    if not signature.is_async and not inspect.isawaitable(result):
        return result, log
    with under_way(name, code, in_turns=True):
        return checked_scores(await in_own_task(call if signature.is_async else lambda: result), name, size), log


def _is_async(function: RewardFunction) -> bool:
    function = unwrapped(function)  # type: ignore[assignment]
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's async __call__
    )


def shown(value: Any) -> str:
    """A value and its type for a message, cut where it is long."""
    try:
        text = sayable(repr(value))
    except Exception:  # a user's object may do anything
        text = "a value that cannot be shown"
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"
