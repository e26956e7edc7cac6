"""The daemon with trainers that are none, in virtual time: what it starts, when, what it answers, how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.daemon.control.test_protocol import STATUS
from tests.support.virtual_time import VirtualTimeLoop
from troupe.daemon.attempts import Attempts
from troupe.daemon.control.place import Peer
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.daemon import Daemon
from troupe.daemon.logs import LOGGER
from troupe.daemon.orders import Order
from troupe.daemon.trainer import frames
from troupe.daemon.trainer.frames import (
    Answer,
    Ask,
    Begin,
    Failed,
    Finished,
    Happened,
    Rejected,
    Started,
    Stepped,
    ToDaemon,
)
from troupe.daemon.trainer.link import Child
from troupe.messages import (
    Activity,
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    Incident,
    Pause,
    Refused,
    Reload,
    Resume,
    Set,
    Status,
    Step,
    Stop,
)
from troupe.run.daemon_settings import DaemonConfig
from troupe.runtime.frames import encode
from troupe.runtime.guardian import SILENT
from troupe.runtime.process import ChildEnded

pytestmark = pytest.mark.anyio

ME = Peer(uid=501, pid=7)
TOTAL = 10
LATE = Incident(actor="scorer", kind="reward_error", message="the judge is late")


async def settled() -> None:
    """Everything that can go on without time passing has."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


