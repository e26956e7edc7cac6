"""The trainer's part, with a Supervisor that follows a script."""

from __future__ import annotations

import errno
import json
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from tests.daemon.control.test_protocol import STATUS
from tests.support.stored import closed
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
from troupe.daemon.trainer.process import run_trainer
from troupe.errors import ConfigError, OutputError, RewardError, RunError
from troupe.messages import Done, GetStatus, GroupClosed, Incident, Pause, Refused, Reload, Set, Status, Update
from troupe.run.config import RunConfig, load_config, write_config
from troupe.runtime.frames import Connection, encode

pytestmark = pytest.mark.anyio


class FakeSupervisor:
    """Makes as many steps as it is let, and remembers what it was asked."""

    made: list[FakeSupervisor] = []  # noqa: RUF012 - the last one of a test
    steps = 2

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool,
        allow_changes: tuple[str, ...],
        fault: Exception | None = None,
        mishaps: tuple[Incident, ...] = (),
    ) -> None:
        self.fault, self.mishaps, self.shown = fault, mishaps, STATUS
        self.config, self.resumes, self.allowed = config, resume, allow_changes
        self.asked: list[object] = []
        self.notices = ("a notice",)
        self.let_go = anyio.Event()
        self.result = SimpleNamespace(steps=self.steps, total_steps=5, stopped_early="")
        FakeSupervisor.made.append(self)

    async def __aenter__(self) -> FakeSupervisor:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self.fault is not None:
            raise self.fault

    async def updates(self) -> AsyncIterator[Update]:
        for step in range(1, self.steps + 1):
            yield Update(step=step, version=step, total_steps=5, metrics={"reward": 0.5})
        await self.let_go.wait()

    async def incidents(self) -> AsyncIterator[Incident]:
        for incident in self.mishaps:
            yield incident

    async def closed_groups(self) -> AsyncIterator[GroupClosed]:
        yield closed(7, 0)

    def status(self) -> Status:
        return self.shown

    def pause(self) -> None:
        self.asked.append("pause")

    async def check(self, key: str, value: Any) -> None:
        self.asked.append(("check", key, value))
        if value == "nope.py:f":
            raise RewardError("nope.py: no such file")

    def set(self, key: str, value: Any) -> None:
        self.asked.append((key, value))
        if key == "seed":
            raise ConfigError("set seed: cannot change")
        if value == "gone.py:f":
            raise FileNotFoundError(2, "No such file or directory")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signals' handlers as before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    FakeSupervisor.made.clear()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class DaemonEnd:
    """The daemon's end of the wire."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def send(self, message: Begin | Ask) -> None:
        await self._connection.send(encode(message))

    async def hear(self) -> ToDaemon:
        return frames.decode_in_daemon(await self._connection.receive())

    def hang_up(self) -> None:
        self._connection.close()


@asynccontextmanager
async def running(**script: Any) -> AsyncIterator[DaemonEnd]:
    supervise: Any = partial(FakeSupervisor, **script)
    ours, theirs = socket.socketpair()
    connection, other = await Connection.over(ours), await Connection.over(theirs)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_trainer, other, supervise)
            yield DaemonEnd(connection)
    finally:
        connection.close()
        other.close()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()


def begin(folder: Path, text: str = '[metrics]\nsinks = ["jsonl"]\n', **more: Any) -> Begin:
    run_toml = folder / "RUN.toml"
    run_toml.write_text(text)
    return Begin(run_toml=str(run_toml), output=str(folder / "out"), **more)


def run() -> FakeSupervisor:
    return FakeSupervisor.made[-1]


async def test_it_runs_and_tells_of_every_step(tmp_path: Path) -> None:
    async with running() as daemon:
        await daemon.send(begin(tmp_path, settings=("learner.lr=0.5",), allow_changes=("learner.lr",)))
        assert await daemon.hear() == Started(notices=("a notice",), step=3, total_steps=10, speaks=False)
        for step in (1, 2):
            assert await daemon.hear() == Stepped(
                step=step, total_steps=5, metrics={"reward": 0.5}, incidents=STATUS.incidents
            )
        run().let_go.set()
        assert await daemon.hear() == Finished(steps=2, total_steps=5)
    assert (run().resumes, run().allowed, run().asked) == (False, ("learner.lr",), [])
    assert (run().config.learner.lr, run().config.output) == (0.5, str(tmp_path / "out"))
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL), "children would inherit the first"


async def test_it_goes_on_with_a_run_that_stands_there_and_may_begin_paused(tmp_path: Path) -> None:
    order = begin(tmp_path, paused=True)
    (tmp_path / "out").mkdir()
    write_config(load_config(), tmp_path / "out" / "run.toml")
    async with running() as daemon:
        await daemon.send(order)
        assert isinstance(await daemon.hear(), Started)
        run().let_go.set()
    assert run().resumes
    assert run().asked == ["pause"]


async def test_it_answers(tmp_path: Path) -> None:
    async with running() as daemon:
        await daemon.send(begin(tmp_path))
        for _ in range(3):
            await daemon.hear()
        await daemon.send(Ask(number=1, request=GetStatus()))
        await daemon.send(Ask(number=2, request=Pause()))
        await daemon.send(Ask(number=3, request=Set(key="seed", value=1)))
        await daemon.send(Ask(number=4, request=Reload()))
        answers = [await daemon.hear() for _ in range(4)]
        assert all(isinstance(answer, Answer) for answer in answers)
        assert answers[0] == Answer(number=1, reply=STATUS)
        replies = [answer.reply for answer in answers if isinstance(answer, Answer)]
        assert isinstance(replies[1], Done)
        assert getattr(replies[2], "message", "") == "set seed: cannot change"
        assert run().asked == ["pause", ("seed", 1)]
        await daemon.send(Ask(number=5, request=Set(key="rewards.a", value="nope.py:f")))
        refused = await daemon.hear()
        assert refused == Answer(number=5, reply=Refused(message="nope.py: no such file"))
        assert run().asked[2:] == [("check", "rewards.a", "nope.py:f")]
        run().let_go.set()
        assert isinstance(await daemon.hear(), Finished)


async def test_a_request_that_fails_ends_nothing(tmp_path: Path) -> None:
    async with running() as daemon:
        await daemon.send(begin(tmp_path))
        for _ in range(3):
            await daemon.hear()
        run().shown = msgspec.structs.replace(STATUS, rewards_down={"judge": "caf\udce9"})
        await daemon.send(Ask(number=1, request=GetStatus()))
        first = await daemon.hear()
        run().shown = STATUS
        await daemon.send(Ask(number=2, request=Set(key="rewards.judge", value="gone.py:f")))
        second = await daemon.hear()
        await daemon.send(Ask(number=3, request=GetStatus()))
        third = await daemon.hear()
        run().let_go.set()
        assert isinstance(await daemon.hear(), Finished)
    for answer, fault in ((first, "UnicodeEncodeError"), (second, "FileNotFoundError(2")):
        assert isinstance(answer, Answer)
        assert isinstance(answer.reply, Refused)
        assert answer.reply.message.startswith(f"the request failed: {fault}")
    assert third == Answer(number=3, reply=STATUS)


def unwritable(number: int) -> Exception:
    error = OutputError("out: cannot be written")
    error.__context__ = OSError(number, "no")  # as of one that is raised while it is handled
    return error


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ConfigError("no such key"), Rejected(message="no such key")),
        (ConfigError("no file caf\udce9"), Rejected(message=r"no file caf\udce9")),
        (RunError("no file caf\udce9"), Failed(message=r"no file caf\udce9")),
        (RunError("the disk is full"), Failed(message="the disk is full")),
        (unwritable(errno.ENOSPC), Failed(message="out: cannot be written")),
        (unwritable(errno.EIO), Failed(message="out: cannot be written")),
        (unwritable(errno.EACCES), Rejected(message="out: cannot be written")),
    ],
)
async def test_faults_are_told_by_kind(tmp_path: Path, fault: Exception, told: ToDaemon) -> None:
    """A disk that is full today is no bad input."""
    async with running(fault=fault) as daemon:
        await daemon.send(begin(tmp_path))
        for _ in range(3):
            await daemon.hear()
        run().let_go.set()
        assert await daemon.hear() == told


async def test_incidents_are_told_in_words_and_completions_where_they_are_wanted(tmp_path: Path) -> None:
    late = Incident(actor="scorer", kind="reward_error", message="the judge is late")
    async with running(mishaps=(late,)) as daemon:
        await daemon.send(begin(tmp_path, completions=True))
        heard = [await daemon.hear() for _ in range(4)]
        run().let_go.set()
        while not isinstance(heard[-1], Finished):
            heard.append(await daemon.hear())
    told = [frame for frame in heard if isinstance(frame, Happened)]
    assert [incident for frame in told for incident in frame.incidents] == [late]
    assert [group.step for frame in told for group in frame.groups] == [7]
    assert len([frame for frame in heard if isinstance(frame, Stepped)]) == 2


async def begin_and_leave(folder: Path, **script: Any) -> None:
    """A daemon that is gone before the run has ended, unless it is let go at once."""
    async with running(**script) as daemon:
        await daemon.send(begin(folder))
        for _ in range(3):
            await daemon.hear()
        if script:
            run().let_go.set()
        else:
            daemon.hang_up()


@pytest.mark.parametrize(
    ("script", "fault"), [({"fault": RuntimeError("a bug")}, RuntimeError), ({}, anyio.EndOfStream)]
)
async def test_a_bug_is_the_process_s_own_and_without_its_daemon_it_ends(
    tmp_path: Path, script: dict[str, Any], fault: type[Exception]
) -> None:
    with pytest.raises(BaseExceptionGroup) as faults:
        await begin_and_leave(tmp_path, **script)
    assert faults.group_contains(fault)


@pytest.mark.parametrize(
    ("stored", "asked", "summary", "over"),
    [
        ("", "", {"steps": 5, "total_steps": 5, "wall_s": 1.0}, True),
        ("", "", {"steps": 4, "total_steps": 5}, False),
        ("", "[learner]\nepochs = 9\n", {"steps": 5, "total_steps": 5}, False),
        ("[learner]\nmax_steps = 5\n", "[learner]\nmax_steps = 9\n", {"steps": 5, "total_steps": 5}, False),
        ("", "", None, False),
        ("", "", {"steps": "five"}, False),
    ],
    ids=["complete", "ended early", "more epochs", "more steps", "no summary", "odd summary"],
)
async def test_a_run_that_is_complete_is_not_made_again(
    tmp_path: Path, stored: str, asked: str, summary: dict[str, Any] | None, over: bool
) -> None:
    order = begin(tmp_path, asked)
    _make_run(tmp_path / "out", stored, summary)
    async with running() as daemon:
        await daemon.send(order)
        first = await daemon.hear()
        if over:
            assert first == Finished(steps=5, total_steps=5)
        else:
            assert isinstance(first, Started)
            run().let_go.set()
    assert bool(FakeSupervisor.made) is not over


def _make_run(folder: Path, config: str, summary: dict[str, Any] | None) -> None:
    folder.mkdir()
    (folder / "run.toml").write_text(config)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


async def test_bad_input_is_told_before_anything_is_made(tmp_path: Path) -> None:
    async with running() as daemon:
        await daemon.send(begin(tmp_path, "[learner]\nlr = -1\n"))
        told = await daemon.hear()
    assert isinstance(told, Rejected)
    assert "learner.lr is -1" in told.message
    assert FakeSupervisor.made == []


@pytest.mark.parametrize("is_there", [False, True])
async def test_it_begins_no_run_where_another_folder_lies_than_the_daemon_holds(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "out").mkdir()
    async with running() as daemon:
        await daemon.send(begin(tmp_path, identity=(1, 1)))
        rejected = await daemon.hear()
    assert isinstance(rejected, Rejected)
    assert "was moved, deleted or exchanged" in rejected.message
    assert not FakeSupervisor.made
