"""A worker's whole side, with a fake process of the generator, against the run's real desk: in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import anyio
import msgspec
import pytest
from anyio.abc import TaskGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.actors.generator.test_cluster import Hub
from tests.support import virtual_time
from tests.support.fake_bus import FakeBroker
from tests.support.fake_child import FakeMachine, InlineDevice
from tests.support.tiny import CONFIG
from troupe.actors.generator.wire import Setup
from troupe.cluster.blobs import digest_of, put_bytes
from troupe.cluster.bus import HUB
from troupe.cluster.link import DeclinedError, Link
from troupe.cluster.versions import VersionHead, version_subject
from troupe.cluster.wire import PULL_WAIT_S, Facts
from troupe.errors import RunError, TroupeError
from troupe.policy import GenerationConfig
from troupe.run.worker.generating import Generating
from troupe.run.worker.session import Worker
from troupe.run.worker.setup import Here, own_setup, read_setup
from troupe.runtime.frames import encode
from troupe.runtime.roles import decisive_fault

SETUP = Setup(
    name="generator",
    policy=CONFIG,
    generation=GenerationConfig(num_generations=2, max_completion_length=8),
    stop_ids=(1,),
    tokenizer="/nowhere",
    tokenizer_files={"tokenizer.json": b"{}"},
    seed=0,
    max_staleness=0,
    most_at_once=None,
    live=100,
    on_cpu=False,
)
WEIGHTS = b"weights of version 0"


class Machine(FakeMachine):
    """One worker, that is started and killed."""

    def __init__(self, broker: FakeBroker, name: str, folder: Path) -> None:
        super().__init__(folder / name, {0: WEIGHTS})
        self.broker, self.name = broker, name
        self.why = ""
        self.generating: Generating

    async def work(self) -> None:
        """A worker from its start until the run ends it; `why` says how."""
        bus = self.broker.bus(self.name)
        self.generating = Generating(
            bus,
            self.broker.run,
            Here(on_cpu=True),
            tell=self.said.append,
            start=self.start,
            folder=self.scratch,
            device=InlineDevice,
        )
        link = Link(bus, self.broker.run, tell=self.said.append)
        try:
            await Worker(link, [self.generating], Facts(), tell=self.said.append).run()
            self.why = "over"
        except (DeclinedError, TroupeError) as error:
            self.why = str(error)
        finally:
            assert not self.children, "its children end with it"
            assert not (self.folder / "scratch").exists()

    async def lives(self, lives_s: Callable[[], float]) -> None:
        """Worker after worker, each killed after a while unless the run has ended."""
        while not self.why:
            with anyio.move_on_after(lives_s()):
                await self.work()


async def publish(broker: FakeBroker, setup: Setup = SETUP) -> None:
    """What a hub stores for workers."""
    hub = broker.bus(HUB)
    await put_bytes(hub, "r1.w.setup", encode(setup))
    await put_bytes(hub, "r1.w.v0.full", WEIGHTS)
    head = VersionHead(version=0, digest=digest_of([WEIGHTS]), size=len(WEIGHTS))
    await hub.put(version_subject("r1", 0, "head"), encode(head))


@asynccontextmanager
async def run_of(
    broker: FakeBroker, *, pinned: bool = True, audit: float = 0.0
) -> AsyncIterator[tuple[Hub, TaskGroup]]:
    """A run's side, and tasks that end with it."""
    hub = Hub(broker, pinned=pinned, audit=audit)

    async def newest(worker: str, body: bytes) -> bytes:
        await anyio.sleep(PULL_WAIT_S)  # there is one version
        return body

    hub.desk.register("newest", newest)
    async with hub.open([]), anyio.create_task_group() as tasks:
        yield hub, tasks
        tasks.cancel_scope.cancel()


async def ended(hub: Hub, *machines: Machine) -> None:
    """The run ends, and all know it."""
    hub.desk.over = True
    await hub.until(lambda: all(machine.why for machine in machines))


@pytest.mark.parametrize("pinned", [True, False])
def test_workers_share_a_run_to_its_end(tmp_path: Path, pinned: bool) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machines = [Machine(broker, name, tmp_path) for name in "abc"]
        async with run_of(broker, pinned=pinned) as (hub, tasks):
            gids = hub.submit(6)
            tasks.start_soon(machines[0].work)  # before anything is there for it
            await anyio.sleep(7.0)
            await publish(broker, SETUP if pinned else msgspec.structs.replace(SETUP, most_at_once=4))
            for machine in machines[1:]:
                tasks.start_soon(machine.work)
            await hub.until(lambda: len(hub.got) == len(gids))
            await ended(hub, *machines)
        hub.check(gids)
        assert [machine.why for machine in machines] == ["over"] * 3
        assert all(len(machine.decoded) > 2 for machine in machines)

    virtual_time.run(drive)


