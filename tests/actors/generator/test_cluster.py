"""Workers on the network as members of the crew, over a message server in memory and in virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import virtual_time
from tests.support.fake_bus import FakeBroker
from tests.support.fake_worker import (
    VOCABULARY,
    FakeWorker,
    G,
    completions,
    other_log_probs,
    other_tokens,
    text_of,
)
from troupe.actors.generator.audits import Audits
from troupe.actors.generator.checks import ResultLimits, bits_of
from troupe.actors.generator.cluster import _REMEMBERED, ClusterMembers
from troupe.actors.generator.cluster_wire import Terms
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.estimates import Estimates
from troupe.actors.generator.kin import Kinship, probe_part
from troupe.actors.generator.parts import Part, parts_of
from troupe.actors.generator.trust import Trust
from troupe.cluster.bus import HUB
from troupe.cluster.desk import Desk
from troupe.cluster.roster import Roster
from troupe.cluster.wire import Facts
from troupe.messages import Incident, Prompt, RolloutGroup, Slot
from troupe.policy import Weights
from troupe.runtime.board import PolicyBoard
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.reporter import Reporter

LIMITS = ResultLimits(
    vocab_size=VOCABULARY,
    num_generations=G,
    max_completion_length=8,
    context=64,
    stop_ids=frozenset({1}),
    has_stop_strings=False,
    acts=False,
    sets=((G, 8),),
)


def prompts_of(step: int, places: int) -> list[Prompt]:
    return [
        Prompt(
            gid=100 * step + place,
            slot=Slot(step=step, place=place),
            epoch=0,
            row=0,
            prompt="",
            prompt_ids=(5, 6),
            columns={},
            round_size=places,
        )
        for place in range(places)
    ]


class Hub:
    """The run's side, with a judge that is honest."""

    def __init__(
        self, broker: FakeBroker, *, pinned: bool = True, audit: float = 0.0, estimates: Estimates | None = None
    ) -> None:
        self.broker = broker
        self.told = Mailbox("told")
        self.report = Reporter("generator", self.told.channel("incidents", Incident, bound=10_000))
        self.got: dict[int, RolloutGroup] = {}
        self.times: Counter[int] = Counter()
        self.judged: list[str] = []
        self.desk = Desk(broker.run, self.report, clock=anyio.current_time)
        self.roster = Roster(self.desk, self.report, clock=anyio.current_time)
        kinship = Kinship(lambda version: probe_part(version, [[3, 4]], max_staleness=0), self, lambda: [0], Facts())
        self.members = ClusterMembers(
            self.desk,
            self.roster,
            limits=LIMITS,
            decode_text=text_of,
            terms=Terms(setup="setup"),
            versions=lambda: self.there,
            kinship=kinship if pinned else None,
            trust=Trust(self.desk, self.roster, audits=Audits(audit, judge=self), estimates=estimates),
            needs="a worker",
        )
        self.there = [0]
        """Versions that the message server holds."""
        self.roster.add(self.members)
        board: PolicyBoard[Weights] = PolicyBoard(0)
        board.publish(0, {})
        self.crew = Crew(self.take_over, board=board, report=self.report, pinned=pinned)

    async def take_over(self, group: RolloutGroup) -> None:
        self.got[group.prompt.gid] = group
        self.times[group.prompt.gid] += 1

    async def decode(self, part: Part) -> list[RolloutGroup]:
        self.judged.append(part.name)
        await anyio.sleep(1.0)
        return [completions(prompt, part.version or 0) for prompt in part.prompts]

    @property
    def incidents(self) -> Counter[str]:
        return Counter(incident.kind for incident in self.told.waiting)

    def submit(self, steps: int, *, places: int = 6, parts: int = 3) -> set[int]:
        gids = set()
        for step in range(steps):
            for part in parts_of(prompts_of(step, places), parts if self.crew.pinned else None, 0):
                self.crew.submit(part if self.crew.pinned else msgspec.structs.replace(part, version=None))
                gids |= {prompt.gid for prompt in part.prompts}
        return gids

    @asynccontextmanager
    async def open(self, workers: Sequence[FakeWorker]) -> AsyncIterator[None]:
        async with self.desk.open(self.broker.bus(HUB)), anyio.create_task_group() as tasks:
            tasks.start_soon(self.roster.watch)
            tasks.start_soon(self.members.run, self.crew)
            tasks.start_soon(self.crew.watch)
            for worker in workers:
                tasks.start_soon(worker.run)
            yield
            tasks.cancel_scope.cancel()

    async def until(self, holds: Callable[[], bool], limit_s: float = 2000.0) -> None:
        with anyio.fail_after(limit_s):
            while not holds():  # noqa: ASYNC110 - what holds has no event
                await anyio.sleep(0.25)

    def check(self, gids: set[int]) -> None:
        """Each group came once, and as it is."""
        assert set(self.got) == gids
        assert set(self.times.values()) == {1}
        assert all(bits_of([group]) == bits_of([completions(group.prompt, 0)]) for group in self.got.values())


