"""Regular expressions that come to no end."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
from typing import Any

import pytest

from troupe.rewards import RewardManager
from troupe.rewards.builtin import format_reward
from troupe.rewards.matching import ALL_S, LIMIT_S, Matching, end_process

pytestmark = pytest.mark.anyio
ENDLESS = r"(a+)+$"
BAD = "a" * 40 + "b"


def test_the_answers_are_those_of_re() -> None:
    texts = ["", "a", "b", "a\n", "日本", "\udcff", "x" * 200_000, "a" * 5]
    for pattern in (r"a*", r".*", r"[^\n]{1,5}", r"\udcff|日本", r"(?i)A+"):
        compiled = re.compile(pattern, re.DOTALL)
        matching = Matching(pattern)
        assert matching.full(texts) == [compiled.fullmatch(text) is not None for text in texts]
    assert matching.full([]) == []


def test_a_text_without_an_end_has_no_answer_and_its_neighbours_have() -> None:
    matching = Matching(ENDLESS, limit_s=0.05)
    assert matching.full(["aa", BAD, "b", "a", BAD]) == [True, None, False, True, None]
    assert matching.full(["aa"]) == [True], "the next call has a process again"


def test_several_threads_share_the_processes() -> None:
    matching = Matching(r"\d+")
    found: list[list[bool | None]] = []
    threads = [threading.Thread(target=lambda: found.append(matching.full(["1", "x"]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True, False]] * 12
    assert 1 <= len(matching.idle) <= 4


def test_processes_end_with_what_they_are_for_and_one_that_was_killed_is_replaced() -> None:
    matching = Matching(r"\d+")
    matching.full(["1"])
    [child] = matching.idle
    os.kill(child.pid, signal.SIGKILL)
    assert child.stdout is not None
    assert child.stdout.read() == b"", "it has ended"
    assert matching.full(["1"]) == [True]
    [other] = matching.idle
    assert other.pid != child.pid
    del matching
    gc.collect()
    assert other.returncode == 0


def test_there_is_time_for_a_whole_group() -> None:
    matching = Matching(r"\d+")
    assert matching.limit_s(1) == LIMIT_S
    assert matching.limit_s(120) == ALL_S / 120


async def test_format_tells_which_text_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("troupe.rewards.matching.ALL_S", 0.15)
    async with RewardManager(f"format:{ENDLESS}") as manager:
        scores = await manager.compute_rewards(["p"] * 3, ["aa", BAD, "b"])
    assert scores.scores == {"format_reward": (1.0, None, 0.0)}
    [incident] = scores.incidents
    assert incident.kind == "reward_timeout"
    assert incident.message.startswith(
        "reward format_reward: samples 1 of 3: the pattern comes to no end within 0.05 s; write it so"
    )


async def test_a_matcher_that_dies_is_an_error_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("troupe.rewards.matching.matcher.__file__", "/nowhere/matcher.py")
    with pytest.raises(RuntimeError, match="the process that matches the pattern has ended with code 2"):
        format_reward("a")(["a"])


class _Taken(list[Any]):
    """Others have taken the last one a moment after somebody has seen it."""

    def __bool__(self) -> bool:
        return True


def test_an_idle_process_that_another_thread_takes_first_is_no_error() -> None:
    matching = Matching("a+")
    matching.idle = _Taken()
    assert matching.full(["aa", "b"]) == [True, False]
    [child] = list(matching.idle)
    end_process(child)
