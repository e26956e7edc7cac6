"""The commands that speak with a run."""

from __future__ import annotations

import json
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.daemon.control.test_protocol import STATUS
from troupe.cli import control as command_room
from troupe.cli.control import control
from troupe.daemon.control.place import Peer, write_address
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.control.server import ControlServer, Limits
from troupe.daemon.orders import Order
from troupe.messages import (
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    Pause,
    Refused,
    Resume,
    Set,
    Step,
    Stop,
)
from troupe.runtime.guardian import SILENT
from troupe.runtime.lock import LOCK, Owner, process_identity


class Host:
    """Serves a folder from a thread."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder = folder
        self._limits = limits
        self.heard: list[Request] = []
        self.ends_after = 10_000
        self._stack = ExitStack()

    def __enter__(self) -> Host:
        self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal())
        self._stopped = self._portal.call(anyio.Event)
        self._served, _ = self._portal.start_task(self._serve)
        return self

    def __exit__(self, *exc: object) -> None:
        self._portal.call(self._stopped.set)
        self._served.result()
        self._stack.close()

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with ControlServer(self.folder, self._answer, self._limits):
            task_status.started()
            await self._stopped.wait()

    async def _answer(self, request: Request, peer: Peer) -> Reply:
        self.heard.append(request)
        match request:
            case GetStatus():
                if len(self.heard) == self.ends_after:
                    self._stopped.set()
                return msgspec.structs.replace(STATUS, step=len(self.heard))
            case Stop():
                return Refused(message="no brakes")
            case Resume():
                return Done()
        return Done(message=f"heard {type(request).__name__}")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(control, arguments)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path) as host:
        yield host


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["pause"], Pause()),
        (["resume"], Resume()),
        (["step"], Step()),
        (["step", "-n", "3"], Step(steps=3)),
        (["checkpoint"], Checkpoint()),
        (["drain"], Drain()),
        (["set", "learner.lr=1e-5"], Set(key="learner.lr", value=1e-5)),
        (["set", "rewards.kind=r.py:kind"], Set(key="rewards.kind", value=f"{Path.cwd() / 'r.py'}:kind")),
        (["set", "rewards.kind=length"], Set(key="rewards.kind", value="length")),
    ],
    ids=lambda argument: " ".join(argument) if isinstance(argument, list) else "",
)
def test_requests(host: Host, arguments: list[str], request_: Request) -> None:
    name, *rest = arguments
    result = call(name, str(host.folder), *rest)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == ("done\n" if name == "resume" else f"heard {type(request_).__name__}\n")
    assert host.heard == [request_]


def test_a_refusal_is_an_exit_code(host: Host) -> None:
    result = call("stop", str(host.folder))
    assert (result.exit_code, result.stderr) == (3, "troupe: refused: no brakes\n")


@pytest.mark.parametrize("name", ["pause", "resume", "step", "checkpoint", "drain", "stop"])
def test_nobody_is_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.toml").touch()
    result = call(name, str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == (
        f"troupe: {tmp_path}: no run is live in this folder now; no step is done yet, and "
        f"nobody is at it; go on with: troupe train -o {tmp_path} --resume\n"
    )


def test_what_is_no_setting(tmp_path: Path) -> None:
    result = call("set", str(tmp_path), "learner.lr")
    assert result.exit_code == 2
    assert "write it as section.key=value" in result.stderr
    result = call("set", str(tmp_path), "learner.lr=\udcff")
    assert result.exit_code == 2
    assert "is not UTF-8 text" in result.stderr
    result = call("set", str(tmp_path), "learner.lr=" + "[" * 2000)
    assert result.exit_code == 2
    assert "nested too deeply" in result.stderr


@pytest.mark.parametrize("interval", ["nan", "inf", "0", "1e300"])
def test_intervals_that_are_none(host: Host, interval: str) -> None:
    result = call("status", str(host.folder), "--watch", "--interval", interval)
    assert result.exit_code == 2
    assert "Invalid value for '--interval'" in result.stderr


def test_a_watcher_is_silent_for_as_long_as_he_likes(tmp_path: Path) -> None:
    """The server drops who asks nothing; the next look is another connection."""
    (tmp_path / "run.toml").write_text("")
    with Host(tmp_path, Limits(idle_s=0.01)) as host:
        host.ends_after = 3
        result = call("status", str(tmp_path), "--watch", "--interval", "0.1", "--json")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["step"] for line in result.stdout.splitlines()][:3] == [1, 2, 3]


def test_the_status_for_people_and_for_programs(host: Host) -> None:
    result = call("status", str(host.folder))
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{host.folder}: restarting, step 1 of 10 (10%)\n")
    shown = json.loads(call("status", str(host.folder), "--json").stdout)
    assert (shown["type"], shown["phase"], shown["step"]) == ("Status", "restarting", 2)


def test_it_is_watched_until_the_run_has_ended(host: Host) -> None:
    (host.folder / "run.toml").write_text("")
    (host.folder / "summary.json").write_text('{"steps": 9, "total_steps": 9}')
    host.ends_after = 3
    result = call("status", str(host.folder), "--watch", "--interval", "0.1", "--json")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 9]
    assert lines[-1]["fate"] == "complete"
    assert call("status", str(host.folder)).stdout == f"{host.folder}: complete: 9 of 9 steps\n"


def test_a_terminal_is_cleared_between(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(click, "clear", lambda: cleared.append(True))
    host.ends_after = 2
    (host.folder / "run.toml").write_text("")
    result = call("status", str(host.folder), "--watch", "--interval", "0.1")
    assert cleared == [True, True]
    assert "step 2 of 10" in result.stdout


def test_a_refused_status_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(host: Host, request: Request, peer: Peer) -> Reply:
        return Refused(message="belongs to another user")

    host = Host(tmp_path)
    monkeypatch.setattr(host, "_answer", partial(refuse, host))
    with host:
        result = call("status", str(tmp_path))
    assert (result.exit_code, result.stderr) == (3, f"troupe: {tmp_path}: belongs to another user\n")


def test_the_status_of_what_is_no_run(tmp_path: Path) -> None:
    result = call("status", str(tmp_path))
    assert result.exit_code == 2
    assert "this is not the folder of a run" in result.stderr


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """The orders that a daemon would run; none is."""
    orders: list[Order] = []

    async def keep(order: Order) -> int:
        orders.append(order)
        return 3

    monkeypatch.setattr(command_room, "keep_alive", keep)
    return orders


def test_the_daemon_is_given_the_order(tmp_path: Path, given: list[Order]) -> None:
    (tmp_path / "RUN.toml").write_text("[learner]\nlr = 1\n")
    arguments: list[Any] = [tmp_path / "RUN.toml", "-o", tmp_path / "o", "--set", "seed=3", "--allow-change", "a.b"]
    assert call("daemon", *map(str, arguments)).exit_code == 3
    assert given == [
        Order(
            run_toml=tmp_path / "RUN.toml",
            output=tmp_path / "o",
            settings=("seed=3",),
            allow_changes=("a.b",),
            table={"learner": {"lr": 1}, "seed": 3},
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "page"), [([], False), (["--page"], True), (["--page", "8123"], 8123), (["--page", "-o", "o"], True)]
)
def test_a_page_is_asked_for(tmp_path: Path, given: list[Order], arguments: list[str], page: bool | int) -> None:
    (tmp_path / "RUN.toml").write_text("")
    assert call("daemon", str(tmp_path / "RUN.toml"), "-o", str(tmp_path / "o"), *arguments).exit_code == 3
    assert given[0].daemon.page == page
    unit = call("daemon", str(tmp_path / "RUN.toml"), "-o", "o", *arguments, "--print-unit", "systemd").stdout
    assert ("daemon.page=" in unit) is bool(page)


@pytest.mark.parametrize("port", ["0", "70000", "RUN.toml", "٣"])
def test_what_is_no_port(tmp_path: Path, port: str) -> None:
    (tmp_path / "RUN.toml").write_text("")
    result = call("daemon", str(tmp_path / "RUN.toml"), "-o", str(tmp_path / "o"), f"--page={port}")
    assert result.exit_code == 2
    assert f"--page {port}: give a port from 1 to 65535" in result.stderr


def test_the_status_says_where_the_page_is(host: Host) -> None:
    write_address(host.folder, "http://127.0.0.1:9/?token=x")
    assert call("status", str(host.folder)).stdout.endswith("  live page     http://127.0.0.1:9/?token=x\n")


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_units_are_printed_and_nothing_is_started(tmp_path: Path, kind: str) -> None:
    (tmp_path / "RUN.toml").write_text("")
    result = call("daemon", str(tmp_path / "RUN.toml"), "-o", str(tmp_path / "o"), "--print-unit", kind)
    assert result.exit_code == 0
    assert str(tmp_path / "RUN.toml") in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"RUN.toml"}


def test_a_daemon_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "RUN.toml").write_text("")
    result = call("daemon", str(tmp_path / "RUN.toml"))
    assert result.exit_code == 2
    assert "a daemon has to know its run folder" in result.stderr


@pytest.mark.parametrize("command", [["status"], ["pause"], ["drain"], ["stop"], ["set", "learner.lr=1e-6"]])
def test_a_folder_of_something_else_is_refused_as_what_it_is(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    result = call(command[0], ".", *command[1:])
    assert result.exit_code == 2
    nobody = "" if command == ["status"] else "no run is live in this folder now; "
    assert result.stderr == f"troupe: .: {nobody}there is no run.toml, so this is not the folder of a run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_request_to_a_run_that_nobody_runs_says_what_became_of_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    (tmp_path / "summary.json").write_text('{"steps": 4, "total_steps": 4}')
    result = call("drain", str(tmp_path))
    assert result.exit_code == 2
    assert f"{tmp_path}: no run is live in this folder now; complete: 4 of 4 steps" in result.stderr


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs in the folder, does not answer, and whose guardian says why."""
    monkeypatch.setattr(command_room, "_HOPE_S", 0.05)
    process = subprocess.Popen(["sleep", "1000"])
    owner = Owner(pid=process.pid, host=platform.node(), started=0.0, process=process_identity(process.pid))
    (tmp_path / LOCK).write_bytes(msgspec.json.encode(owner))
    told = {"pid": process.pid, "name": "kind", "reason": "the reward kind holds Python's lock", "since": time.time()}
    (tmp_path / SILENT).write_text(json.dumps(told))
    (tmp_path / "run.toml").write_text("")
    with socket.socket(socket.AF_UNIX) as deaf:
        monkeypatch.chdir(tmp_path)
        deaf.bind("control.sock")
        deaf.listen()
        yield process
    process.kill()
    process.wait()


