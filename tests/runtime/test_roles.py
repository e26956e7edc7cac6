from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any, ClassVar, NoReturn

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked

from troupe.errors import InputError, RunError
from troupe.messages import Incident
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import Restarts, Role, finishing, first_fault, run_roles

pytestmark = pytest.mark.anyio


class Relay(Actor):
    """Passes numbers on; breaks at 13."""

    name: ClassVar[str] = "relay"

    def __init__(self, inbox: Mailbox, out: Channel[int]) -> None:
        super().__init__(inbox, [out])
        self.out = out
        self.stopped = False

    async def handle(self, message: int) -> None:
        if message == 13:
            raise ValueError("13 is refused") from OSError("no luck")
        await self.out.send(message)

    async def stop(self) -> None:
        self.stopped = True


def chain(length: int) -> tuple[Channel[int], list[Relay], Mailbox]:
    boxes = [Mailbox(f"box {i}") for i in range(length + 1)]
    channels = [box.channel("numbers", int, bound=1) for box in boxes]
    return channels[0], [Relay(boxes[i], channels[i + 1]) for i in range(length)], boxes[-1]


async def test_the_end_travels_down_the_run() -> None:
    first, relays, last = chain(3)
    got: list[int] = []

    async def read() -> None:
        got.extend([number async for number in last])

    async with anyio.create_task_group() as group:
        group.start_soon(run_roles, list(reversed(relays)))  # the order of starting does not matter
        group.start_soon(read)
        for number in range(5):
            await first.send(number)
        first.close()
    assert got == [0, 1, 2, 3, 4]
    assert all(relay.stopped for relay in relays)


async def test_a_fault_cancels_the_others_and_is_raised_as_itself_with_its_cause() -> None:
    first, relays, _ = chain(3)
    first.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused") as caught:
        await run_roles(relays)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value.__cause__) == "no luck"
    assert all(relay.stopped for relay in relays)
    assert not relays[-1].out.closed


async def test_a_cancelled_run_ends_without_a_fault() -> None:
    _, relays, _ = chain(2)
    async with anyio.create_task_group() as group:
        group.start_soon(run_roles, relays)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert all(relay.stopped for relay in relays)


class LastWords(Actor):
    """Sends a number when it has been cancelled, and some time after it."""

    name: ClassVar[str] = "last words"

    def __init__(self, out: Channel[int]) -> None:
        super().__init__(Mailbox("silence"), [out])
        self.inbox.channel("never closed", int, bound=1)
        self.out = out

    async def handle(self, message: int) -> None:
        raise AssertionError("nobody writes")

    async def stop(self) -> None:
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        await self.out.send(7)


class Listener(Actor):
    """Keeps what it is told."""

    name: ClassVar[str] = "listener"
    leaves_last: ClassVar[bool] = True

    def __init__(self, inbox: Mailbox) -> None:
        super().__init__(inbox)
        self.heard: list[int] = []

    async def handle(self, message: int) -> None:
        if message == 13:
            raise ValueError("13 is refused")
        self.heard.append(message)


def talkers() -> tuple[LastWords, Listener, Channel[int]]:
    box = Mailbox("listener")
    out, other = box.channel("numbers", int, bound=3), box.channel("others", int, bound=3)
    return LastWords(out), Listener(box), other


async def test_who_leaves_last_hears_what_the_others_say_when_they_are_cancelled() -> None:
    speaker, listener, _ = talkers()
    async with anyio.create_task_group() as group:
        group.start_soon(run_roles, [listener, speaker])
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert listener.heard == [7]


async def test_who_leaves_last_hears_what_the_others_say_after_a_fault() -> None:
    speaker, listener, _ = talkers()
    first, relays, _ = chain(1)
    first.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused"):
        await run_roles([speaker, listener, *relays])
    assert listener.heard == [7]


