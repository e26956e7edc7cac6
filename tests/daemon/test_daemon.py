"""The daemon with trainers that are none, in virtual time: what it starts, when, what it answers, how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.daemon.control.test_protocol import STATUS
from tests.support import virtual_time
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
from troupe.runtime.codec import encode
from troupe.runtime.guardian import SILENT
from troupe.runtime.process import ChildEnded

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
                reply = Refused(message="cannot change while a run plays")
            self.tell(Answer(number=message.number, reply=reply))

    async def receive(self) -> bytes:
        frame = await self._frames.receive()
        if isinstance(frame, BaseException):
            raise frame
        return frame

    def tell(self, message: ToDaemon) -> None:
        self._send.send_nowait(encode(message))

    def die(self, obituary: str = "the process ended by SIGKILL; its last lines:\n  one\n  two") -> None:
        self._send.send_nowait(ChildEnded(obituary))

    def garble(self) -> None:
        self._send.send_nowait(b"\xc1")

    def play(self, step: int = 0, *, speaks: bool = False) -> None:
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


class Theatre:
    """A daemon, its children and the exit code that it came to."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.run_toml = folder / "RUN.toml"
        self.output = folder / "out"
        self.output.mkdir()
        self.run_toml.write_text('output = "out"\n[learner]\nlr = 1e-6\n')
        self.order = Order.given(self.run_toml, str(self.output), ["learner.beta=0.5"], ["learner.beta"])
        self.config = DaemonConfig(**config)
        self.children: list[FakeChild] = []
        self.spawned_s: list[float] = []
        self.spawn_takes_s = 0.0
        self.spawn_fails = 0
        self.code: int | None = None
        self.daemon: Daemon

    async def spawn(self) -> Child:
        await anyio.sleep(self.spawn_takes_s)
        if self.spawn_fails:
            self.spawn_fails -= 1
            raise OSError(11, "Resource temporarily unavailable")
        self.spawned_s.append(anyio.current_time())
        self.children.append(FakeChild(100 + len(self.children)))
        return self.children[-1]

    def play(self, body: Callable[[], Awaitable[None]], *, signals: bool = False) -> int:
        async def perform() -> None:
            attempts = Attempts(self.config, clock=anyio.current_time, jitter=lambda low, high: 1.0)
            self.daemon = Daemon(self.order, self.config, self.spawn, attempts=attempts, clock=anyio.current_time)

            async def run() -> None:
                self.code = await self.daemon.run()
                tasks.cancel_scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                if signals:
                    tasks.start_soon(self.daemon.obey_signals)
                await settled()
                await body()
                await anyio.sleep(10_000)

        virtual_time.run(perform)
        assert self.code is not None
        assert all(child.closed for child in self.children)
        return self.code

    @property
    def child(self) -> FakeChild:
        return self.children[-1]

    async def ask(self, request: Request) -> Reply:
        return await self.daemon.answer(request, ME)

    async def status(self) -> Status:
        status = await self.ask(GetStatus())
        assert isinstance(status, Status)
        return status


@pytest.fixture
def theatre(tmp_path: Path) -> Theatre:
    return Theatre(tmp_path)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    level = LOGGER.level
    with caplog.at_level(logging.DEBUG, LOGGER.name):
        yield caplog
    LOGGER.setLevel(level)


