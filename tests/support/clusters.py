"""Clusters of real processes on this machine: a run that serves, its workers, and the harm that is done to them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.kills import STEPS, P, newest_step, read_store, write_run
from tests.support.runs import lines, timeless
from troupe.daemon.control.protocol import NobodyThereError, ask
from troupe.errors import RunError
from troupe.messages import Done, GetStatus, MemberStatus, Pause, Resume, Status
from troupe.runtime.terminal import EXIT_INTERRUPTED

_MARK = "TROUPE_TEST_CLUSTER"
_PATIENCE_S = 240.0
LEASE_S = 5.0

SETTINGS: dict[str, Any] = {
    "schedule__parts": 4,
    "schedule__max_staleness": 1,
    "schedule__generator": "thread",
    "metrics__sinks": ["jsonl", "sqlite", "trace"],
}
"""Of the run whichever way it is decoded."""
SERVING: dict[str, Any] = {"cluster__lease_s": LEASE_S, "cluster__local_parts": False}


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def until(holds: Callable[[], bool], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Wait for something; AssertionError that names it where it does not come."""
    deadline_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.02)


class Cluster:
    """A run in a process of its own that serves at `host`, and its workers. Everything it starts has a mark in its
    environment, by which what is left over is found."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", inside: tuple[str, ...] = (), **settings: Any) -> None:
        """`inside`: a command that runs another one, such as in a network namespace; for the run."""
        self.config = write_run(folder, **SETTINGS | SERVING | settings)
        self.out, self._folder, self._inside = folder / "out", folder, inside
        self._address = f"{host}:{free_port()}"
        self._mark = uuid.uuid4().hex
        self._environment = {**os.environ, "COLUMNS": "120", _MARK: self._mark}
        self.run: subprocess.Popen[bytes]
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._joins: dict[str, int] = {}

    def start(self, *, resume: bool = False) -> None:
        """Begin the run, or go on with it, and wait until it can be joined."""
        ticket = self.out / "join" / "worker.toml"
        arguments = ["train", str(self.config), "-o", str(self.out), "--serve", self._address]
        self.run = self._troupe("run", *arguments, *(["--resume"] if resume else []), inside=self._inside)
        until(lambda: ticket.exists() or self.run.poll() is not None, "a ticket")
        assert self.run.poll() is None, self.log("run")

    def invite(self, name: str) -> None:
        """Have a ticket written for one more worker."""
        code = self._troupe("cluster", "cluster", "invite", str(self.out), name).wait(_PATIENCE_S)
        assert code == 0, self.log("cluster")

    def join(self, name: str = "worker", *options: str, inside: tuple[str, ...] = (), device: str = "cpu") -> None:
        """Start a worker, anew where it was killed; `options` of its command."""
        ticket = self.out / "join" / f"{name}.toml"
        if not ticket.exists():
            self.invite(name)
        self._joins[name] = self._told_to_have_joined(name) + 1
        arguments = ["worker", "--join", str(ticket), "--device", device, *options]
        self.workers[name] = self._troupe(name, *arguments, inside=inside)

    def gather(self, *names: str) -> None:
        """Start workers, and have the run begin its steps when all are ready, so that each has work."""
        self.asked(Pause())
        for name in names:
            self.join(name)
        until(lambda: all(self.is_ready(name) for name in names), f"{names} are ready\n{self.log('run')}")
        self.asked(Resume())

    def asked(self, request: Pause | Resume) -> None:
        """Ask the run for something, as soon as it answers."""

        def is_heeded() -> bool:
            with suppress(NobodyThereError, RunError, OSError):
                return isinstance(ask(self.out, request, 10.0), Done)
            return False

        until(is_heeded, f"{request}\n{self.log('run')}")

    def is_ready(self, name: str) -> bool:
        """Whether a worker has been taken, has proved what it must, and may have work."""
        member = self.member(name)
        return member is not None and member.state in ("idle", "working") and member.version is not None

    def status(self) -> Status | None:
        """What the run says; None where it does not answer."""
        with suppress(NobodyThereError, RunError, OSError):
            reply = ask(self.out, GetStatus(), 10.0)
            return reply if isinstance(reply, Status) else None
        return None

    def member(self, name: str) -> MemberStatus | None:
        """What the run says of a worker."""
        status = self.status()
        return None if status is None else next((one for one in status.members if one.name == name), None)

    def at_work(self, name: str) -> bool:
        """Whether a worker, as it was started last, has parts on lease now."""
        if self._told_to_have_joined(name) < self._joins[name]:
            return False
        member = self.member(name)
        return member is not None and member.state == "working" and bool(member.leases)

    def _told_to_have_joined(self, name: str) -> int:
        with suppress(OSError):
            return (self._folder / f"{name}.log").read_bytes().count(b"joined the run")
        return 0

    @property
    def steps(self) -> int:
        """Learner batches that metrics.jsonl has."""
        with suppress(OSError):
            return (self.out / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    @property
    def goes_on(self) -> bool:
        """Whether the run has not ended."""
        return self.run.poll() is None

    def at_step(self, step: int) -> bool:
        """Wait until a step is done → whether the run still goes on."""
        until(lambda: self.steps >= step or not self.goes_on, f"step {step}\n{self.log('run')}")
        return self.goes_on

    def harm(self, name: str, what: int = signal.SIGKILL) -> None:
        """Send a worker a signal."""
        self.workers[name].send_signal(what)
        if what == signal.SIGKILL:
            self.workers.pop(name).wait()

    def harm_all(self, name: str, what: int) -> None:
        """Send a signal to a worker and to the processes that it has started."""
        worker = self.workers[name]
        with suppress(OSError):
            children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text()
            for pid in map(int, children.split()):
                os.kill(pid, what)
        worker.send_signal(what)

    def parts_by_member(self, told_as: str = "generate") -> dict[str, int]:
        """Worker → parts that it decoded, by the run's timeline. `told_as`: `evaluate` for those of evaluations."""
        events = json.loads((self.out / "trace.json").read_bytes())
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        return dict(
            Counter(
                names[e["pid"]]
                for e in events
                if e["ph"] == "X" and e["name"] == told_as and e["pid"] in names and names[e["pid"]] in self.workers
            )
        )

    def kill_run(self) -> None:
        """As the kernel does when memory runs out."""
        self.run.kill()
        self.run.wait()

    def server(self) -> int | None:
        """Pid of the message server."""
        return next(
            (pid for pid, command in self.left() if Path(command.partition("\0")[0]).name == "nats-server"), None
        )

    def finish(self) -> None:
        """The run must end well by itself, and its workers with it; nobody is left. Who came too late to hear of the
        end waits for the run to be gone on with, until told to end."""
        code = self.run.wait(_PATIENCE_S)
        assert code == 0, self.log("run")
        for name, worker in self.workers.items():
            heard = self._told_to_have_joined(name) >= self._joins[name]
            if not heard:
                worker.terminate()
            assert worker.wait(60.0) in ((0,) if heard else (0, EXIT_INTERRUPTED)), self.log(name)
        until(lambda: not self.left(), f"no process left: {self.left()}", 20.0)

    def left(self) -> list[tuple[int, str]]:
        """Pid and command of everything that was started here, by whomever, and lives: what has the mark, or the run's
        folder on its command line, since the server is given no environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                marked = f"{_MARK}={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if command and (marked or str(self.out) in command):
                    found.append((int(entry.name), command))
        return found

    def close(self) -> None:
        """End whatever is left."""
        for pid, _ in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log(self, name: str) -> str:
        """The end of what a process has printed."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def _troupe(self, name: str, *arguments: str, inside: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            command = [*inside, sys.executable, "-m", "troupe", *arguments]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment)


@contextmanager
def a_cluster(folder: Path, **options: Any) -> Iterator[Cluster]:
    """A run that has begun and waits for its workers; whatever is left of it in the end is killed."""
    cluster = Cluster(folder, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def alone(folder: Path, **settings: Any) -> Path:
    """The same run without workers; its folder."""
    config, out = write_run(folder, **SETTINGS | settings), folder / "out"
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "troupe", "train", str(config), "-o", str(out)]
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    return out


def final_hash(out: Path) -> str:
    """Of the weights that a run ended with."""
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


def check_same(out: Path, whole: Path) -> None:
    """The same weights, figures, completions and ends of groups, each once."""
    assert final_hash(out) == final_hash(whole)
    assert [timeless(line) for line in lines(out)] == [timeless(line) for line in lines(whole)]
    assert read_store(out) == read_store(whole)
    check_each_once(out)


def check_each_once(out: Path, steps: int = STEPS) -> None:
    """Every group was closed, and trained on, once."""
    told = lines(out)
    assert [line["step"] for line in told] == list(range(1, steps + 1))
    groups = [gid for gid, _, _ in read_store(out)["groups"]]
    assert len(groups) == len(set(groups)) == steps * P
    assert newest_step(out) == steps