def test_two_workers_share_the_parts_and_each_group_comes_once() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        workers = [FakeWorker(broker.bus(name), broker.run) for name in ("a", "b")]
        gids = hub.submit(4)
        async with hub.open(workers):
            await hub.until(lambda: len(hub.got) == len(gids))
            statuses = {status.name: status for status in hub.members.statuses()}
            hub.desk.over = True
            await hub.until(lambda: all(worker.why for worker in workers))
        hub.check(gids)
        assert [worker.why for worker in workers] == ["over", "over"]
        assert {len(worker.decoded) for worker in workers} == {len(gids) // 2}
        assert set(statuses) == {"a", "b"}
        assert {status.kind for status in statuses.values()} == {"worker"}
        assert hub.judged == ["0.1000000.0"], "one probe serves both"

    virtual_time.run(drive)


def test_what_a_silent_worker_had_goes_to_another_and_its_late_answer_changes_nothing() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        slow = FakeWorker(broker.bus("slow"), broker.run, seconds=lambda part: 5.0)
        gids = hub.submit(1, parts=1)
        async with hub.open([slow]):
            await hub.until(lambda: bool(slow.held))
            broker.cut.add("slow")
            other = FakeWorker(broker.bus("other"), broker.run, seconds=lambda part: 3.0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other.run)
                await hub.until(lambda: len(hub.got) == len(gids))
                assert hub.incidents["worker_lost"] == 1
                assert not slow.verdicts
                broker.cut.clear()
                await hub.until(lambda: bool(slow.verdicts))
                tasks.cancel_scope.cancel()
        hub.check(gids)
        assert set(slow.verdicts) == {"known"}
        assert set(other.verdicts) == {"taken"}

    virtual_time.run(drive)


def test_a_long_part_of_a_worker_is_not_forgotten_while_others_evaluate_many_rows() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        slow = FakeWorker(broker.bus("slow"), broker.run, seconds=lambda part: 3600.0)
        quick = FakeWorker(broker.bus("quick"), broker.run)
        gids = hub.submit(1, places=1, parts=1)
        async with hub.open([slow]):
            await hub.until(lambda: bool(slow.held))
            for number in range(_REMEMBERED // 512 + 1):
                prompts = [msgspec.structs.replace(p, gid=-1 - 512 * number - p.gid) for p in prompts_of(0, 512)]
                rows = Part(step=0, number=number, set=0, version=0, prompts=tuple(prompts))
                hub.crew.submit(rows)
                gids |= {prompt.gid for prompt in prompts}
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(quick.run)
                await hub.until(lambda: len(hub.got) == len(gids) - 1)
                await hub.until(lambda: bool(slow.verdicts or slow.why), 4000.0)
                tasks.cancel_scope.cancel()
        hub.check(gids)
        assert (slow.verdicts, slow.why) == (["taken"], "")

    virtual_time.run(drive)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), pinned=st.booleans())
def test_however_messages_are_lost_late_or_answered_twice_each_group_comes_once(seed: int, pinned: bool) -> None:
    async def drive() -> None:
        random = Random(seed)
        broker = FakeBroker()
        broker.lose_request = lambda subject: random.random() < 0.1
        broker.lose_reply = lambda subject: random.random() < 0.1
        broker.delay_s = lambda subject: random.choice([0.0, 0.01, 0.5, 4.0])
        hub = Hub(broker, pinned=pinned, audit=0.3)
        workers = [
            FakeWorker(
                broker.bus(name), broker.run, seconds=lambda part: random.uniform(0.1, 20.0), most=random.randint(1, 4)
            )
            for name in ("a", "b", "c")
        ]
        gids = hub.submit(4)

        async def cables() -> None:
            while True:
                await anyio.sleep(random.uniform(5.0, 40.0))
                name = random.choice("abc")
                broker.cut.add(name)
                await anyio.sleep(random.uniform(1.0, 40.0))
                broker.cut.discard(name)

        async with hub.open(workers), anyio.create_task_group() as tasks:
            tasks.start_soon(cables)
            await hub.until(lambda: len(hub.got) == len(gids), 50_000.0)
            tasks.cancel_scope.cancel()
        hub.check(gids)
        assert not hub.incidents["worker_put_out"]
        assert not hub.incidents["answers_differ"]

    virtual_time.run(drive)