def test_a_run_that_is_complete_ends_the_daemon(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        theatre.child.play()
        theatre.child.step(1)
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert theatre.child.begin == Begin(
        run_toml=str(theatre.run_toml),
        output=str(theatre.output),
        settings=("learner.beta=0.5",),
        allow_changes=("learner.beta",),
    )
    for line in ("trainer started (pid 100)", "note: a notice", "step 1 of 10, reward 0.25", "complete: 10 of 10"):
        assert line in log.text


def test_what_cannot_be_used_is_not_tried_again(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        theatre.child.tell(Rejected(message="RUN.toml: learner.lr is -1"))

    assert theatre.play(body) == 2
    assert len(theatre.children) == 1
    assert "learner.lr is -1" in log.text


def test_what_could_be_used_before_is_tried_again(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    """A full disk, or somebody else who has the folder for a moment, must not end a run of weeks."""

    async def body() -> None:
        theatre.child.play()
        theatre.child.die()
        await anyio.sleep(2)
        theatre.child.tell(Rejected(message="another run is writing in this folder"))
        await anyio.sleep(3)
        assert len(theatre.children) == 3
        theatre.child.play()
        theatre.child.tell(Rejected(message="the reward broke its contract"))

    assert theatre.play(body) == 2
    assert len(theatre.children) == 3
    assert "another run is writing" in log.text


def test_a_trainer_that_dies_is_followed_by_another_which_goes_on_by_the_stored_config(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.play()
        (theatre.output / "run.toml").write_text("")
        theatre.child.step(3)
        theatre.child.die()
        await anyio.sleep(5)
        theatre.child.play(2)
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert theatre.spawned_s == [0.0, 1.0]
    assert theatre.child.begin == Begin(run_toml=str(theatre.output / "run.toml"), output=str(theatre.output))


def test_a_trainer_that_dies_while_it_is_loading_is_given_the_order_again(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.die()
        await anyio.sleep(5)
        theatre.child.tell(Finished(steps=0, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert theatre.children[0].begin == theatre.children[1].begin


@pytest.mark.parametrize("way", ["dies", "fails", "garbles", "does not start"])
def test_it_gives_up_when_all_tries_are_in_vain(tmp_path: Path, log: pytest.LogCaptureFixture, way: str) -> None:
    theatre = Theatre(tmp_path, restarts=2)

    if way == "does not start":
        theatre.spawn_fails = 3
        assert theatre.play(lambda: anyio.sleep(1000)) == 3
        assert theatre.children == []
    else:
        assert theatre.play(_alternating(theatre, way)) == 3
        assert theatre.spawned_s == [0.0, 1.0, 3.5], "it failed half a second after it was started"
    assert "given up: 3 failures without a new step (daemon.restarts is 2)" in log.text


def _alternating(theatre: Theatre, way: str) -> Callable[[], Awaitable[None]]:
    async def body() -> None:
        for _ in range(3):
            child = theatre.child
            child.play(1)
            child.step(1)
            if way == "dies":
                child.die()
            elif way == "fails":
                child.tell(Failed(message="the process ended by SIGKILL"))
            else:
                child.garble()
            await anyio.sleep(2.0 ** len(theatre.children) - 0.5)

    return body


def test_a_new_step_forgets_failures(tmp_path: Path) -> None:
    theatre = Theatre(tmp_path, restarts=1)

    async def body() -> None:
        for step in range(5):
            theatre.child.play(step)
            theatre.child.step(step + 1)
            theatre.child.die()
            await anyio.sleep(1.5)
        theatre.child.tell(Finished(steps=5, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert len(theatre.children) == 6


def test_the_status_at_any_time(theatre: Theatre) -> None:
    async def body() -> None:
        status = await theatre.status()
        assert (status.phase, status.step, status.restarting) == ("restarting", 3, None), "what the trainer says"
        theatre.child.play()
        theatre.child.step(4, reward_error=1)
        await settled()
        theatre.child.die()
        await anyio.sleep(0.25)
        status = await theatre.status()
        assert (status.phase, status.step, status.total_steps) == ("restarting", 4, TOTAL)
        assert (status.groups, status.doing, status.metrics) == ((), {}, {"reward": 0.25})
        failure = status.restarting
        assert failure is not None
        assert (failure.attempt, failure.limit, failure.next_try_s) == (1, 5, 0.75)
        assert failure.reason == "the process ended by SIGKILL: two"
        theatre.spawn_takes_s = 5.0
        await anyio.sleep(1)
        status = await theatre.status()
        assert (status.phase, status.restarting and status.restarting.next_try_s) == ("starting", 0.0)
        await anyio.sleep(6)
        loading = Activity(what="loading the model and the prompts")
        theatre.child.status = msgspec.structs.replace(
            STATUS, phase="starting", step=0, total_steps=0, activity=loading
        )
        status = await theatre.status()
        assert status.activity == loading
        assert (status.phase, status.step, status.total_steps) == ("starting", 4, TOTAL), "it has not loaded yet"
        assert status.restarting is not None
        theatre.child.play(2)
        theatre.child.step(3)
        await settled()
        theatre.child.status = STATUS
        assert (await theatre.status()).restarting is not None, "made before"
        theatre.child.step(5)
        await settled()
        assert (await theatre.status()).restarting is None
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_a_trainer_that_does_not_answer_is_answered_for(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.play(2)
        theatre.child.deaf = True
        status = await theatre.status()
        assert (status.step, status.doing) == (2, {"trainer": "has not answered for 5 s"})
        reply = await theatre.ask(Checkpoint())
        assert isinstance(reply, Done)
        assert "has not answered yet" in reply.message
        assert anyio.current_time() == 10.0
        theatre.child.tell(Answer(number=0, reply=Done()))  # too late: nobody waits for it
        theatre.child.tell(Finished(steps=3, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_a_trainer_that_dies_before_it_answers(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.deaf = True
        replies: list[Reply] = []

        async def ask(request: Request) -> None:
            replies.append(await theatre.ask(request))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, Checkpoint())
            tasks.start_soon(ask, GetStatus())
            await settled()
            theatre.child.die()
        assert Refused(message="the trainer ended before it answered; ask again") in replies
        assert any(isinstance(reply, Status) and "has just ended" in reply.doing["trainer"] for reply in replies)
        await theatre.ask(Drain())

    assert theatre.play(body) == 0


def test_requests_go_to_the_trainer(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    requests: list[Request] = [Pause(), Step(steps=2), Resume(), Checkpoint(), Set(key="learner.lr", value=1), Stop()]

    async def body() -> None:
        theatre.child.play()
        for request in requests:
            assert await theatre.ask(request) == Done(message="heard")
        theatre.child.tell(Finished(steps=1, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert theatre.child.asked == requests
    assert "user 501 (pid 7) asks: Step(steps=2)" in log.text
    assert "ended after 1 of 10 steps; the same command goes on with it" in log.text


def test_a_pause_outlives_the_trainer(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.play()
        await theatre.ask(Pause())
        theatre.child.die()
        await anyio.sleep(2)
        assert theatre.child.begin is not None
        assert theatre.child.begin.paused
        theatre.child.die()
        await settled()
        resumed = await theatre.ask(Resume())
        assert resumed == Done(message="no trainer is there; the next one will begin steps")
        paused = await theatre.ask(Pause())
        assert paused == Done(message="no trainer is there; the next one will begin no step until told to resume")
        await theatre.ask(Resume())
        await anyio.sleep(3)
        last: Begin | None = theatre.children[-1].begin
        assert last is not None
        assert not last.paused
        theatre.child.tell(Finished(steps=1, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert len(theatre.children) == 3


@pytest.mark.parametrize("request_", [Step(), Checkpoint(), Set(key="learner.lr", value=1)], ids=repr)
def test_what_nobody_is_there_for_is_refused(theatre: Theatre, request_: Request) -> None:
    async def body() -> None:
        theatre.child.die()
        await settled()
        assert await theatre.ask(request_) == Refused(
            message="no trainer is there to heed this, the next one starts in 1 s; ask again then"
        )
        theatre.spawn_takes_s = 5.0
        await anyio.sleep(2)
        reply = await theatre.ask(request_)
        assert isinstance(reply, Refused)
        assert "it is being started" in reply.message
        await anyio.sleep(10)
        theatre.child.tell(Finished(steps=1, total_steps=TOTAL))

    assert theatre.play(body) == 0


@pytest.mark.parametrize("request_", [Drain(), Stop()], ids=repr)
def test_the_end_may_be_asked_for_while_nobody_is_there(theatre: Theatre, request_: Request) -> None:
    async def body() -> None:
        theatre.child.die()
        await settled()
        reply = await theatre.ask(request_)
        assert isinstance(reply, Done)
        assert "the daemon ends" in reply.message

    assert theatre.play(body) == 0
    assert len(theatre.children) == 1


def test_the_end_may_be_asked_for_while_the_process_starts(theatre: Theatre) -> None:
    theatre.spawn_takes_s = 1.0

    async def body() -> None:
        await theatre.ask(Stop())
        await theatre.ask(Drain())  # asks for less, and changes nothing
        await anyio.sleep(2)
        assert theatre.child.asked == [Stop()]
        theatre.child.tell(Finished(steps=0, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_a_failure_on_the_way_to_the_end_is_told_and_not_mended(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.play()
        await theatre.ask(Drain())
        theatre.child.die()

    assert theatre.play(body) == 3
    assert len(theatre.children) == 1


def test_a_trainer_that_dies_on_the_way_to_the_end_before_it_plays_is_no_failure(theatre: Theatre) -> None:
    """Where a whole control group is told to end, its handlers may not be there yet."""

    async def body() -> None:
        with anyio.move_on_after(1):
            await theatre.ask(Drain())
        theatre.child.die()

    assert theatre.play(body) == 0
    assert len(theatre.children) == 1


def test_the_log_level_is_the_daemons_own(theatre: Theatre) -> None:
    async def body() -> None:
        assert await theatre.ask(Set(key="log.level", value="warning")) == Done(message="log.level is now warning")
        assert LOGGER.level == logging.WARNING
        levels: list[Any] = ["loud", 3, [], None]
        for level in levels:
            reply = await theatre.ask(Set(key="log.level", value=level))
            assert isinstance(reply, Refused)
            assert "give one of debug, info" in reply.message
        assert theatre.child.asked == []
        theatre.child.tell(Finished(steps=0, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_steps_and_incidents_are_told_once(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        theatre.child.play(speaks=True)
        theatre.child.step(1, reward_error=1)
        theatre.child.tell(Happened(incidents=(LATE,)))
        await settled()
        assert "late" not in log.text, "the trainer's own lines say so"
        theatre.child.die()
        await anyio.sleep(2)
        theatre.child.play(speaks=False)
        theatre.child.step(1, reward_error=2)
        theatre.child.tell(Happened(incidents=(LATE,), left_out=7))
        theatre.child.step(2, reward_error=2)
        theatre.child.tell(Finished(steps=2, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert log.text.count("incident in scorer: the judge is late") == 1
    assert log.text.count("7 further incidents") == 1
    levels = [record.levelname for record in log.records if record.message.startswith("step ")]
    assert levels == ["DEBUG", "INFO", "INFO"]


def test_the_configuration_is_read_again(theatre: Theatre) -> None:
    async def reload() -> str:
        reply = await theatre.ask(Reload())
        assert isinstance(reply, Done), reply
        return reply.message

    async def body() -> None:
        theatre.child.play()
        assert await reload() == "nothing has changed in the configuration"
        theatre.run_toml.write_text(
            'output = "elsewhere"\n[learner]\nlr = 2e-6\nbatch_size = 3\n[daemon]\nlog_level = "error"\nrestarts = 9\n'
        )
        said = await reload()
        assert "learner.lr is now 2e-06" in said
        assert "learner.batch_size needs a restart: cannot change while a run plays" in said
        assert "output needs a restart" in said
        assert "daemon.restarts is now 9" in said
        assert LOGGER.level == logging.ERROR
        assert Set(key="learner.lr", value=2e-6) in theatre.child.asked
        await theatre.ask(Set(key="log.level", value="debug"))
        theatre.run_toml.write_text(theatre.run_toml.read_text() + "log_bytes = 20_000\nlog_files = 2\n")
        said = await reload()
        assert "daemon.log_bytes is now 20000" in said
        assert LOGGER.level == logging.DEBUG, "what was set stays"
        assert "learner.lr" not in said, "it is in force already"
        assert "learner.batch_size needs a restart" in said
        theatre.run_toml.write_text("[daemon]\nlog_level = 'loud'\nrestart = 3\n")
        said = await reload()
        assert "daemon.log_level is 'loud': Invalid enum value" in said
        assert "daemon.restart is 3: Object contains unknown field `restart`" in said
        assert "learner.lr is not named any more: its default needs a restart of the daemon" in said
        theatre.run_toml.write_text("[learner")
        reply = await theatre.ask(Reload())
        assert isinstance(reply, Refused)
        assert "nothing was taken over" in reply.message
        theatre.child.tell(Finished(steps=0, total_steps=TOTAL))

    assert theatre.play(body) == 0


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
def test_numbers_that_nobody_can_pass_on(theatre: Theatre, log: pytest.LogCaptureFixture, line: str, said: str) -> None:
    async def body() -> None:
        theatre.child.play()
        theatre.run_toml.write_text(line)
        os.kill(os.getpid(), signal.SIGHUP)
        await anyio.sleep(1)
        assert said in log.text
        theatre.child.tell(Finished(steps=0, total_steps=TOTAL))

    assert theatre.play(body, signals=True) == 0
    assert len(theatre.children) == 1


def test_a_trainer_that_hangs_is_killed_and_another_goes_on(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    theatre = Theatre(tmp_path, kill_after_s=600.0)

    async def body() -> None:
        theatre.child.play(2)
        await anyio.sleep(500)
        theatre.child.step(3)
        theatre.child.deaf = True
        await anyio.sleep(550)
        assert not theatre.child.killed
        theatre.child.step(4)
        await anyio.sleep(750)
        assert [child.killed for child in theatre.children] == [True, False]
        status = await theatre.status()
        assert status.restarting is not None
        assert "no sign of life for 600 s (daemon.kill_after_s is 600)" in status.restarting.reason
        theatre.child.play(2)
        await anyio.sleep(2000)
        assert not theatre.child.killed, "it answers"
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0
    assert len(theatre.children) == 2
    assert "was killed" in log.text


def silent(theatre: Theatre, name: str = "kind") -> None:
    """The trainer hangs, and its guardian says why."""
    theatre.child.deaf = True
    told = {"pid": theatre.child.pid, "name": name, "reason": f"the reward {name} holds Python's lock", "since": 0.0}
    (theatre.output / SILENT).write_text(json.dumps(told))


def test_a_call_that_hangs_is_named_and_not_tried_over_and_over(tmp_path: Path) -> None:
    theatre = Theatre(tmp_path, kill_after_s=60.0)

    async def body() -> None:
        theatre.child.play(2)
        silent(theatre)
        status = await theatre.status()
        assert (status.phase, status.notice) == ("running", "the reward kind holds Python's lock")
        assert status.doing["trainer"].endswith(" s: the reward kind holds Python's lock")
        reply = await theatre.ask(Checkpoint())
        assert isinstance(reply, Done)
        assert "the reward kind holds Python's lock" in reply.message
        await anyio.sleep(80)
        status = await theatre.status()
        assert status.restarting is not None
        assert "was killed: the reward kind holds Python's lock" in status.restarting.reason
        assert not (theatre.output / SILENT).exists()
        theatre.child.play(2)
        silent(theatre)

    assert theatre.play(body) == 3
    assert len(theatre.children) == 2
    assert theatre.spawned_s[1] < 100
    assert "given up: the reward kind holds Python's lock, and a start from the same step" in theatre.daemon.outcome
    assert 'rewards.run = ["process"]' in theatre.daemon.outcome


def test_what_was_said_of_another_trainer_says_nothing_of_this_one(tmp_path: Path) -> None:
    theatre = Theatre(tmp_path, kill_after_s=60.0)

    async def body() -> None:
        for _ in range(3):
            theatre.child.play(2)
            silent(theatre)
            (theatre.output / SILENT).write_text('{"pid": 99, "name": "x", "reason": "x", "since": 0.0}')
            await anyio.sleep(80)
        theatre.child.play(2)
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_a_trainer_may_hang_where_nobody_minds(tmp_path: Path) -> None:
    theatre = Theatre(tmp_path, kill_after_s=0.0)

    async def body() -> None:
        theatre.child.play(2)
        theatre.child.deaf = True
        await anyio.sleep(5000)
        assert theatre.child.asked == []
        theatre.run_toml.write_text(theatre.run_toml.read_text() + "[daemon]\nkill_after_s = 60\n")
        reply = await theatre.ask(Reload())
        assert isinstance(reply, Done)
        assert "kill_after_s is now 60" in reply.message
        await anyio.sleep(121)
        assert theatre.children[0].killed
        theatre.child.tell(Finished(steps=TOTAL, total_steps=TOTAL))

    assert theatre.play(body) == 0


def test_signals(theatre: Theatre, log: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        theatre.child.play()
        os.kill(os.getpid(), signal.SIGHUP)
        await _heard(log, "nothing has changed")
        os.kill(os.getpid(), signal.SIGTERM)
        await _until(lambda: Drain() in theatre.child.asked)
        os.kill(os.getpid(), signal.SIGINT)
        await _until(lambda: Stop() in theatre.child.asked)
        assert not theatre.child.killed
        os.kill(os.getpid(), signal.SIGTERM)
        await _until(lambda: theatre.child.killed)

    assert theatre.play(body, signals=True) == 130
    assert "a signal asks: Drain()" in log.text
    assert "left without saving" in log.text


async def _heard(log: pytest.LogCaptureFixture, text: str) -> None:
    await _until(lambda: text in log.text)


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await anyio.lowlevel.checkpoint()


def test_a_third_signal_while_nobody_is_there(theatre: Theatre) -> None:
    async def body() -> None:
        theatre.child.die()
        await settled()
        theatre.daemon.kill()

    assert theatre.play(body) == 0


def test_a_third_signal_while_the_process_starts(theatre: Theatre) -> None:
    theatre.spawn_takes_s = 1.0

    async def body() -> None:
        theatre.daemon.kill()

    assert theatre.play(body) == 130
    assert theatre.child.killed


def test_an_answer_has_a_number() -> None:
    ask = Ask(number=3, request=Pause())
    assert frames.decode_in_trainer(encode(ask)) == ask
