"""What one may ask of a run as it goes on, and what it tells: requests return at once, at any time, from anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from tests.support import virtual_time
from tests.support.wiring import Hooks, Ledger, prepared_run, virtual_factories
from troupe import RunConfig
from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import CheckpointConfig
from troupe.errors import RunError
from troupe.grpo import LearnerConfig
from troupe.messages import Incident, Status, Update
from troupe.policy import GenerationConfig
from troupe.rewards import RewardManager, RewardsConfig
from troupe.run.resume.changes import ChangesLog
from troupe.run.supervisor import Supervisor
from troupe.runtime.mailbox import Mailbox

P, STEPS = 2, 5
Body = Callable[[Supervisor], Awaitable[None]]


class Slow(Hooks):
    """A step takes about a second; a disk can be told to fail."""

    disk_fails = False

    def delay_s(self, who: str) -> float:
        return {"generator": 0.2, "learner": 0.5}.get(who, 0.0)

    def on_write(self, snapshot: Any) -> None:
        if self.disk_fails:
            raise OSError("disk full")


async def rate(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 / 7 for ids in completion_ids]


class VirtualRun:
    """A run in virtual time, with stand-ins for all that computes."""

    def __init__(
        self, folder: Path, reward: Callable[..., Any] = rate, *, watchdog_s: float = 600.0, **rewards: Any
    ) -> None:
        self.config = RunConfig(
            output=str(folder / "run"),
            generation=GenerationConfig(num_generations=2, max_completion_length=5),
            rewards=RewardsConfig(**rewards),
            learner=LearnerConfig(batch_size=P, max_steps=STEPS),
            schedule=ScheduleConfig(max_staleness=1, watchdog_s=watchdog_s),
            checkpoint=CheckpointConfig(every=99),
        )
        self.ledger, self.hooks = Ledger(2 * P), Slow()
        self.rewards = RewardManager([reward], config=self.config.rewards)
        with self.with_stand_ins():
            prepared = prepared_run(self.config, self.rewards, rows=7)
            factories = virtual_factories(prepared, self.hooks, self.ledger)
            self.run = Supervisor(self.config, factories=factories)

    def go_through(self, body: Body, *, before: Callable[[], None] = lambda: None) -> None:
        async def body_in_it() -> None:
            before()
            async with self.run:
                await body(self.run)

        with self.with_stand_ins():
            virtual_time.run(body_in_it)

    @contextmanager
    def with_stand_ins(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", virtual_now)
            yield


def virtual_now() -> float:
    """The loop's time where one runs."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return 0.0


@pytest.fixture
def virtual(tmp_path: Path) -> VirtualRun:
    return VirtualRun(tmp_path)


async def quiet() -> None:
    """Long after everything that goes on by itself has ended."""
    await anyio.sleep(60)