def test_who_is_no_kin_is_refused_with_the_reason() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        worker = FakeWorker(broker.bus("other"), broker.run, kin=other_log_probs)
        hub.submit(1)
        async with hub.open([worker]):
            await hub.until(lambda: bool(worker.why))
            assert hub.members.needs == "a worker"
        assert "the bits of their log-probs are not" in worker.why
        assert not hub.got
        assert hub.incidents["worker_refused"] == 1
        assert [status.state for status in hub.members.statuses()] == ["refused"]

    virtual_time.run(drive)


@pytest.mark.parametrize("lie", [other_log_probs, other_tokens])
@pytest.mark.parametrize("alone", [True, False])
def test_a_liar_is_found_by_audits_and_nothing_of_its_part_is_used(
    lie: Callable[[RolloutGroup], RolloutGroup], alone: bool
) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker, audit=1.0)
        liar = FakeWorker(broker.bus("liar"), broker.run, answers=lie, kin=lambda group: group)
        honest = FakeWorker(broker.bus("honest"), broker.run, seconds=lambda part: 2.0)
        gids = hub.submit(2)
        async with hub.open([liar] if alone else [liar, honest]):
            await hub.until(lambda: bool(liar.why))
            if alone:
                assert not hub.got
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(honest.run)
                    await hub.until(lambda: len(hub.got) == len(gids))
                    tasks.cancel_scope.cancel()
            await hub.until(lambda: len(hub.got) == len(gids))
        hub.check(gids)
        assert "than the run's own generator makes" in liar.why
        assert not honest.why
        assert hub.incidents["worker_lied"] == 1
        assert hub.incidents["worker_put_out"] == 1

    virtual_time.run(drive)


def test_a_server_that_was_begun_anew_and_holds_no_weights_yet_makes_no_liar_of_a_worker() -> None:
    async def main() -> None:
        broker = FakeBroker()
        hub, worker = Hub(broker), FakeWorker(broker.bus("one"), broker.run)
        hub.crew.board.publish(2, {})
        for part in parts_of(prompts_of(0, 6), 3, 2):
            hub.crew.submit(part)
        hub.there = []
        async with hub.open([worker]):
            await hub.until(lambda: len(hub.got) == 6 or bool(worker.why), 60.0)
        assert not worker.why

    virtual_time.run(main)


def test_what_cannot_be_a_completion_puts_its_worker_out() -> None:
    def nan(group: RolloutGroup) -> RolloutGroup:
        first = group.rollouts[0]
        bad = msgspec.structs.replace(first, log_probs=(float("nan"), *first.log_probs[1:]))
        return msgspec.structs.replace(group, rollouts=(bad, *group.rollouts[1:]))

    def foreign_token(group: RolloutGroup) -> RolloutGroup:
        bad = msgspec.structs.replace(group.rollouts[0], token_ids=(VOCABULARY, *group.rollouts[0].token_ids[1:]))
        return msgspec.structs.replace(group, rollouts=(bad, *group.rollouts[1:]))

    def other_text(group: RolloutGroup) -> RolloutGroup:
        bad = msgspec.structs.replace(group.rollouts[0], text="reward me")
        return msgspec.structs.replace(group, rollouts=(bad, *group.rollouts[1:]))

    def other_version(group: RolloutGroup) -> RolloutGroup:
        bad = [msgspec.structs.replace(each, versions=(7,) * len(each.versions)) for each in group.rollouts]
        return msgspec.structs.replace(group, rollouts=tuple(bad))

    def cut_short(group: RolloutGroup) -> RolloutGroup:
        return msgspec.structs.replace(group, rollouts=group.rollouts[:-1])

    def unended(group: RolloutGroup) -> RolloutGroup:
        bad = msgspec.structs.replace(group.rollouts[0], finish_reason="length")
        return msgspec.structs.replace(group, rollouts=(bad, *group.rollouts[1:]))

    async def drive(lie: Callable[[RolloutGroup], RolloutGroup], says: str) -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        liar = FakeWorker(broker.bus("liar"), broker.run, answers=lie)
        hub.submit(1)
        async with hub.open([liar]):
            await hub.until(lambda: bool(liar.why))
        assert says in liar.why
        assert not hub.got
        assert hub.crew.queued == 3

    def experts(group: RolloutGroup) -> RolloutGroup:
        bad = msgspec.structs.replace(group.rollouts[0], experts=b"\xff")
        return msgspec.structs.replace(group, rollouts=(bad, *group.rollouts[1:]))

    for lie, says in (
        (experts, "names experts that are none"),
        (nan, "nan for a log-probability"),
        (foreign_token, "none of 50"),
        (other_text, "text is not that of its tokens"),
        (other_version, "not those of version 0"),
        (cut_short, "1 completions came"),
        (unended, "not ended as it says"),
    ):
        virtual_time.run(drive, lie, says)


