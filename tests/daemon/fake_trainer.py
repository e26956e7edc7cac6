"""A trainer that follows a script instead of making a run: `python -m tests.daemon.fake_trainer`. It loads no MLX.

`OUT/script.json` has one list of acts for each start, the last one for all further ones; `OUT/starts.jsonl` gets the
first frame of each start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec

from troupe.daemon.control.answers import answer
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
    decode_in_trainer,
)
from troupe.errors import ConfigError
from troupe.messages import Incident, Status
from troupe.records.layout import PAGE
from troupe.runtime.frames import Connection, encode
from troupe.runtime.process import serve
from troupe.runtime.roles import together

TOTAL = 10


class FakeRun:
    """What a Supervisor offers, and what was asked of it."""

    def __init__(self, *, paused: bool) -> None:
        self.step_now = 0
        self.asked: list[str] = []
        self.paused = paused
        self.ends = anyio.Event()

    @property
    def pausing(self) -> bool:
        return self.paused

    def status(self) -> Status:
        return Status(
            phase="paused" if self.paused else "running",
            step=self.step_now,
            total_steps=TOTAL,
            policy_version=self.step_now,
            groups=(),
            queues={},
            doing={"learner": "waits: idle for 1.0 s"},
            held=tuple(self.asked),
            rewards_down={},
            restarts={},
            incidents={},
            metrics={"reward": 0.5},
        )

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def step(self, n: int = 1) -> None:
        self.asked.append(f"step {n}")

    def checkpoint(self) -> None:
        self.asked.append("checkpoint")

    def drain(self) -> None:
        self.asked.append("drain")
        self.ends.set()

    def stop(self) -> None:
        self.asked.append("stop")
        self.ends.set()

    def set(self, key: str, value: Any) -> None:
        if key != "learner.lr":
            raise ConfigError(f"set {key}: cannot change while a run is live")
        self.asked.append(f"{key}={value}")

    async def check(self, key: str, value: Any) -> None:
        raise ConfigError(f"set {key}: cannot change while a run is live")


async def follow(connection: Connection) -> None:
    """Make the acts of this start, one after the other, and answer meanwhile."""
    begin = decode_in_trainer(await connection.receive())
    assert isinstance(begin, Begin)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    folder = Path(begin.output)
    with (folder / "starts.jsonl").open("ab") as starts:
        starts.write(msgspec.json.encode(begin) + b"\n")
    start = len((folder / "starts.jsonl").read_bytes().splitlines()) - 1
    script = json.loads((folder / "script.json").read_bytes())
    run = FakeRun(paused=begin.paused)
    listening = anyio.CancelScope()

    async def listen() -> None:
        with listening:
            while True:
                ask = decode_in_trainer(await connection.receive())
                assert isinstance(ask, Ask)
                await connection.send(encode(Answer(number=ask.number, reply=answer(run, ask.request))))

    async def make() -> None:
        for act in script[min(start, len(script) - 1)]:
            await _make(act, connection, run, folder)
        listening.cancel()

    await together([listen, make])


async def _make(act: Any, connection: Connection, run: FakeRun, folder: Path) -> None:
    match act:
        case ["start", step]:
            run.step_now = step
            (folder / "run.toml").write_text("")
            await connection.send(encode(Started(notices=("a notice",), step=step, total_steps=TOTAL, speaks=False)))
        case ["step", step]:
            run.step_now = step
            stepped = Stepped(step=step, total_steps=TOTAL, metrics={"reward": 0.25}, incidents={"odd": step})
            await connection.send(encode(stepped))
        case ["tell", incident]:
            told = Happened(incidents=(msgspec.convert(incident, Incident),))
            await connection.send(encode(told))
        case ["tell page"]:
            (folder / "page-seen").write_text((folder / PAGE).read_text())
        case ["move", target]:
            folder.rename(folder.parent / target)  # noqa: ASYNC240 - nobody else is here
        case ["make", target]:
            (folder.parent / target).mkdir()
        case ["say", text]:
            print(text, flush=True)
        case ["wait"]:
            await run.ends.wait()
        case ["finish", steps]:
            await connection.send(encode(Finished(steps=steps, total_steps=TOTAL)))
        case ["reject", message]:
            await connection.send(encode(Rejected(message=message)))
        case ["fail", message]:
            await connection.send(encode(Failed(message=message)))
        case ["exit", code]:
            sys.stdout.flush()
            os._exit(code)
        case ["kill", number]:
            os.kill(os.getpid(), number)
        case ["raise", message]:
            raise RuntimeError(message)
        case ["garbage"]:
            await connection.send(b"\xc1 no message")
        case ["deaf"]:
            signal.pause()
        case _:
            raise AssertionError(act)


if __name__ == "__main__":
    serve(follow)
