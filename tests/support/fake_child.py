"""A generator's process that is none: it answers as a fake worker does, takes a while, and may die."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio

from tests.support.fake_worker import completions
from troupe.actors.generator.child import Listener
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import Setup
from troupe.messages import Observation, RolloutGroup
from troupe.runtime.process import ChildEnded

_PIDS = count(1)


class FakeChild:
    """As a `GeneratorChild`; parts are decoded one after another, or in the free schedule all at once."""

    def __init__(self, machine: FakeMachine, setup: Setup, listener: Listener) -> None:
        self.machine, self.setup, self.listener = machine, setup, listener
        self.newest = -1
        self.parts: dict[str, set[int]] = {}
        self.pace = SimpleNamespace(per_second=10.0)
        self.pid = next(_PIDS)
        self.versions: dict[int, bytes] = {}
        self.fault: Exception | None = None
        self._died = anyio.Event()
        self._send, self._receive = anyio.create_memory_object_stream[Part](1000)

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            await self._died.wait()
            assert self.fault is not None
            raise self.fault

    async def load(self, version: int, path: Path) -> None:
        self._living()
        if version >= self.newest - self.setup.max_staleness:
            self.versions[version] = path.read_bytes()  # noqa: ASYNC240 - a few bytes
            self.newest = max(self.newest, version)

    def has(self, version: int) -> bool:
        return version in self.versions

    async def decode(self, *parts: Part) -> None:
        self._living()
        for part in parts:
            if part.name in self.parts:
                continue
            self.parts[part.name] = {prompt.gid for prompt in part.prompts}
            self._send.send_nowait(part)

    async def observe(self, observation: Observation) -> None:
        raise AssertionError("nobody acts here")

    def kill(self) -> None:
        self.die("killed")

    def die(self, how: str) -> None:
        if self.fault is None:
            self.fault = ChildEnded(how)
            self._died.set()

    async def aclose(self) -> None:
        self.kill()
        self.machine.children.remove(self)
        self._send.close()
        self._receive.close()

    def _living(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def _work(self) -> None:
        async for part in self._receive:
            await anyio.sleep(self.machine.seconds(part))
            if self.machine.dies(part):
                self.die("it was killed by SIGKILL")
                return
            for prompt in part.prompts:
                version = self.newest if part.version is None else part.version
                assert self.versions[version] == self.machine.weights[version], "the version that the run has"
                group: RolloutGroup = completions(prompt, self.machine.answers_as(version))
                await self.listener.on_group(group)
                self.parts[part.name].discard(prompt.gid)
            del self.parts[part.name]
            self.machine.decoded.append(part.name)


class FakeMachine:
    """What a worker's machine is: where its children and its files are, and how they fare."""

    def __init__(self, folder: Path, weights: dict[int, bytes]) -> None:
        self.folder, self.weights = folder, weights
        self.children: list[FakeChild] = []
        self.started = 0
        self.decoded: list[str] = []
        self.seconds: Callable[[Part], float] = lambda part: 1.0
        self.dies: Callable[[Part], bool] = lambda part: False
        self.answers_as: Callable[[int], int] = lambda version: version
        """Whose completions it makes with the weights of a version."""
        self.said: list[str] = []

    async def start(self, setup: Setup, listener: Listener) -> Any:
        """Another child."""
        await anyio.sleep(1.0)
        self.started += 1
        self.children.append(FakeChild(self, setup, listener))
        return self.children[-1]

    @contextmanager
    def scratch(self, needed: int) -> Iterator[Path]:
        """A folder that must be there for nobody else, and is emptied in the end."""
        folder = self.folder / "scratch"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


class InlineDevice:
    """As a `DeviceThread` whose work is done at once."""

    async def run(self, function: Callable[..., Any], *args: Any, plain: bool = False) -> Any:
        return function(*args)

    @asynccontextmanager
    async def turn(self, *_: Any, **__: Any) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def iterate(self, iterator: Iterator[Any], *, on_leave: Callable[[], None]) -> AsyncIterator[Any]:
        async def following() -> Any:
            await anyio.sleep(0.01)
            return next(iterator, None)

        yield SimpleNamespace(next=following)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *fault: object) -> None:
        return None