def test_who_replays_or_claims_others_groups_or_sends_nonsense_is_put_out_and_others_go_on() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        honest = FakeWorker(broker.bus("honest"), broker.run, seconds=lambda part: 3.0)
        gids = hub.submit(2)
        replayer, flooder = (
            FakeWorker(broker.bus("replayer"), broker.run),
            FakeWorker(broker.bus("flooder"), broker.run),
        )

        async def replay() -> None:
            await replayer.hello()
            for _ in range(20):
                group = completions(prompts_of(0, 6)[0], 0)
                try:
                    await replayer.tell("0.0.0", other_tokens(group))
                except Exception as error:
                    replayer.why = str(error)

        async def flood() -> None:
            await flooder.hello()
            while "put out" not in flooder.why and "asks too much" not in flooder.why:
                answer = await flooder.bus.request(f"{broker.run}.hub.flooder.done", b"\xc1garbage", timeout_s=5.0)
                flooder.why = answer.decode(errors="replace")
                if "times it asked" in flooder.why:
                    return

        async with hub.open([honest]), anyio.create_task_group() as tasks:
            tasks.start_soon(replay)
            tasks.start_soon(flood)
            await hub.until(lambda: len(hub.got) == len(gids))
            await hub.until(lambda: hub.incidents["worker_put_out"] == 2)
        hub.check(gids)
        assert "which it was not asked for" in replayer.why
        assert "no message" in flooder.why
        assert not honest.why

    virtual_time.run(drive)


def test_a_worker_begun_again_waits_for_its_old_lease_and_one_that_says_goodbye_does_not() -> None:
    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker)
        first = FakeWorker(broker.bus("a"), broker.run, seconds=lambda part: 60.0)
        gids = hub.submit(1)
        async with hub.open([]):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(first.run)
                await hub.until(lambda: bool(first.held))
                tasks.cancel_scope.cancel()  # as by kill -9
            second = FakeWorker(broker.bus("a"), broker.run)
            async with anyio.create_task_group() as tasks:
                began_s = anyio.current_time()
                tasks.start_soon(second.run)
                await hub.until(lambda: len(hub.got) == len(gids))
                assert 10.0 < anyio.current_time() - began_s < 30.0
                tasks.cancel_scope.cancel()
        hub.check(gids)

    virtual_time.run(drive)


def test_where_bits_may_differ_a_worker_is_put_out_whose_log_probs_are_far_from_the_policys() -> None:
    async def log_probs(group: RolloutGroup) -> list[tuple[float, ...]]:
        return [rollout.log_probs for rollout in completions(group.prompt, 0).rollouts]

    def shifted(by: float) -> Callable[[RolloutGroup], RolloutGroup]:
        def lie(group: RolloutGroup) -> RolloutGroup:
            rollouts = []
            for rollout in group.rollouts:
                told = tuple(each - by for each in rollout.log_probs)
                rollouts.append(msgspec.structs.replace(rollout, log_probs=told, sampling_log_probs=told))
            return msgspec.structs.replace(group, rollouts=tuple(rollouts))

        return lie

    async def drive() -> None:
        broker = FakeBroker()
        hub = Hub(broker, pinned=False, estimates=Estimates(log_probs, share=1.0, bound=0.5))
        liar = FakeWorker(broker.bus("liar"), broker.run, answers=shifted(0.7), most=4)
        other = FakeWorker(broker.bus("other"), broker.run, answers=shifted(0.3), most=4)
        gids = hub.submit(40)
        async with hub.open([liar, other]):
            await hub.until(lambda: len(hub.got) == len(gids))
            assert [status.is_here for status in hub.members.statuses()] == [False, True]
        assert "differ from the policy's by 0.7 nats" in liar.why
        assert not other.why
        assert hub.incidents["worker_lied"] == 1

    virtual_time.run(drive)