class FakeChild:
    """A trainer's process that says what the test has it say, and answers requests."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.begin: Begin | None = None
        self.asked: list[Request] = []
        self.killed = self.closed = False
        self.deaf = False
        self.status = STATUS
        self._send, self._frames = anyio.create_memory_object_stream[bytes | BaseException](100)

    async def send(self, frame: bytes) -> None:
        message = frames.decode_in_trainer(frame)
        if isinstance(message, Begin):
            self.begin = message
            return
        self.asked.append(message.request)
        if not self.deaf:
            reply: Reply = self.status if isinstance(message.request, GetStatus) else Done(message="heard")
            if isinstance(message.request, Set) and message.request.key != "learner.lr":
                reply = Refused(message="cannot change while a run is live")
            self.tell(Answer(number=message.number, reply=reply))

    async def receive(self) -> bytes:
        frame = await self._frames.receive()
        if isinstance(frame, BaseException):
            raise frame
        return frame

    def tell(self, message: ToDaemon) -> None:
        self._send.send_nowait(encode(message))

    def die(self, message: str = "the process ended by SIGKILL; its last lines:\n  one\n  two") -> None:
        self._send.send_nowait(ChildEnded(message))

    def garble(self) -> None:
        self._send.send_nowait(b"\xc1")

    def start(self, step: int = 0, *, speaks: bool = False) -> None:
        self.tell(Started(notices=("a notice",), step=step, total_steps=TOTAL, speaks=speaks))

    def step(self, step: int, **incidents: int) -> None:
        self.tell(Stepped(step=step, total_steps=TOTAL, metrics={"reward": 0.25}, incidents=incidents))

    def kill(self) -> None:
        self.killed = True
        self.die()

    async def aclose(self, grace_s: float | None = None) -> None:
        self.closed = True
        self._send.close()
        self._frames.close()


class Harness:
    """A daemon, its children and the exit code that it comes to, in virtual time."""

    def __init__(
        self, folder: Path, *, spawn_takes_s: float = 0.0, spawn_fails: int = 0, signals: bool = False, **config: Any
    ) -> None:
        self.run_toml = folder / "RUN.toml"
        self.output = folder / "out"
        self.output.mkdir()
        self.run_toml.write_text('output = "out"\n[learner]\nlr = 1e-6\n')
        self.children: list[FakeChild] = []
        self.spawned_s: list[float] = []
        self.spawn_takes_s = spawn_takes_s
        self._spawn_fails = spawn_fails
        self._signals = signals
        order = Order.given(self.run_toml, str(self.output), ["learner.beta=0.5"], ["learner.beta"])
        limits, clock = DaemonConfig(**config), anyio.current_time
        attempts = Attempts(limits, clock=clock, jitter=lambda low, high: 1.0)
        self.daemon = Daemon(order, limits, self._spawn, attempts=attempts, clock=clock)
        self._code: int | None = None

    async def __aenter__(self) -> Harness:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._over = anyio.Event()
        self._tasks.start_soon(self._run)
        if self._signals:
            self._tasks.start_soon(self.daemon.obey_signals)
        await settled()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        assert all(child.closed for child in self.children)

    async def _run(self) -> None:
        self._code = await self.daemon.run()
        self._over.set()

    async def _spawn(self) -> Child:
        await anyio.sleep(self.spawn_takes_s)
        if self._spawn_fails:
            self._spawn_fails -= 1
            raise OSError(11, "Resource temporarily unavailable")
        self.spawned_s.append(anyio.current_time())
        self.children.append(FakeChild(100 + len(self.children)))
        return self.children[-1]

    async def ended(self) -> int | None:
        """The exit code, as soon as there is one."""
        with anyio.fail_after(10_000):
            await self._over.wait()
        return self._code

    @property
    def child(self) -> FakeChild:
        return self.children[-1]

    async def ask(self, request: Request) -> Reply:
        return await self.daemon.answer(request, ME)

    async def message(self, request: Request, kind: type[Done | Refused]) -> str:
        """That of the reply, which is of this kind."""
        reply = await self.ask(request)
        assert isinstance(reply, kind), reply
        return reply.message

    async def status(self) -> Status:
        status = await self.ask(GetStatus())
        assert isinstance(status, Status)
        return status


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    """A daemon whose first child is there; parameters are those of `Harness`."""
    async with Harness(tmp_path, **getattr(request, "param", {})) as harness:
        yield harness


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    level = LOGGER.level
    with caplog.at_level(logging.DEBUG, LOGGER.name):
        yield caplog
    LOGGER.setLevel(level)


async def test_a_run_that_is_complete_ends_the_daemon(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    harness.child.start()
    harness.child.step(1)
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert harness.child.begin == Begin(
        run_toml=str(harness.run_toml),
        output=str(harness.output),
        settings=("learner.beta=0.5",),
        allow_changes=("learner.beta",),
    )
    assert [record.message for record in log.get_records("setup")] == ["trainer started (pid 100)"]
    for line in ("note: a notice", "step 1 of 10, reward 0.25", "complete: 10 of 10"):
        assert line in log.text


async def test_what_cannot_be_used_is_not_tried_again(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    harness.child.tell(Rejected(message="RUN.toml: learner.lr is -1"))
    assert await harness.ended() == 2
    assert len(harness.children) == 1
    assert "learner.lr is -1" in log.text


async def test_what_could_be_used_before_is_tried_again(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    """A full disk, or somebody else who has the folder for a moment, must not end a run of weeks."""

    harness.child.start()
    harness.child.die()
    await anyio.sleep(2)
    harness.child.tell(Rejected(message="another run is writing in this folder"))
    await anyio.sleep(3)
    assert len(harness.children) == 3
    harness.child.start()
    harness.child.tell(Rejected(message="the reward broke its contract"))
    assert await harness.ended() == 2
    assert len(harness.children) == 3
    assert "another run is writing" in log.text


async def test_a_trainer_that_dies_is_followed_by_another_which_goes_on_by_the_stored_config(harness: Harness) -> None:
    harness.child.start()
    (harness.output / "run.toml").write_text("")
    harness.child.step(3)
    harness.child.die()
    await anyio.sleep(5)
    harness.child.start(2)
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert harness.spawned_s == [0.0, 1.0]
    assert harness.child.begin == Begin(run_toml=str(harness.output / "run.toml"), output=str(harness.output))


async def test_a_trainer_that_dies_while_it_is_loading_is_given_the_order_again(harness: Harness) -> None:
    harness.child.die()
    await anyio.sleep(5)
    harness.child.tell(Finished(steps=0, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert harness.children[0].begin == harness.children[1].begin


GIVEN_UP = "given up: 3 failures without a new step (daemon.restarts is 2)"


@pytest.mark.parametrize("harness", [{"restarts": 2}], indirect=True)
@pytest.mark.parametrize("way", ["dies", "fails", "garbles"])
async def test_it_gives_up_when_all_tries_are_in_vain(
    harness: Harness, log: pytest.LogCaptureFixture, way: str
) -> None:
    for _ in range(3):
        child = harness.child
        child.start(1)
        child.step(1)
        if way == "dies":
            child.die()
        elif way == "fails":
            child.tell(Failed(message="the process ended by SIGKILL"))
        else:
            child.garble()
        await anyio.sleep(2.0 ** len(harness.children) - 0.5)
    assert await harness.ended() == 3
    assert harness.spawned_s == [0.0, 1.0, 3.5], "it failed half a second after it was started"
    assert GIVEN_UP in log.text


@pytest.mark.parametrize("harness", [{"restarts": 2, "spawn_fails": 3}], indirect=True)
async def test_it_gives_up_where_no_process_can_be_started(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    assert await harness.ended() == 3
    assert harness.children == []
    assert GIVEN_UP in log.text


@pytest.mark.parametrize("harness", [{"restarts": 1}], indirect=True)
async def test_a_new_step_forgets_failures(harness: Harness) -> None:
    for step in range(5):
        harness.child.start(step)
        harness.child.step(step + 1)
        harness.child.die()
        await anyio.sleep(1.5)
    harness.child.tell(Finished(steps=5, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert len(harness.children) == 6


async def test_the_status_at_any_time(harness: Harness) -> None:
    status = await harness.status()
    assert (status.phase, status.step, status.restarting) == ("restarting", 3, None), "what the trainer says"
    harness.child.start()
    harness.child.step(4, reward_error=1)
    await settled()
    harness.child.die()
    await anyio.sleep(0.25)
    status = await harness.status()
    assert (status.phase, status.step, status.total_steps) == ("restarting", 4, TOTAL)
    assert (status.groups, status.doing, status.metrics) == ((), {}, {"reward": 0.25})
    failure = status.restarting
    assert failure is not None
    assert (failure.attempt, failure.limit, failure.next_try_s) == (1, 5, 0.75)
    assert failure.reason == "the process ended by SIGKILL: two"
    harness.spawn_takes_s = 5.0
    await anyio.sleep(1)
    status = await harness.status()
    assert (status.phase, status.restarting and status.restarting.next_try_s) == ("starting", 0.0)
    await anyio.sleep(6)
    loading = Activity(what="loading the model and the prompts")
    harness.child.status = msgspec.structs.replace(STATUS, phase="starting", step=0, total_steps=0, activity=loading)
    status = await harness.status()
    assert status.activity == loading
    assert (status.phase, status.step, status.total_steps) == ("starting", 4, TOTAL), "it has not loaded yet"
    assert status.restarting is not None
    harness.child.start(2)
    harness.child.step(3)
    await settled()
    harness.child.status = STATUS
    assert (await harness.status()).restarting is not None, "made before"
    harness.child.step(5)
    await settled()
    assert (await harness.status()).restarting is None
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0


async def test_a_trainer_that_does_not_answer_is_answered_for(harness: Harness) -> None:
    harness.child.start(2)
    harness.child.deaf = True
    status = await harness.status()
    assert (status.step, status.doing) == (2, {"trainer": "has not answered for 5 s"})
    assert "has not answered yet" in await harness.message(Checkpoint(), Done)
    assert anyio.current_time() == 10.0
    harness.child.tell(Answer(number=0, reply=Done()))  # too late: nobody waits for it
    harness.child.tell(Finished(steps=3, total_steps=TOTAL))
    assert await harness.ended() == 0


async def test_a_trainer_that_dies_before_it_answers(harness: Harness) -> None:
    harness.child.deaf = True
    replies: list[Reply] = []

    async def ask(request: Request) -> None:
        replies.append(await harness.ask(request))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, Checkpoint())
        tasks.start_soon(ask, GetStatus())
        await settled()
        harness.child.die()
    assert Refused(message="the trainer ended before it answered; ask again") in replies
    assert any(isinstance(reply, Status) and "has just ended" in reply.doing["trainer"] for reply in replies)
    await harness.ask(Drain())
    assert await harness.ended() == 0


async def test_requests_go_to_the_trainer(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    requests: list[Request] = [Pause(), Step(steps=2), Resume(), Checkpoint(), Set(key="learner.lr", value=1), Stop()]

    harness.child.start()
    for request in requests:
        assert await harness.ask(request) == Done(message="heard")
    harness.child.tell(Finished(steps=1, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert harness.child.asked == requests
    assert "user 501 (pid 7) asks: Step(steps=2)" in log.text
    assert "ended after 1 of 10 steps; the same command goes on with it" in log.text


async def test_a_pause_outlives_the_trainer(harness: Harness) -> None:
    harness.child.start()
    await harness.ask(Pause())
    harness.child.die()
    await anyio.sleep(2)
    assert harness.child.begin is not None
    assert harness.child.begin.paused
    harness.child.die()
    await settled()
    resumed = await harness.ask(Resume())
    assert resumed == Done(message="no trainer is there; the next one will begin steps")
    paused = await harness.ask(Pause())
    assert paused == Done(message="no trainer is there; the next one will begin no step until told to resume")
    await harness.ask(Resume())
    await anyio.sleep(3)
    last: Begin | None = harness.children[-1].begin
    assert last is not None
    assert not last.paused
    harness.child.tell(Finished(steps=1, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert len(harness.children) == 3


@pytest.mark.parametrize("request_", [Step(), Checkpoint(), Set(key="learner.lr", value=1)], ids=repr)
async def test_what_nobody_is_there_for_is_refused(harness: Harness, request_: Request) -> None:
    harness.child.die()
    await settled()
    assert await harness.ask(request_) == Refused(
        message="no trainer is there to heed this, the next one starts in 1 s; ask again then"
    )
    harness.spawn_takes_s = 5.0
    await anyio.sleep(2)
    assert "it is being started" in await harness.message(request_, Refused)
    await anyio.sleep(10)
    harness.child.tell(Finished(steps=1, total_steps=TOTAL))
    assert await harness.ended() == 0


@pytest.mark.parametrize("request_", [Drain(), Stop()], ids=repr)
async def test_the_end_may_be_asked_for_while_nobody_is_there(harness: Harness, request_: Request) -> None:
    harness.child.die()
    await settled()
    assert "the daemon ends" in await harness.message(request_, Done)
    assert await harness.ended() == 0
    assert len(harness.children) == 1


@pytest.mark.parametrize("harness", [{"spawn_takes_s": 1.0}], indirect=True)
async def test_the_end_may_be_asked_for_while_the_process_starts(harness: Harness) -> None:
    await harness.ask(Stop())
    await harness.ask(Drain())  # asks for less, and changes nothing
    await anyio.sleep(2)
    assert harness.child.asked == [Stop()]
    harness.child.tell(Finished(steps=0, total_steps=TOTAL))
    assert await harness.ended() == 0


async def test_a_failure_on_the_way_to_the_end_is_told_and_not_mended(harness: Harness) -> None:
    harness.child.start()
    await harness.ask(Drain())
    harness.child.die()
    assert await harness.ended() == 3
    assert len(harness.children) == 1


async def test_a_trainer_that_dies_on_the_way_to_the_end_before_it_runs_is_no_failure(harness: Harness) -> None:
    """Where a whole control group is told to end, its handlers may not be there yet."""

    with anyio.move_on_after(1):
        await harness.ask(Drain())
    harness.child.die()
    assert await harness.ended() == 0
    assert len(harness.children) == 1


async def test_the_log_level_is_the_daemons_own(harness: Harness) -> None:
    assert await harness.ask(Set(key="log.level", value="warning")) == Done(message="log.level is now warning")
    assert LOGGER.level == logging.WARNING
    levels: list[Any] = ["loud", 3, [], None]
    for level in levels:
        assert "give one of debug, info" in await harness.message(Set(key="log.level", value=level), Refused)
    assert harness.child.asked == []
    harness.child.tell(Finished(steps=0, total_steps=TOTAL))
    assert await harness.ended() == 0


async def test_steps_and_incidents_are_told_once(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    harness.child.start(speaks=True)
    harness.child.step(1, reward_error=1)
    harness.child.tell(Happened(incidents=(LATE,)))
    await settled()
    assert "late" not in log.text, "the trainer's own lines say so"
    harness.child.die()
    await anyio.sleep(2)
    harness.child.start(speaks=False)
    harness.child.step(1, reward_error=2)
    harness.child.tell(Happened(incidents=(LATE,), left_out=7))
    harness.child.step(2, reward_error=2)
    harness.child.tell(Finished(steps=2, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert log.text.count("incident in scorer: the judge is late") == 1
    assert log.text.count("7 further incidents") == 1
    levels = [record.levelname for record in log.records if record.message.startswith("step ")]
    assert levels == ["DEBUG", "INFO", "INFO"]


async def test_the_configuration_is_read_again(harness: Harness) -> None:
    harness.child.start()
    assert await harness.message(Reload(), Done) == "nothing has changed in the configuration"
    harness.run_toml.write_text(
        'output = "elsewhere"\n[learner]\nlr = 2e-6\nbatch_size = 3\n[daemon]\nlog_level = "error"\nrestarts = 9\n'
    )
    said = await harness.message(Reload(), Done)
    assert "learner.lr is now 2e-06" in said
    assert "learner.batch_size needs a restart: cannot change while a run is live" in said
    assert "output needs a restart" in said
    assert "daemon.restarts is now 9" in said
    assert LOGGER.level == logging.ERROR
    assert Set(key="learner.lr", value=2e-6) in harness.child.asked
    await harness.ask(Set(key="log.level", value="debug"))
    harness.run_toml.write_text(harness.run_toml.read_text() + "log_bytes = 20_000\nlog_files = 2\n")
    said = await harness.message(Reload(), Done)
    assert "daemon.log_bytes is now 20000" in said
    assert LOGGER.level == logging.DEBUG, "what was set stays"
    assert "learner.lr" not in said, "it is in force already"
    assert "learner.batch_size needs a restart" in said
    harness.run_toml.write_text("[daemon]\nlog_level = 'loud'\nrestart = 3\n")
    said = await harness.message(Reload(), Done)
    assert "daemon.log_level is 'loud': Invalid enum value" in said
    assert "daemon.restart is 3: Object contains unknown field `restart`" in said
    assert "learner.lr is not named any more: its default needs a restart of the daemon" in said
    harness.run_toml.write_text("[learner")
    assert "nothing was taken over" in await harness.message(Reload(), Refused)
    harness.child.tell(Finished(steps=0, total_steps=TOTAL))
    assert await harness.ended() == 0


@pytest.mark.parametrize("harness", [{"signals": True}], indirect=True)
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "[learner]\nlr = 18446744073709551616\n",
            "learner.lr was not taken over: a number in it has more than 64 bits",
        ),
        (
            "[daemon]\nrestarts = 0x1" + "0" * 5000,
            "daemon.restarts was not taken over: a number in it has more than 64",
        ),
        ("seed = 1" + "0" * 5000, "nothing was taken over: "),
    ],
    ids=["65 bits", "of its own", "thousands of digits"],
)
async def test_numbers_that_nobody_can_pass_on(
    harness: Harness, log: pytest.LogCaptureFixture, line: str, said: str
) -> None:
    harness.child.start()
    harness.run_toml.write_text(line)
    os.kill(os.getpid(), signal.SIGHUP)
    await anyio.sleep(1)
    assert said in log.text
    harness.child.tell(Finished(steps=0, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert len(harness.children) == 1


@pytest.mark.parametrize("harness", [{"kill_after_s": 600.0}], indirect=True)
async def test_a_trainer_that_hangs_is_killed_and_another_goes_on(
    harness: Harness, log: pytest.LogCaptureFixture
) -> None:
    harness.child.start(2)
    await anyio.sleep(500)
    harness.child.step(3)
    harness.child.deaf = True
    await anyio.sleep(550)
    assert not harness.child.killed
    harness.child.step(4)
    await anyio.sleep(750)
    assert [child.killed for child in harness.children] == [True, False]
    status = await harness.status()
    assert status.restarting is not None
    assert "no sign of life for 600 s (daemon.kill_after_s is 600)" in status.restarting.reason
    harness.child.start(2)
    await anyio.sleep(2000)
    assert not harness.child.killed, "it answers"
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0
    assert len(harness.children) == 2
    assert "was killed" in log.text


def silent(harness: Harness, name: str = "kind") -> None:
    """The trainer hangs, and its guardian says why."""
    harness.child.deaf = True
    told = {"pid": harness.child.pid, "name": name, "reason": f"the reward {name} holds Python's lock", "since": 0.0}
    (harness.output / SILENT).write_text(json.dumps(told))


@pytest.mark.parametrize("harness", [{"kill_after_s": 60.0}], indirect=True)
async def test_a_call_that_hangs_is_named_and_not_tried_over_and_over(harness: Harness) -> None:
    harness.child.start(2)
    silent(harness)
    status = await harness.status()
    assert (status.phase, status.notice) == ("running", "the reward kind holds Python's lock")
    assert status.doing["trainer"].endswith(" s: the reward kind holds Python's lock")
    assert "the reward kind holds Python's lock" in await harness.message(Checkpoint(), Done)
    await anyio.sleep(80)
    status = await harness.status()
    assert status.restarting is not None
    assert "was killed: the reward kind holds Python's lock" in status.restarting.reason
    assert not (harness.output / SILENT).exists()
    harness.child.start(2)
    silent(harness)
    assert await harness.ended() == 3
    assert len(harness.children) == 2
    assert harness.spawned_s[1] < 100
    assert "given up: the reward kind holds Python's lock, and a start from the same step" in harness.daemon.outcome
    assert 'rewards.run = ["process"]' in harness.daemon.outcome


@pytest.mark.parametrize("harness", [{"kill_after_s": 60.0}], indirect=True)
async def test_what_was_said_of_another_trainer_says_nothing_of_this_one(harness: Harness) -> None:
    for _ in range(3):
        harness.child.start(2)
        silent(harness)
        (harness.output / SILENT).write_text('{"pid": 99, "name": "x", "reason": "x", "since": 0.0}')
        await anyio.sleep(80)
    harness.child.start(2)
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0


@pytest.mark.parametrize("harness", [{"kill_after_s": 0.0}], indirect=True)
async def test_a_trainer_may_hang_where_nobody_minds(harness: Harness) -> None:
    harness.child.start(2)
    harness.child.deaf = True
    await anyio.sleep(5000)
    assert harness.child.asked == []
    harness.run_toml.write_text(harness.run_toml.read_text() + "[daemon]\nkill_after_s = 60\n")
    assert "kill_after_s is now 60" in await harness.message(Reload(), Done)
    await anyio.sleep(121)
    assert harness.children[0].killed
    harness.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))
    assert await harness.ended() == 0


@pytest.mark.parametrize("harness", [{"signals": True}], indirect=True)
async def test_signals(harness: Harness, log: pytest.LogCaptureFixture) -> None:
    harness.child.start()
    os.kill(os.getpid(), signal.SIGHUP)
    await _heard(log, "nothing has changed")
    os.kill(os.getpid(), signal.SIGTERM)
    await _until(lambda: Drain() in harness.child.asked)
    os.kill(os.getpid(), signal.SIGINT)
    await _until(lambda: Stop() in harness.child.asked)
    assert not harness.child.killed
    os.kill(os.getpid(), signal.SIGTERM)
    await _until(lambda: harness.child.killed)
    assert await harness.ended() == 130
    assert "a signal asks: Drain()" in log.text
    assert "left without saving" in log.text


async def _heard(log: pytest.LogCaptureFixture, text: str) -> None:
    await _until(lambda: text in log.text)


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await anyio.lowlevel.checkpoint()


async def test_a_third_signal_while_nobody_is_there(harness: Harness) -> None:
    harness.child.die()
    await settled()
    harness.daemon.kill()
    assert await harness.ended() == 0


@pytest.mark.parametrize("harness", [{"spawn_takes_s": 1.0}], indirect=True)
async def test_a_third_signal_while_the_process_starts(harness: Harness) -> None:
    harness.daemon.kill()
    assert await harness.ended() == 130
    assert harness.child.killed


def test_an_answer_has_a_number() -> None:
    ask = Ask(number=3, request=Pause())
    assert frames.decode_in_trainer(encode(ask)) == ask
