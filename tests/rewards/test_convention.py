"""TRL's calling convention: what goes in, what may come out, and where sync code runs."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.convention import (
    Signature,
    accepted_arguments,
    call_function,
    check_columns,
    check_signature,
    checked_score,
    checked_scores,
    reward_name,
    reward_place,
)
from troupe.rewards.extras import RewardLog
from troupe.rewards.loading import load_reward

pytestmark = pytest.mark.anyio

ARGUMENTS = {"prompts": ["p", "p"], "completions": ["a", "bb"], "completion_ids": [[1], [2, 3]], "answer": ["a", "b"]}


class Named(RewardActor):
    name = "judge"

    async def score(self, sample: RewardSample) -> float | None:
        return 1.0


class Nameless(Named):
    name = ""


class Scorer:
    def __call__(self, completions: list[str]) -> list[float]:
        return [1.0] * len(completions)


class AsyncScorer:
    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [float(threading.current_thread() is threading.main_thread())] * len(completions)


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def needs(completions: list[str], answer: list[str], level: int = 3) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_names_are_trl_names() -> None:
    partial = functools.partial(functools.partial(needs, level=1), answer=[])
    found = [reward_name(r) for r in (lengths, partial, Scorer(), Named(), Nameless())]
    assert found == ["lengths", "needs", "Scorer", "judge", "Nameless"]


def test_places_are_file_and_line_where_there_is_one() -> None:
    line = needs.__code__.co_firstlineno
    assert reward_place(functools.partial(needs, level=1)) == f"{__file__}:{line}: "
    assert reward_place(Scorer()) == ""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "cannot be called"),
        (lambda texts: texts, r"cannot take `completions`; declare it as"),
        (lambda completions, /: completions, "'completions' by position only"),
        (dict.update, "no readable signature|by position only"),
        (type("Unreadable", (), {"__signature__": "x", "__call__": lambda self: 0})(), "no readable signature"),
    ],
)
def test_signatures_that_do_not_fit_are_refused(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_signature(function)


def test_signatures_that_fit() -> None:
    partial = functools.partial(needs, answer=[])
    fitting: list[Callable[..., Any]] = [lengths, needs, Scorer(), AsyncScorer(), lambda **everything: [], partial]
    for function in fitting:
        check_signature(function)


def test_functions_get_what_they_name_or_all() -> None:
    assert accepted_arguments(needs, ARGUMENTS) == {"completions": ["a", "bb"], "answer": ["a", "b"]}
    assert accepted_arguments(lengths, ARGUMENTS) == ARGUMENTS


def test_functions_may_change_their_lists() -> None:
    accepted_arguments(lengths, ARGUMENTS)["completions"].clear()
    assert ARGUMENTS["completions"] == ["a", "bb"]


def test_a_missing_column_is_named_with_the_place() -> None:
    place = f"^{__file__}:{needs.__code__.co_firstlineno}: reward needs requires answer"
    with pytest.raises(RewardError, match=place + ".*columns are: hint; add"):
        check_columns(needs, {"hint"})
    with pytest.raises(RewardError, match="columns are: none"):
        accepted_arguments(needs, {"completions": []})
    check_columns(needs, {"answer"})
    check_columns(Named(), set())
    check_columns(lambda prompts, completions, completion_ids, trainer_state, log_extra, log_metric: [], set())


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (None, None),
        (True, 1.0),
        (3, 3.0),
        (np.float32(0.5), 0.5),
        (np.bool_(False), 0.0),
        (mx.array(0.25), 0.25),
        (Fraction(1, 4), 0.25),
        (Decimal("0.5"), 0.5),
        (10**400, math.inf),
    ],
)
def test_numbers_of_every_kind_are_scores(value: object, score: float | None) -> None:
    assert checked_score(value, "r", 0) == score


@pytest.mark.parametrize("value", ["1", b"1", [1.0], 1j, np.zeros(2), object()])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(RewardError, match=r"reward r returned .* for completion 4; a score is a number or None"):
        checked_score(value, "r", 4)


@pytest.mark.parametrize("result", [[1, 2], (1, 2), np.array([1.0, 2.0]), mx.array([1.0, 2.0])])
def test_sequences_of_every_kind_are_scores(result: object) -> None:
    assert checked_scores(result, "r", 2) == [1.0, 2.0]
    assert checked_scores([None, 1], "r", 2) == [None, 1.0]


NO_LISTS: list[Any] = [None, 1.0, "ab", b"ab", {0: 1.0, 1: 2.0}, {1.0, 2.0}, (x for x in (1, 2)), "x" * 99]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        *((each, ".*; return a list of 2 numbers or None") for each in NO_LISTS),
        ([1, 2, 3], "3 scores for 2 completions"),
    ],
)
def test_results_that_are_no_list_of_that_length_are_refused(result: object, said: str) -> None:
    with pytest.raises(RewardError, match=f"reward r returned {said}"):
        checked_scores(result, "r", 2)


async def test_sync_functions_run_on_a_daemon_thread_and_async_ones_in_the_loop() -> None:
    threads: list[threading.Thread] = []

    def sync(completions: list[str]) -> mx.array:
        threads.append(threading.current_thread())
        return mx.array([1.0, 2.0]) + 1  # unevaluated: of use on this thread only

    assert (await call_function(sync, "sync", ARGUMENTS, 2))[0] == [2.0, 3.0]
    assert threads[0].daemon
    assert threads[0] is not threading.main_thread()
    for function in (AsyncScorer(), functools.partial(AsyncScorer(), level=3)):
        assert (await call_function(function, "async", ARGUMENTS, 2))[0] == [1.0, 1.0]


async def test_a_sync_function_may_return_an_awaitable() -> None:
    def wrapped(**columns: Any) -> Awaitable[list[float]]:
        return AsyncScorer()(**columns)

    assert (await call_function(wrapped, "wrapped", ARGUMENTS, 2))[0] == [1.0, 1.0]


async def test_what_a_sync_function_raises_comes_through() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await call_function(broken, "broken", ARGUMENTS, 2)


async def test_an_interrupt_raised_by_the_function_itself_is_a_fault_like_any_other() -> None:
    def gives_up(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="the called code raised KeyboardInterrupt"):
        await call_function(gives_up, "gives_up", {"completions": ["a"]}, 1)


async def test_logs_are_kept_per_call() -> None:
    def logging(
        completions: list[str],
        log_extra: Callable[[str, Sequence[Any]], None],
        log_metric: Callable[[str, float], None],
    ) -> list[float]:
        log_extra("first", [c[0] for c in completions])
        log_metric("m", 1)
        log_metric("m", 2.0)
        return [0.0, 0.0]

    _, log = await call_function(logging, "logging", ARGUMENTS, 2)
    assert (log.extra, log.metrics) == ({"first": ("a", "b")}, {"m": 1.5})
    with pytest.raises(RewardError, match=r"log_extra\('x', …\) got 1 values for 2 completions"):
        RewardLog(2).log_extra("x", [1])


def test_the_mean_of_numbers_whose_sum_is_none() -> None:
    log = RewardLog(2)
    for value in (1e308, 1e308, 1e308, 5e307):
        log.log_metric("large", value)
    assert log.metrics == {"large": pytest.approx(8.75e307)}


async def test_a_quick_function_is_called_where_its_caller_is_and_others_are_not() -> None:
    def here(completions: list[str], **_: Any) -> list[float]:
        return [float(threading.get_ident())] * len(completions)

    arguments = {"prompts": ["p"], "completions": ["c"]}
    [elsewhere], _ = await call_function(here, "here", arguments, 1)
    here.quick = True  # type: ignore[attr-defined]
    [quick], _ = await call_function(here, "here", arguments, 1)
    assert quick == float(threading.get_ident()) != elsewhere


async def test_our_own_rewards_that_only_look_at_text_are_quick() -> None:
    functions: list[Any] = [
        load_reward(name) for name in ("length", "exact_answer", "think_format", "diversity", "format:a*")
    ]
    assert [Signature.of(function).is_quick for function in functions] == [True, True, True, False, False]
