"""A thousand runs in which everything goes wrong that may: no group is lost or doubled, and timing changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.chaos import assert_all_holds, assert_timing_changes_nothing, drive
from tests.support.plans import REQUESTS, Plan, draw_plan
from tests.support.virtual_time import StuckError
from troupe.messages import GroupClosed
from troupe.runtime.board import Credits
from troupe.runtime.mailbox import Channel

pytestmark = pytest.mark.no_cover  # other tests cover what these shake; the tracer would triple their time

PLAYS, BLOCK = 1000, 50
FAST = 50
"""Runs that the ordinary tests have; the others are slow."""

PLAIN = Plan(
    seed=1,
    prompts=2,
    generations=3,
    steps=4,
    rows=5,
    max_staleness=1,
    mode="pinned",
    on_stale="drop",
    attempts=0,
    checkpoint_every=2,
    overlap=True,
    concurrency=2,
    retries=0,
    levels=7,
    with_actor=False,
    bad_rewards=0.0,
    bad_updates=0.0,
)


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=pytest.mark.slow if first >= FAST else ()) for first in range(0, PLAYS, BLOCK)],
)
def test_whatever_happens_every_group_ends_once(first: int) -> None:
    for seed in range(first, first + BLOCK):
        plan = draw_plan(seed)
        report = drive(plan)
        if plan.is_reproducible and seed % 4 == 0:
            assert_timing_changes_nothing(plan, report)


def test_the_runs_are_as_wild_as_they_claim() -> None:
    plans = [draw_plan(seed) for seed in range(PLAYS)]
    assert len(set(map(msgspec.json.encode, plans))) == PLAYS
    assert {plan.max_staleness for plan in plans} == {0, 1, 2, 3}
    assert {what for plan in plans for _, what in plan.requests} == set(REQUESTS)
    assert {(plan.mode, plan.on_stale, plan.attempts > 0) for plan in plans} == {
        (mode, stale, dynamic)
        for mode in ("pinned", "free")
        for stale in ("drop", "requeue", "correct")
        for dynamic in (False, True)
    }
    incidents: set[str] = set()
    states: set[str] = set()
    for plan in plans[:40]:
        report = drive(plan)
        incidents |= report.ledger.incidents.keys()
        states |= report.ledger.states.keys()
    assert {"trained", "filtered", "quarantined"} <= states
    assert {
        "actor_restarted",
        "checkpoint_back",
        "checkpoint_failed",
        "group_quarantined",
        "nonfinite_step",
        "reward_error",
        "reward_nonfinite",
        "reward_timeout",
    } <= incidents


def test_a_seed_gives_the_same_again() -> None:
    for seed in (3, 7, 19):
        one, other = drive(draw_plan(seed)), drive(draw_plan(seed))
        assert one.ledger.learned == other.ledger.learned
        assert one.ledger.incidents == other.ledger.incidents
        assert (one.took_s, one.faults, one.weights) == (other.took_s, other.faults, other.weights)


def test_a_calm_run_takes_hardly_any_time() -> None:
    report = drive(PLAIN)
    assert (report.steps, report.faults.total()) == (4, 0)
    assert report.took_s < 1, "virtual seconds"
    assert report.ledger.states == {"trained": 8}
    assert report.ledger.most_alive == 4
    assert report.ledger.written[-1] == report.ledger.final == 4


# What the runs would catch: each of these breaks one rule of the house.


def test_a_group_that_is_closed_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    twice(monkeypatch, "closed groups")
    with pytest.raises(AssertionError, match=r"seed 1: a group was closed twice\n\(python -m tests.support.chaos 1\)"):
        drive(PLAIN)


def test_a_lost_credit_is_a_deadlock_that_says_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    lost(monkeypatch, "closed")
    plan = msgspec.structs.replace(PLAIN, prompts=1, max_staleness=0)
    with pytest.raises(AssertionError, match=r"(?s)seed 1: deadlock at .*generator: .*\n  learner: .*take") as caught:
        drive(plan)
    assert isinstance(caught.value.__cause__, StuckError)


def test_a_credit_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Credits.__init__
    monkeypatch.setattr(Credits, "__init__", lambda self, limit, live=(): begin(self, limit + 1, live))
    with pytest.raises(AssertionError, match="5 groups are alive, 4 may be"):
        drive(PLAIN)


def test_a_run_that_timing_changes_is_caught() -> None:
    plan = msgspec.structs.replace(PLAIN, mode="free", delay_s=1.0, prompts=3, steps=5)
    report = drive(plan)
    with pytest.raises(AssertionError, match="seed 1: timing changed the run"):
        assert_timing_changes_nothing(plan, report)


def test_a_lost_update_is_caught() -> None:
    report = drive(PLAIN)
    del report.ledger.updates[1]
    with pytest.raises(AssertionError):
        assert_all_holds(PLAIN, report)


def twice(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the channel of this name deliver what closes group 1 once more."""
    send = Channel.send

    async def doubled(channel: Channel[Any], message: Any) -> None:
        await send(channel, message)
        if channel.name == name and isinstance(message, GroupClosed) and message.gid == 1:
            await send(channel, message)

    monkeypatch.setattr(Channel, "send", doubled)


def lost(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the channel of this name lose what closes group 1."""
    send = Channel.send

    async def lossy(channel: Channel[Any], message: Any) -> None:
        if not (channel.name == name and isinstance(message, GroupClosed) and message.gid == 1):
            await send(channel, message)

    monkeypatch.setattr(Channel, "send", lossy)