def test_a_run_that_hangs_is_told_of(tmp_path: Path, hung: subprocess.Popen[bytes]) -> None:
    result = call("status", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path}: not answering for 0 s: the reward kind holds Python's lock; newest")
    found = json.loads(call("status", str(tmp_path), "--json").stdout)
    assert (found["fate"], found["pid"]) == ("silent", hung.pid)
    for command in ("pause", "stop", "drain"):
        result = call(command, str(tmp_path))
        assert result.exit_code == 3
        assert "the reward kind holds Python's lock; the request is heeded when that is over" in result.stderr
        assert f"troupe stop {tmp_path} --kill" in result.stderr
    assert hung.poll() is None


def test_a_run_that_hangs_can_be_ended(tmp_path: Path, hung: subprocess.Popen[bytes]) -> None:
    result = call("stop", str(tmp_path), "--kill")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"process {hung.pid} was killed, not answering for ")
    assert hung.wait(30) == -signal.SIGKILL
    (tmp_path / "control.sock").unlink()  # the system closes a dead one's
    assert call("status", str(tmp_path)).stdout.startswith(f"{tmp_path}: ")
    assert call("stop", str(tmp_path), "--kill").exit_code == 2, "nobody is there any more"


def test_a_run_that_answers_is_not_killed(host: Host) -> None:
    (host.folder / SILENT).write_text('{"pid": 1, "name": "x", "reason": "x", "since": 0}')
    assert call("stop", str(host.folder), "--kill").stderr == "troupe: refused: no brakes\n"
    assert call("stop", str(host.folder / "nowhere"), "--kill").exit_code == 2
