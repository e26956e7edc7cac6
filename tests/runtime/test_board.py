from __future__ import annotations

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from troupe.runtime.board import Credits, PolicyBoard

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_keeps_what_the_pinned_schedule_can_still_need(staleness: int) -> None:
    board: PolicyBoard[str] = PolicyBoard(staleness)
    assert board.version == -1
    for newest in range(6):
        board.publish(newest, f"w{newest}")
        assert board.version == newest
        assert sorted(board.kept) == list(range(max(0, newest - staleness), newest + 1))
        for step in range(newest, newest + staleness + 1):  # the steps that may be alive now
            pinned = board.pinned_for(step)
            assert pinned == max(0, step - staleness)
            assert await board.get(pinned) == f"w{pinned}"
    with pytest.raises(LookupError, match=r"policy version 1 is gone; kept are"):
        await board.get(1)


async def test_waiters_get_exactly_the_version_they_asked_for() -> None:
    board: PolicyBoard[str] = PolicyBoard(1)
    got: dict[int, str] = {}

    async def wait(version: int) -> None:
        got[version] = await board.get(version)

    async with anyio.create_task_group() as group:
        for version in (2, 0, 1):
            group.start_soon(wait, version)
        await wait_all_tasks_blocked()
        assert got == {}
        for version in range(3):
            board.publish(version, f"w{version}")
            await wait_all_tasks_blocked()
            assert sorted(got) == list(range(version + 1))
    assert got == {0: "w0", 1: "w1", 2: "w2"}


async def test_a_waiter_that_is_overtaken_is_told() -> None:
    board: PolicyBoard[str] = PolicyBoard(0)
    with pytest.RaisesGroup(pytest.RaisesExc(LookupError, match=r"version 3 is gone; kept are \[4\]")):
        async with anyio.create_task_group() as group:
            group.start_soon(board.get, 3)
            await wait_all_tasks_blocked()
            board.publish(3, "w3")
            board.publish(4, "w4")


def test_a_version_is_published_once_and_never_too_late() -> None:
    board: PolicyBoard[str] = PolicyBoard(1)
    board.publish(5, "w5")
    board.publish(4, "w4")  # a resume may publish the newest first
    assert board.kept == {4: "w4", 5: "w5"}
    with pytest.raises(ValueError, match="version 5 was published before"):
        board.publish(5, "other")
    with pytest.raises(ValueError, match="version 3 is older than the board may keep beside 5"):
        board.publish(3, "w3")
    assert board.kept == {4: "w4", 5: "w5"}


def test_what_is_kept_is_a_copy() -> None:
    board: PolicyBoard[str] = PolicyBoard(0)
    board.publish(0, "w0")
    kept = board.kept
    board.publish(1, "w1")
    assert kept == {0: "w0"}


async def test_what_is_held_is_there_whatever_is_published() -> None:
    board: PolicyBoard[str] = PolicyBoard(0)
    board.publish(0, "w0")
    board.hold({0: "w0"})
    board.publish(1, "w1")
    assert (board.kept, board.version, await board.get(0)) == ({0: "w0", 1: "w1"}, 1, "w0")
    board.hold({})
    assert board.kept == {1: "w1"}
    with pytest.raises(LookupError):
        await board.get(0)


def test_credits_count_live_groups() -> None:
    credit = Credits(2)
    credit.take(10)
    credit.take(11)
    assert (credit.free, credit.live) == (0, frozenset({10, 11}))
    with pytest.raises(ValueError, match="group 12 has no credit: 2 groups are alive"):
        credit.take(12)
    credit.give_back(10)
    assert credit.free == 1
    with pytest.raises(ValueError, match="group 10 is not alive"):
        credit.give_back(10)
    with pytest.raises(ValueError, match="group 11 is alive already"):
        credit.take(11)
    credit.take(10)
    assert credit.free == 0


def test_a_credit_is_passed_on_though_more_are_alive_than_may_begin() -> None:
    """As after a resume with a smaller limit than the run had."""
    credit = Credits(1, live=[1, 2, 3])
    credit.pass_on(2, 12)
    assert credit.live == {1, 3, 12}
    with pytest.raises(ValueError, match="group 2 is not alive"):
        credit.pass_on(2, 22)
    with pytest.raises(ValueError, match="group 3 is alive already"):
        credit.pass_on(1, 3)
    assert credit.live == {1, 3, 12}


def test_credits_need_a_limit() -> None:
    with pytest.raises(ValueError, match="a credit limit of 0"):
        Credits(0)


async def test_the_newest_version_is_waited_for() -> None:
    board: PolicyBoard[str] = PolicyBoard(0)
    got: list[tuple[int, str]] = []

    async def follow() -> None:
        version = -1
        while version < 3:
            version, weights = await board.newer_than(version)
            got.append((version, weights))

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await wait_all_tasks_blocked()
        assert got == []
        board.publish(0, "w0")
        await wait_all_tasks_blocked()
        for version in (1, 2, 3):  # nobody is obliged to look at each
            board.publish(version, f"w{version}")
        await wait_all_tasks_blocked()
    assert got == [(0, "w0"), (3, "w3")]
    assert await board.newer_than(2) == (3, "w3")