async def test_a_fault_of_who_leaves_last_ends_the_run_too() -> None:
    speaker, listener, other = talkers()
    other.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused"):
        await run_roles([speaker, listener])
    assert listener.inbox.channels[0].stats().sent == 1, "the speaker was stopped"


async def test_who_leaves_last_ends_by_itself_when_all_is_said() -> None:
    box = Mailbox("listener")
    listener, numbers = Listener(box), box.channel("numbers", int, bound=3)
    relay_box = Mailbox("relay")
    first = relay_box.channel("numbers", int, bound=3)
    for number in (1, 2):
        first.send_nowait(number)
    first.close()
    await run_roles([listener, Relay(relay_box, numbers)])
    assert listener.heard == [1, 2]


async def test_first_fault_looks_through_groups_and_past_cancellations() -> None:
    cancelled = anyio.get_cancelled_exc_class()
    inner, outer = KeyError("inner"), ValueError("outer")
    tree = BaseExceptionGroup("", [cancelled(), BaseExceptionGroup("", [cancelled(), inner]), outer])
    assert first_fault(tree) is inner
    alone = cancelled()
    assert first_fault(BaseExceptionGroup("", [alone])) is alone


class Pauses:
    """Restarts on a clock that only moves when somebody sleeps."""

    def __init__(self, jitter: float = 1.0) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self.restarts = Restarts(clock=lambda: self.now_s, sleep=self._sleep, jitter=lambda: jitter)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await anyio.lowlevel.checkpoint()


class Failing(Actor):
    """Passes numbers on, each in a task of its own where `late`; fails where its plan says so, as often as it says."""

    name: ClassVar[str] = "failing"

    def __init__(
        self, inbox: Mailbox, out: Channel[int], report: Reporter, plan: Counter[str], *, late: bool, error: Exception
    ) -> None:
        super().__init__(inbox, [out], report)
        self.out, self.plan, self.late, self.error = out, plan, late, error
        self.acknowledges = late  # type: ignore[misc]

    def perhaps(self, where: str) -> None:
        if self.plan[where]:
            self.plan[where] -= 1
            raise self.error

    async def start(self) -> None:
        self.perhaps("start")

    async def handle(self, message: int) -> None:
        self.perhaps(f"handle {message}")
        if self.late:
            self.tasks.start_soon(self.pass_on, message)
        else:
            await self.out.send(message)

    async def pass_on(self, message: int) -> None:
        for _ in range(5 if message % 2 else 1):  # later ones overtake earlier ones
            await anyio.lowlevel.checkpoint()
        self.perhaps(f"task {message}")
        await self.out.send(message)
        self.inbox.done(message)

    async def finish(self) -> None:
        self.perhaps("finish")

    async def stop(self) -> None:
        self.perhaps("stop")


class Failures:
    """A role that fails by plan, four numbers for it, and what came of them."""

    def __init__(self, plan: dict[str, int], *, late: bool = False, error: Exception | None = None) -> None:
        inbox, reports = Mailbox("failing"), Mailbox("reports")
        self.out_box, self.reports = Mailbox("out"), reports
        numbers = inbox.channel("numbers", int, bound=9)
        for number in range(4):
            numbers.send_nowait(number)
        numbers.close()
        out = self.out_box.channel("out", int, bound=9)
        report = Reporter("failing", reports.channel("incidents", Incident, bound=9))
        planned = Counter(plan)
        error = error or OSError("no luck")
        self.role = Role(lambda: Failing(inbox, out, report, planned, late=late, error=error))
        self.pauses = Pauses()

    async def run(self) -> list[int]:
        await run_roles([self.role], self.pauses.restarts)
        return [number async for number in self.out_box]

    async def incidents(self) -> list[Incident]:
        return [incident async for incident in self.reports]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", ["start", "handle 0", "handle 2", "handle 3", "finish"])