def test_a_paused_run_finishes_what_is_begun_waits_and_goes_on(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        async for update in run.updates():
            if update.step == 1:
                run.pause()  # by who reads: it must not wait for itself
                break
        await quiet()
        status = run.status()
        assert (status.phase, status.groups, set(status.queues.values())) == ("paused", (), {0})
        assert status.step == status.policy_version < STEPS == status.total_steps
        assert status.doing["learner"].startswith("waits: idle for ")
        paused_at = status.step
        run.step()
        await quiet()
        assert run.status().step == paused_at + 1
        run.resume()
        await run.wait()

    virtual.go_through(body)
    assert virtual.run.result.steps == STEPS


def test_requests_before_the_start_are_heeded(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        await quiet()
        status = run.status()
        assert (status.phase, status.step, virtual.ledger.issued) == ("paused", 0, {})
        run.step(2)
        await quiet()
        assert run.status().step == 2
        run.drain()

    def before() -> None:
        virtual.run.pause()
        assert virtual.run.status().phase == "starting"
        assert virtual.run.status().total_steps == 0

    virtual.go_through(body, before=before)
    assert virtual.run.result.steps == 2
    assert virtual.ledger.final == 2


def test_a_run_that_is_stopped_before_the_start_makes_no_step(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        assert run.status().phase == "stopping"
        await run.wait()

    virtual.go_through(body, before=virtual.run.stop)
    assert virtual.run.result.steps == 0
    assert virtual.ledger.written == [0]


def test_requests_after_the_end_change_nothing(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        await run.wait()
        ask_everything(run)

    virtual.go_through(body)
    run = virtual.run
    ask_everything(run)
    status = run.status()
    assert (status.phase, status.step, status.doing) == ("ended", STEPS, {})
    assert status.metrics["loss"] == 0.0
    assert status.incidents == run.result.incidents == {}


def ask_everything(run: Supervisor) -> None:
    for ask in (run.pause, run.resume, run.step, run.checkpoint, run.drain, run.stop):
        ask()
    run.exchange_reward("rate", rate)


def test_everything_may_be_asked_within_updates_and_more_often_than_anybody_reads(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        async for _ in run.updates():
            for _ in range(500):  # the channel for requests holds 1024
                run.pause()
                run.step()
                run.checkpoint()
                run.resume()
                run.status()

    virtual.go_through(body)
    assert virtual.run.result.steps == STEPS


def test_a_step_is_one_at_least(virtual: VirtualRun) -> None:
    with pytest.raises(ValueError, match=r"step\(0\)"):
        virtual.run.step(0)


async def first_update(run: Supervisor) -> Update:
    async for update in run.updates():
        return update
    raise AssertionError("the run ended")


def test_drain_and_checkpoint(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        await first_update(run)
        run.checkpoint()
        run.drain()
        await anyio.lowlevel.checkpoint()
        await anyio.sleep(0.01)
        assert run.status().phase == "draining"
        step, last = run.status().step, virtual.run.config.schedule.max_staleness
        assert run.status().notice == (
            f"finishing steps {step + 1} to {step + 2}" if last else f"finishing step {step + 1}"
        )
        run.remind("Ctrl-C again stops now")
        assert run.status().notice.endswith("; Ctrl-C again stops now")

    virtual.go_through(body)
    assert 2 <= virtual.run.result.steps < STEPS
    assert virtual.ledger.written[0] < virtual.run.result.steps
    assert virtual.ledger.final == virtual.run.result.steps
    assert virtual.run.status().notice == "", "it has ended"


def test_a_stop_says_which_step_is_saved(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        await first_update(run)
        assert run.status().notice == ""
        run.stop()
        run.remind("Ctrl-C again leaves at once")
        assert run.status().notice == f"stopping, saving step {run.status().step}; Ctrl-C again leaves at once"

    virtual.go_through(body)


def test_the_status_names_every_live_group_and_who_has_it(tmp_path: Path) -> None:
    released = anyio.Event()

    async def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await released.wait()
        return await rate(completion_ids)

    async def body(run: Supervisor) -> None:
        await anyio.sleep(20)
        status = run.status()
        assert status.phase == "running"
        assert [group.gid for group in status.groups] == [0, 1, 2, 3]
        assert [group.owner for group in status.groups] == ["scorer"] * 4, "both steps are made with version 0"
        assert {group.slot.step for group in status.groups} == {0, 1}
        assert all(19 < group.age_s <= 20 for group in status.groups)
        assert not any(group.waiting for group in status.groups)
        assert "4 × score waits" in status.doing["scorer"]
        released.set()

    virtual = VirtualRun(tmp_path, waits)
    virtual.go_through(body)
    assert virtual.run.result.steps == STEPS


def test_a_run_in_which_nothing_moves_says_so_again_and_again_and_goes_on(tmp_path: Path) -> None:
    released = anyio.Event()
    told: list[Incident] = []

    async def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await released.wait()
        return await rate(completion_ids)

    async def body(run: Supervisor) -> None:
        await anyio.sleep(290)
        assert run.status().incidents == {"stalled": 2}
        released.set()

    virtual = VirtualRun(tmp_path, waits, watchdog_s=100.0, timeout_s=1000.0)
    see = virtual.ledger.see

    def listen(channel: str, message: object) -> None:
        if isinstance(message, Incident):
            told.append(message)
        see(channel, message)

    virtual.ledger.see = listen  # type: ignore[method-assign]
    virtual.go_through(body)
    assert virtual.run.result.incidents == {"stalled": 2}
    assert "nothing has moved for 100 s; the oldest group is 0 (step 0, place 0, attempt 0), with scorer" in (
        told[0].message
    )
    assert "nothing has moved for 200 s" in told[1].message


def test_the_watchdog_can_be_set_while_it_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = anyio.Event()

    async def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await released.wait()
        return await rate(completion_ids)

    async def at_once(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    async def body(run: Supervisor) -> None:
        for limit_s, until_s, stalls in ((0, 450, 0), (100.0, 790, 4), (0, 5000, 4)):
            run.set("schedule.watchdog_s", limit_s)
            await anyio.sleep(until_s - asyncio.get_running_loop().time())
            assert run.status().incidents.get("stalled", 0) == stalls
        released.set()

    monkeypatch.setattr(anyio.to_thread, "run_sync", at_once)  # a thread that writes a line would take no virtual time
    virtual = VirtualRun(tmp_path, waits, watchdog_s=100.0, timeout_s=1e5)
    virtual.go_through(body)
    assert virtual.run.result.incidents == {"stalled": 4}
    assert len(ChangesLog(virtual.run.folder).read()) == 3


def test_a_paused_run_is_not_stalled(tmp_path: Path) -> None:
    virtual = VirtualRun(tmp_path, watchdog_s=100.0)

    async def body(run: Supervisor) -> None:
        await anyio.sleep(1000)
        assert run.status().incidents == {}
        run.resume()

    virtual.go_through(body, before=virtual.run.pause)
    assert virtual.run.result.incidents == {}


def test_what_comes_before_the_first_prompt_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    virtual = VirtualRun(tmp_path, watchdog_s=100.0)

    async def long_start() -> None:
        await anyio.sleep(1000)

    monkeypatch.setattr(virtual.rewards, "start", long_start)

    async def body(run: Supervisor) -> None:
        await anyio.sleep(500)
        assert run.status().phase == "starting"
        await run.wait()

    virtual.go_through(body)
    assert virtual.run.result.incidents == {}


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_a_reward_is_exchanged_while_running(virtual: VirtualRun, when: str) -> None:
    scored: list[int] = []

    async def better(completion_ids: list[list[int]], **_: Any) -> list[float]:
        scored.append(len(completion_ids))
        return await rate(completion_ids)

    async def body(run: Supervisor) -> None:
        if when == "amid":
            await first_update(run)
            run.exchange_reward("rate", better)
        await run.wait()
        if when == "after":
            run.exchange_reward("rate", better)

    before: Callable[[], None] = lambda: virtual.run.exchange_reward("rate", better)  # noqa: E731
    virtual.go_through(body, before=before if when == "before" else lambda: None)
    assert virtual.run.result.closed_groups == {"trained": P * STEPS}
    assert (0 < len(scored) < P * STEPS) if when == "amid" else (len(scored) == (P * STEPS if when == "before" else 0))
    assert virtual.rewards.versions["rate"] == (when != "after")


def test_an_exchange_that_fails_is_an_incident(virtual: VirtualRun) -> None:
    async def body(run: Supervisor) -> None:
        run.exchange_reward("nobody", rate)
        await quiet()
        run.resume()

    virtual.go_through(body, before=virtual.run.pause)
    assert virtual.run.result.incidents == {"reward_exchange_failed": 1}
    assert virtual.run.result.steps == STEPS


def test_a_reward_that_is_down_holds_the_run_and_is_named(tmp_path: Path) -> None:
    up = False

    async def moody(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if not up:
            raise ConnectionError("no answer")
        return await rate(completion_ids)

    virtual = VirtualRun(tmp_path, moody, retries=0, breaker_failures=1)

    async def body(run: Supervisor) -> None:
        nonlocal up
        await anyio.sleep(100)
        status = run.status()
        assert status.phase == "held"
        assert "no answer" in status.rewards_down["moody"]
        assert "moody" in status.held[0]
        assert len(virtual.ledger.issued) <= 2 * P
        up = True

    virtual.go_through(body)
    assert virtual.run.result.steps == STEPS
    status = virtual.run.status()
    assert (status.phase, status.held, status.rewards_down) == ("ended", (), {})


def test_the_status_of_a_run_that_failed(virtual: VirtualRun) -> None:
    virtual.hooks.disk_fails = True

    async def body(run: Supervisor) -> None:
        await run.wait()
        assert run.status().phase == "failed"

    with pytest.raises(RunError, match="could not be written"):
        virtual.go_through(body)
    ask_everything(virtual.run)
    assert virtual.run.status().phase == "failed"


@pytest.mark.anyio
async def test_updates_need_a_run_that_was_entered(virtual: VirtualRun) -> None:
    with pytest.raises(RuntimeError, match="enter the supervisor"):
        await anext(virtual.run.updates())


@pytest.mark.anyio
async def test_requests_of_a_reward_wait_in_order() -> None:
    box = Mailbox("supervisor")
    channel = box.channel("exchanges", int, bound=2, overflow="drop_oldest")
    for number in range(3):
        channel.send_nowait(number)
    await wait_all_tasks_blocked()
    assert box.waiting == (1, 2)


def test_a_status_can_be_sent_as_json(virtual: VirtualRun) -> None:
    status = virtual.run.status()
    assert msgspec.json.decode(msgspec.json.encode(status), type=Status) == status
