"""What a run makes of a request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.daemon.control.test_protocol import STATUS
from troupe.daemon.control.answers import answer, answer_checked, takes_a_while
from troupe.daemon.control.place import Peer
from troupe.daemon.control.protocol import Request
from troupe.errors import ConfigError, RewardError
from troupe.messages import (
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    Pause,
    Phase,
    Refused,
    Reload,
    Resume,
    Set,
    Status,
    Step,
    Stop,
)


class Run:
    """Remembers what it was asked."""

    def __init__(self, phase: Phase = "running", *, pausing: bool = False) -> None:
        self.pausing = pausing
        self._status = msgspec.structs.replace(STATUS, phase=phase)
        self.asked: list[tuple[Any, ...]] = []

    def status(self) -> Status:
        return self._status

    def pause(self) -> None:
        self.asked.append(("pause",))

    def resume(self) -> None:
        self.asked.append(("resume",))

    def step(self, n: int = 1) -> None:
        self.asked.append(("step", n))

    def checkpoint(self) -> None:
        self.asked.append(("checkpoint",))

    def drain(self) -> None:
        self.asked.append(("drain",))

    def stop(self) -> None:
        self.asked.append(("stop",))

    def set(self, key: str, value: Any) -> None:
        if key == "seed":
            raise ConfigError("set seed: cannot change")
        self.asked.append(("set", key, value))

    async def check(self, key: str, value: Any) -> None:
        self.asked.append(("check", key, value))
        if value == "nope.py:f":
            raise RewardError("nope.py: no such file")


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (Pause(), ("pause",)),
        (Resume(), ("resume",)),
        (Checkpoint(), ("checkpoint",)),
        (Drain(), ("drain",)),
        (Stop(), ("stop",)),
        (Set(key="learner.lr", value=0.5), ("set", "learner.lr", 0.5)),
    ],
    ids=repr,
)
def test_requests_are_passed_on(request_: Request, asked: tuple[Any, ...]) -> None:
    run = Run()
    assert isinstance(answer(run, request_), Done)
    assert run.asked == [asked]


@pytest.mark.parametrize("phase", ["paused", "starting", "held", "running"])
def test_a_paused_run_goes_by_steps_also_where_the_pause_is_not_heeded_yet(phase: Phase) -> None:
    run = Run(phase, pausing=True)
    assert answer(run, Step(steps=3)) == Done(message="3 more will be begun, and then no further one")
    assert run.asked == [("step", 3)]


@pytest.mark.parametrize(
    ("phase", "pausing", "now"),
    [
        ("running", False, "running"),
        ("starting", False, "starting"),
        ("paused", False, "going on"),
        ("draining", True, "draining"),
    ],
)
def test_one_that_is_not_paused_does_not(phase: Phase, pausing: bool, now: str) -> None:
    run = Run(phase, pausing=pausing)
    assert answer(run, Step()) == Refused(
        message=f"the run is {now}, not paused: pause it first, then it goes by steps"
    )
    assert run.asked == []


def test_what_may_not_be_set_is_refused_in_the_runs_words() -> None:
    assert answer(Run(), Set(key="seed", value=3)) == Refused(message="set seed: cannot change")


def test_only_a_daemon_reads_its_configuration_again() -> None:
    assert isinstance(answer(Run(), Reload()), Refused)


@pytest.mark.parametrize("phase", ["ended", "failed"])
@pytest.mark.parametrize("request_", [Pause(), Step(), Stop()], ids=repr)
def test_after_the_end_there_is_nothing_to_ask_for(phase: Phase, request_: Request) -> None:
    run = Run(phase)
    assert answer(run, request_) == Refused(message=f"the run has {phase}, after 3 of 10 steps")
    assert run.asked == []
    assert answer(run, GetStatus()) == run.status()


@pytest.mark.anyio
async def test_a_reward_is_looked_at_before_there_is_an_answer() -> None:
    run = Run()
    good, bad = (Set(key="rewards.a", value=value) for value in ("r.py:f", "nope.py:f"))
    assert await answer_checked(run, bad) == Refused(message="nope.py: no such file")
    assert run.asked == [("check", "rewards.a", "nope.py:f")]
    assert isinstance(await answer_checked(run, good), Done)
    assert run.asked[1:] == [("check", "rewards.a", "r.py:f"), ("set", "rewards.a", "r.py:f")]
    assert isinstance(await answer_checked(run, Set(key="learner.lr", value=0.5)), Done)
    assert run.asked[3:] == [("set", "learner.lr", 0.5)]
    ended = Run("ended")
    assert isinstance(await answer_checked(ended, bad), Refused)
    assert ended.asked == []
    asked = (good, Set(key="learner.lr", value=1), Pause())
    assert [takes_a_while(request) for request in asked] == [True, False, False]


@pytest.mark.anyio
async def test_a_client_is_answered_the_same() -> None:
    assert await answer_checked(Run("paused"), GetStatus(), Peer()) == Run("paused").status()