async def test_a_new_actor_goes_on_with_what_the_failed_one_had_in_hand(where: str, late: bool) -> None:
    failures = Failures({where: 2}, late=late)
    assert sorted(await failures.run()) == [0, 1, 2, 3]
    assert failures.role.restarts == 2
    incidents = await failures.incidents()
    assert [(i.actor, i.kind) for i in incidents] == [("failing", "actor_restarted")] * 2
    assert "failing failed: OSError: no luck (test_roles.py:" in incidents[0].message
    assert "takes over in 0.1 s (restart 1)" in incidents[0].message
    assert failures.pauses.slept == [0.1, 0.2]


@pytest.mark.parametrize("number", range(4))
async def test_work_that_goes_on_in_tasks_is_given_to_the_new_actor_in_order(number: int) -> None:
    failures = Failures({f"task {number}": 1}, late=True)
    assert sorted(await failures.run()) == [0, 1, 2, 3]
    assert failures.role.restarts == 1


async def test_one_failure_more_than_the_limit_within_the_window_ends_the_run() -> None:
    failures = Failures({"handle 1": 99})
    with pytest.raises(RunError, match=r"failing failed: OSError: no luck .* restarted 3 times within 60 s") as caught:
        await failures.run()
    assert isinstance(caught.value.__cause__, OSError)
    assert failures.pauses.slept == [0.1, 0.2, 0.4]
    assert not failures.out_box.channels[0].closed, "nobody takes a fault for a regular end"


async def test_failures_that_lie_further_apart_than_the_window_do_not_add_up() -> None:
    failures = Failures({"handle 1": 9})
    restarts = failures.pauses.restarts

    async def long_sleep(seconds: float) -> None:
        failures.pauses.slept.append(seconds)
        failures.pauses.now_s += 25.0

    slow = Restarts(clock=restarts.clock, sleep=long_sleep, jitter=restarts.jitter)
    await run_roles([failures.role], slow)
    assert failures.role.restarts == 9
    assert failures.pauses.slept == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])


async def test_an_actor_that_fails_again_and_again_over_the_same_message_ends_the_run() -> None:
    failures = Failures({"handle 1": 19 + 1, "handle 0": 19})

    async def long_sleep(_: float) -> None:
        failures.pauses.now_s += 3600.0

    restarts = Restarts(clock=lambda: failures.pauses.now_s, sleep=long_sleep)
    with pytest.raises(RunError, match="failed 20 times in a row without being done with a single message"):
        await run_roles([failures.role], restarts)
    assert failures.role.restarts == 19 + 19, "message 0 was done with in between, so counting began anew"


class Heavy:
    """Stands for weights."""


class Holding(Actor):
    """Fails over its first message with something heavy in hand."""

    name: ClassVar[str] = "holding"

    def __init__(self, inbox: Mailbox, heavy: list[weakref.ref[Heavy]]) -> None:
        super().__init__(inbox)
        self.heavy = heavy

    async def handle(self, message: int) -> None:
        weights = Heavy()
        self.heavy.append(weakref.ref(weights))
        if len(self.heavy) == 1:
            raise OSError("no luck")
        gc.collect()
        assert self.heavy[0]() is None, "the traceback of the fault before was kept"


async def test_what_a_failed_actor_had_is_let_go_of_when_the_next_one_runs() -> None:
    inbox = Mailbox("holding")
    numbers = inbox.channel("numbers", int, bound=1)
    numbers.send_nowait(1)
    numbers.close()
    heavy: list[weakref.ref[Heavy]] = []
    await run_roles([Role(lambda: Holding(inbox, heavy))], Pauses().restarts)
    assert len(heavy) == 2


def test_pauses_double_up_to_a_limit_and_are_spread_over_the_upper_half() -> None:
    whole, half = Restarts(jitter=lambda: 1.0), Restarts(jitter=lambda: 0.0)
    assert [whole.pause_s(n) for n in (1, 2, 3, 8)] == pytest.approx([0.1, 0.2, 0.4, 10.0])
    assert half.pause_s(3) == pytest.approx(0.2)
    assert 0.05 <= Restarts().pause_s(1) <= 0.1


