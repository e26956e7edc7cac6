"""TRL's calling convention for reward functions: which arguments go in, what may come out, on which thread.

A function is called with the keyword arguments `prompts`, `completions`, `completion_ids`, `trainer_state`,
`log_extra`, `log_metric` and every dataset column, each column a list of length G; it gets those that its signature
names, or all with `**kwargs`. It returns one number or None a completion. Knows nothing of retries and weights.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's signature; sync or async."""

Reward: TypeAlias = RewardFunction | RewardActor

T = TypeVar("T")

PROVIDED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Arguments that every run provides, beside the dataset's columns."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def reward_name(reward: Reward) -> str:
    """Under which the scores are reported: an actor's `name`, a function's `__name__`, else the class's name."""
    if isinstance(reward, RewardActor):
        return reward.name or type(reward).__name__
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def reward_place(reward: Reward) -> str:
    """`FILE:LINE: ` of a function's definition, to start a message with; empty where it cannot be told."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    code = getattr(inspect.unwrap(reward), "__code__", None) if callable(reward) else None
    return f"{code.co_filename}:{code.co_firstlineno}: " if code else ""


def check_signature(function: RewardFunction) -> None:
    """Refuse what cannot be called in TRL's way.

    Raises:
        RewardError: not callable, no readable signature, or one that cannot take `completions` by keyword.
    """
    if not callable(function):
        raise RewardError(f"reward {_shown(function)} cannot be called; give a function or a RewardActor")
    names, takes_all = _named_parameters(function)
    if "completions" not in names and not takes_all:
        raise RewardError(
            f"{reward_place(function)}reward {reward_name(function)} cannot take `completions`; "
            "declare it as (prompts, completions, **columns)"
        )


def check_columns(reward: Reward, columns: Set[str]) -> None:
    """Refuse a function that requires an argument which neither a run nor the dataset has.

    Raises:
        RewardError: naming reward and columns.
    """
    if not isinstance(reward, RewardActor):
        _check_available(reward, PROVIDED | columns)


def accepted_arguments(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that the function's signature takes, copied as `own_copy` does.

    Raises:
        RewardError: where a required one is not there.
    """
    _check_available(function, arguments.keys())
    names, takes_all = _named_parameters(function)
    return {name: own_copy(value) for name, value in arguments.items() if takes_all or name in names}


def own_copy(value: Any) -> Any:
    """Lists and dicts copied all the way down: what a reward changes reaches neither the dataset nor other rewards."""
    if isinstance(value, list):
        return [own_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: own_copy(item) for key, item in value.items()}
    return value


def _named_parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """Parameter name → whether it is required; and whether there is a `**kwargs`."""
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
                f"{reward_place(function)}reward {reward_name(function)} takes {parameter.name!r} by position only, "
                "but rewards are called by keyword; remove the / from its signature"
            )
    names = {p.name: p.default is p.empty for p in parameters if p.kind in _NAMED}
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _check_available(function: RewardFunction, available: Set[str]) -> None:
    names, _ = _named_parameters(function)
    missing = sorted(name for name, required in names.items() if required and name not in available)
    if missing:
        has = ", ".join(sorted(available - PROVIDED)) or "none"
        raise RewardError(
            f"{reward_place(function)}reward {reward_name(function)} requires {', '.join(missing)}, "
            f"but the dataset's columns are: {has}; add the column or give the argument a default"
        )


class RewardLog:
    """What one call reported beside its scores, by TRL's `log_extra(column, values)` and `log_metric(name, value)`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.extra: dict[str, tuple[Any, ...]] = {}
        """Column → (G,) values for the table of completions."""
        self._metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        values = tuple(values)
        if len(values) != self.size:
            raise RewardError(
                f"log_extra({column!r}, …) got {len(values)} values for {self.size} completions; give one for each"
            )
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(float(value))

    @property
    def metrics(self) -> dict[str, float]:
        """Name → mean of the values logged."""
        return {name: math.fsum(values) / len(values) for name, values in self._metrics.items()}


def checked_score(value: Any, name: str, index: int) -> float | None:
    """One score as a float (which may be NaN or infinite), or None.

    Raises:
        RewardError: for what is no number; a text is none, anything else with `__float__` is.
    """
    if value is None:
        return None
    if not isinstance(value, str) and hasattr(value, "__float__"):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError):
            pass  # an array of several numbers has __float__ too
    raise RewardError(f"reward {name} returned {_shown(value)} for completion {index}; a score is a number or None")


def checked_scores(result: Any, name: str, size: int) -> list[float | None]:
    """A function's result as `size` scores.

    Raises:
        RewardError: for another length or type.
    """
    is_sequence = hasattr(result, "__len__") and hasattr(result, "__getitem__")
    if not is_sequence or isinstance(result, (str, bytes, bytearray, Mapping)):
        raise RewardError(
            f"reward {name} returned {_shown(result)}; return a list of {size} numbers or None, one a completion"
        )
    if len(result) != size:
        raise RewardError(f"reward {name} returned {len(result)} scores for {size} completions; return one for each")
    return [checked_score(result[index], name, index) for index in range(size)]


async def call_function(
    function: RewardFunction, name: str, arguments: Mapping[str, Any], size: int
) -> tuple[list[float | None], RewardLog]:
    """Call once; a sync function in a thread of its own, an async one in the event loop.

    A cancelled call of a sync function is left to itself: Python cannot stop a thread.

    Raises:
        RewardError: arguments or result break the convention.
        Whatever the function raises.
    """
    log = RewardLog(size)
    logging = {"log_extra": log.log_extra, "log_metric": log.log_metric}
    call = functools.partial(function, **accepted_arguments(function, {**arguments, **logging}))
    if _is_async(function):
        return checked_scores(await call(), name, size), log

    def play() -> Any:
        result = call()
        # Numbers are read on the thread that made them: an unevaluated MLX array is no use on another.
        return result if inspect.isawaitable(result) else checked_scores(result, name, size)

    result = await in_daemon_thread(play)
    return checked_scores(await result if inspect.isawaitable(result) else result, name, size), log


def _is_async(function: RewardFunction) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's async __call__
    )


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a new thread, abandoned when the caller is cancelled.

    anyio's worker threads are no daemons: one that hangs would keep the whole process from ever ending.
    """
    future: Future[T] = Future()
    done = anyio.Event()
    token = anyio.lowlevel.current_token()
    context = contextvars.copy_context()

    def play() -> None:
        try:
            future.set_result(context.run(work))
        except KeyboardInterrupt as error:  # no signal reaches this thread: it is the code's own, not the user's
            fault = RuntimeError("the reward raised KeyboardInterrupt")
            fault.__cause__ = error
            future.set_exception(fault.with_traceback(error.__traceback__))
        except BaseException as error:
            future.set_exception(error)
        try:
            anyio.from_thread.run_sync(done.set, token=token)
        except RuntimeError:
            return  # the event loop ended long before this abandoned call did

    threading.Thread(target=play, name="troupe reward", daemon=True).start()
    await done.wait()
    return future.result()


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"