def test_who_waits_for_a_name_that_another_has_hears_of_the_end(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machine, second = Machine(broker, "a", tmp_path / "1"), Machine(broker, "a", tmp_path / "2")
        async with run_of(broker) as (hub, tasks):
            await publish(broker)
            tasks.start_soon(machine.work)
            await hub.until(lambda: bool(hub.roster.everybody_here()))
            tasks.start_soon(second.work)
            await hub.until(lambda: any("not taken yet" in line for line in second.said))
            with anyio.fail_after(10.0):
                await hub.roster.say_over()
            await anyio.sleep(0.5)
            assert [machine.why, second.why] == ["over", "over"]

    virtual_time.run(drive)


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000))
def test_workers_and_their_children_are_killed_all_the_time_and_messages_are_lost(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    async def drive() -> None:
        random, broker = Random(seed), FakeBroker()
        broker.lose_request = lambda subject: random.random() < 0.05
        broker.lose_reply = lambda subject: random.random() < 0.05
        broker.delay_s = lambda subject: random.random() * 0.2
        folder = tmp_path_factory.mktemp("killed")
        machines = [Machine(broker, name, folder) for name in "abc"]
        async with run_of(broker, audit=0.2) as (hub, tasks):
            gids = hub.submit(8)
            await publish(broker)
            for machine in machines:
                machine.seconds = lambda part: random.random() * 5
                machine.dies = lambda part: random.random() < 0.1
                tasks.start_soon(machine.lives, lambda: random.expovariate(1 / 40))
            await hub.until(lambda: len(hub.got) == len(gids))
            await ended(hub, *machines)
        hub.check(gids)

    virtual_time.run(drive)


def test_a_new_server_and_a_new_hub_are_waited_for_and_joined_again(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machine = Machine(broker, "a", tmp_path)
        machine.weights[0] = WEIGHTS
        async with anyio.create_task_group() as tasks:
            async with run_of(broker) as (first, _):
                first.submit(4)
                await publish(broker)
                tasks.start_soon(machine.work)
                await first.until(lambda: len(first.got) > 5)
                broker.restart()
                await anyio.sleep(2.0)
            await anyio.sleep(60.0)  # nobody is there
            async with run_of(broker) as (second, _):
                gids = second.submit(4)
                await anyio.sleep(5.0)
                await publish(broker)
                await second.until(lambda: len(second.got) == len(gids))
                second.check(gids)
                await ended(second, machine)
        assert machine.why == "over"
        assert machine.started == 2, "what it had of the first hub is not of the second"
        away, back, anew = [said for said in machine.said if "answer" in said or "anew" in said]
        assert away == "the run does not answer (its server is there, the run itself is not); waiting for it"
        assert back.startswith("the run answers again")
        assert anew == "the run has begun anew; joining it again"

    virtual_time.run(drive)


def test_a_generator_that_never_does_anything_ends_the_worker_and_the_run_says_why(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machine = Machine(broker, "a", tmp_path)
        machine.dies = lambda part: part.attempt == 0  # not amid the probe
        async with run_of(broker, pinned=False) as (hub, tasks):
            hub.submit(1)
            await publish(broker, msgspec.structs.replace(SETUP, most_at_once=1))
            tasks.start_soon(machine.work)
            await hub.until(lambda: bool(machine.why))
        assert machine.why == (
            "the generator ended 3 times in a row with nothing done; the last time: it was killed by SIGKILL"
        )
        assert machine.started == 3

    virtual_time.run(drive)


def failure(work: Callable[[], Awaitable[None]]) -> Exception:
    """What a drive fails with."""
    try:
        virtual_time.run(work)
    except Exception as error:
        return decisive_fault(error)
    raise AssertionError("it went well")


def test_a_part_that_costs_every_child_ends_the_run(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machines = [Machine(broker, name, tmp_path) for name in "ab"]
        async with run_of(broker) as (hub, tasks):
            hub.submit(2)
            await publish(broker)
            for machine in machines:
                machine.dies = lambda part: part.name == "1.0.2"
                tasks.start_soon(machine.work)
            await anyio.sleep(2000.0)

    fault = failure(drive)
    assert isinstance(fault, RunError)
    assert "5 members in a row were lost" in str(fault)
    assert "part 1.0.2" in str(fault)


def test_who_is_no_kin_ends_with_the_reason(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machine = Machine(broker, "a", tmp_path)
        async with run_of(broker) as (hub, tasks):
            await publish(broker)
            machine.answers_as = lambda version: version + 1
            tasks.start_soon(machine.work)
            await hub.until(lambda: bool(machine.why))
        assert "only a worker may generate whose bits are the run's" in machine.why

    virtual_time.run(drive)


def test_a_revoked_key_ends_the_worker(tmp_path: Path) -> None:
    async def drive() -> None:
        broker = FakeBroker()
        machine = Machine(broker, "a", tmp_path)
        async with run_of(broker) as (hub, tasks):
            await publish(broker)
            hub.submit(3)
            tasks.start_soon(machine.work)
            await hub.until(lambda: len(hub.got) > 3)
            broker.revoked.add("a")
            await hub.until(lambda: bool(machine.why))
        assert "does not know this worker's key" in machine.why

    virtual_time.run(drive)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"tokenizer_files": {"../../.bashrc": b"x"}}, RunError, "may lead elsewhere"),
        ({"tokenizer_files": {}}, RunError, "no files of its tokenizer"),
    ],
)
def test_a_setup_that_asks_for_what_a_run_may_not_is_refused(
    changes: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        read_setup(encode(msgspec.structs.replace(SETUP, **changes)))


def test_a_setup_gets_what_is_this_machines_own() -> None:
    made = own_setup(read_setup(encode(SETUP)), "w", Here(on_cpu=True, limit_gb=3.0))
    assert (made.name, made.on_cpu, made.limit_gb) == ("w", True, 3.0)
    assert made.blas_threads == SETUP.blas_threads