@pytest.mark.parametrize("error", [InputError("bad row"), RunError("no way")])
async def test_a_troupe_error_is_final_at_once(error: Exception) -> None:
    failures = Failures({"handle 1": 1}, error=error)
    with pytest.raises(type(error), match=str(error)):
        await failures.run()
    assert failures.role.restarts == 0


async def test_a_role_that_may_not_be_restarted_fails_as_itself() -> None:
    failures = Failures({"handle 1": 1})
    failures.role.restartable = False
    with pytest.raises(OSError, match="no luck"):
        await failures.run()


@pytest.mark.parametrize("late", [False, True])
async def test_a_fault_at_the_stop_of_an_actor_that_ended_well_is_an_incident(late: bool) -> None:
    failures = Failures({"stop": 1}, late=late)
    assert sorted(await failures.run()) == [0, 1, 2, 3]
    [incident] = await failures.incidents()
    assert (incident.kind, failures.role.restarts) == ("stop_failed", 0)
    assert "failing failed when it stopped: OSError: no luck" in incident.message


async def test_a_fault_at_the_stop_of_an_actor_that_failed_hides_nothing() -> None:
    failures = Failures({"handle 2": 1, "stop": 1})
    assert await failures.run() == [0, 1, 2, 3]
    assert [incident.kind for incident in await failures.incidents()] == ["stop_failed", "actor_restarted"]


async def test_a_new_actor_that_cannot_be_made_counts_as_a_failure() -> None:
    failures = Failures({"handle 1": 1})
    first = failures.role.actor

    def refuse() -> NoReturn:
        raise OSError("no thread")

    failures.role._make = refuse
    with pytest.raises(RunError, match="no thread"):
        await failures.run()
    assert failures.role.restarts == 3
    assert failures.role.actor is first


async def test_a_run_can_be_cancelled_amid_the_pause_before_a_restart() -> None:
    failures = Failures({"handle 1": 1})
    restarts = Restarts(sleep=lambda seconds: anyio.sleep_forever())
    async with anyio.create_task_group() as group:
        group.start_soon(run_roles, [failures.role], restarts)
        await wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert failures.out_box.waiting == (0,)


async def test_who_leaves_last_is_restarted_too_and_hears_the_rest_when_a_run_is_cut_short() -> None:
    speaker, listener, other = talkers()
    heard: list[int] = []

    class Careful(Listener):
        async def handle(self, message: int) -> None:
            if message == 13 and not heard:
                heard.append(-1)
                raise ValueError("13 is refused once")
            heard.append(message)

    role = Role(lambda: Careful(listener.inbox))
    first, relays, _ = chain(1)
    other.send_nowait(13)
    first.send_nowait(13)
    with pytest.raises(ValueError, match="13 is refused"):
        await run_roles([*relays, speaker, role], Pauses().restarts)
    assert heard == [-1, 13, 7]


async def test_receivers_are_started_before_senders() -> None:
    begun: list[Any] = []

    class Noted(Relay):
        async def start(self) -> None:
            begun.append(self.inbox.name)

    first, relays, _ = chain(3)
    first.close()
    await run_roles([Noted(relay.inbox, relay.out) for relay in relays])
    assert begun == ["box 2", "box 1", "box 0"]


@pytest.mark.parametrize("stopped", [False, True])
async def test_work_that_is_to_be_finished_may_be_stopped_only_by_its_limit(stopped: bool) -> None:
    began, go_on = anyio.Event(), anyio.Event()
    ended = ""

    async def work() -> None:
        nonlocal ended
        try:
            async with finishing(0.0 if stopped else 60.0):
                began.set()
                await go_on.wait()
                ended = "well"
        finally:
            ended = ended or "late"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await began.wait()
        tasks.cancel_scope.cancel()
        if not stopped:
            go_on.set()
    assert ended == ("late" if stopped else "well")
