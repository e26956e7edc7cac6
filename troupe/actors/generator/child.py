"""GeneratorChild: one generator in a process of its own (`process.py`), spoken to over pipes.

It knows no run: who starts it gives it parts and files of weights, and is told what comes of them.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import anyio
import msgspec

from troupe import errors
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import (
    Completed,
    End,
    Ended,
    FromProcess,
    Loaded,
    Made,
    NewWeights,
    PackedPrompt,
    Ping,
    Pong,
    Prompts,
    Ready,
    Refused,
    Rows,
    Setup,
    ToProcess,
    TurnEnded,
    decode_from_process,
    pack_prompt,
    unpack_rollout,
    unpack_turn,
)
from troupe.errors import RunError, TroupeError
from troupe.messages import Incident, Observation, Prompt, RolloutGroup, Span, TurnTaken
from troupe.runtime.frames import FrameError, MessageError, encode
from troupe.runtime.process import ChildEnded, ChildProcess

M = TypeVar("M")
_PACE_S = 60.0  # of work, after which what was before counts half
MODULE = "troupe.actors.generator.process"

CHILD_FAULTS = (ChildEnded, FrameError, MessageError, anyio.BrokenResourceError, OSError)
"""What a child's end, or what is no answer of one, looks like here: another child may do better."""


class Listener(Protocol):
    """Who is told what a child does. Nothing else is heard of it while one of these is awaited."""

    async def on_group(self, group: RolloutGroup) -> None:
        """A group is complete; with the prompt that was given to the child."""

    async def on_turn(self, taken: TurnTaken) -> None:
        """A sample waits for an answer, which `observe` gives; `asker` is what the child calls itself."""

    async def on_incident(self, incident: Incident) -> None: ...

    def on_span(self, span: Span) -> None:
        """Its times are by the clock of this process; ends are infinite where it has only begun."""

    def on_made(self, tokens: int) -> None:
        """How many the longest completion under way has; about once a second."""


class Child(Protocol):
    """A process, or what is spoken to like one."""

    @property
    def pid(self) -> int: ...

    async def send(self, frame: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    def kill(self) -> None: ...

    async def aclose(self) -> None: ...


class Pace:
    """Tokens a second of late, while there was work."""

    def __init__(self) -> None:
        self._tokens = self._busy_s = 0.0
        self._since_s: float | None = None

    def work(self, *, is_there: bool) -> None:
        """Whether there is work, from now on."""
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s if is_there else None
        if self._busy_s > _PACE_S:
            self._busy_s, self._tokens = self._busy_s / 2, self._tokens / 2

    def add(self, tokens: int) -> None:
        """So many were sampled."""
        self._tokens += tokens

    @property
    def per_second(self) -> float | None:
        """None while nothing is known."""
        busy_s = self._busy_s + (0.0 if self._since_s is None else time.perf_counter() - self._since_s)
        return self._tokens / busy_s if self._tokens and busy_s > 0 else None


class GeneratorChild:
    """One running child; made by `start`, which is followed by `run` in a task and in the end by `aclose`."""

    def __init__(self, child: Child, setup: Setup, listener: Listener, *, holds_from: int | None = None) -> None:
        """`holds_from`: the first version that is where it works without being brought there; None: each is brought."""
        self.setup = setup
        self.holds_from = holds_from
        self.newest = -1
        """The newest version that it has read."""
        self.parts: dict[str, set[int]] = {}
        """Parts that it has in hand → their groups that are still to come."""
        self.pace = Pace()
        self._child, self._listener = child, listener
        self._behind_s = 0.0
        """Seconds to add to its clock for the time of this process."""
        self._prompts: dict[int, Prompt] = {}
        self._told: dict[int, bool] = {}
        """Version that it was told of, and would keep → whether it has read it."""
        self._reading, self._came, self._over = anyio.Event(), anyio.Event(), anyio.Event()
        self._finishing = self._ended = False

    @classmethod
    async def start(
        cls,
        setup: Setup,
        listener: Listener,
        *,
        module: str = MODULE,
        env: Mapping[str, str] | None = None,
    ) -> "GeneratorChild":
        """Start a process and wait until it is ready. `env` is added to this process's environment.

        Raises:
            TroupeError: it says that it cannot work, which no other one could either.
            One of CHILD_FAULTS: it failed.
        """
        return await cls.over(await ChildProcess.start(module, env=env), setup, listener)

    @classmethod
    async def over(
        cls, process: Child, setup: Setup, listener: Listener, *, holds_from: int | None = None
    ) -> "GeneratorChild":
        """The same with a process that is there."""
        child = cls(process, setup, listener, holds_from=holds_from)
        try:
            await child._begin()
        except BaseException:
            child.kill()
            await child.aclose()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._child.pid

    async def run(self) -> None:
        """Listen until the child has ended, as it was asked to. Raises as `start`, and what the listener raises."""
        try:
            while not self._ended:
                await self._act_on(await self._receive())
        finally:
            self._over.set()

    async def load(self, version: int, path: Path | None) -> None:
        """Have it read the safetensors file of a version, and wait until it has; None: it is there by itself. A version
        is read once; one that is older than it may keep beside what it has is not read at all."""
        if self._finishing:
            return
        if version >= max(self._told, default=-1) - self.setup.max_staleness and version not in self._told:
            self._told[version] = False
            await self._send(NewWeights(version=version, path="" if path is None else str(path)))
        await self.loaded(version)

    def has(self, version: int) -> bool:
        """Whether it was told of a version, and would keep it."""
        return version in self._told

    async def loaded(self, version: int) -> None:
        """Wait until it has read this version, or one that is newer by more than it keeps beside that."""
        while version >= self.newest - self.setup.max_staleness and not self._told.get(version):
            await self._reading.wait()

    async def decode(self, *parts: Part) -> None:
        """Give it parts; what they are pinned to was loaded, or in the free schedule any version. Groups come to the
        listener. A part that it has in hand is not given once more."""
        packed = [prompt for part in parts for prompt in self._packed(part)]
        if packed:
            await self._send(Prompts(prompts=tuple(packed)))

    async def evaluate(self, part: Part, path: Path) -> None:
        """The same with a part of an evaluation, and the file of its version, which has to stay there until the part is
        done (`until_done`)."""
        assert part.set is not None
        assert part.version is not None
        if packed := self._packed(part):
            await self._send(Rows(set=part.set, version=part.version, path=str(path), prompts=tuple(packed)))

    async def until_done(self, part: str) -> None:
        """Wait until it has not this part in hand."""
        while part in self.parts:
            await self._came.wait()

    async def observe(self, observation: Observation) -> None:
        """Answer a turn; `asker` as the child calls itself."""
        if observation.gid in self._prompts:
            await self._send(observation)

    async def room(self, most: int) -> None:
        """Wait until it has fewer than `most` parts in hand."""
        while len(self.parts) >= most:
            await self._came.wait()

    async def finish(self) -> None:
        """No more parts will come, and no weights; wait until it has told all, or has failed. `run` must be
        listening."""
        self._finishing = True
        await self._send(End())
        await self._over.wait()

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()

    async def aclose(self) -> None:
        """End it, by force where it has not told all. Nothing of it is left afterwards. Safe to call twice."""
        if not self._ended:
            self.kill()
        await self._child.aclose()

    async def _begin(self) -> None:
        await self._send(self.setup)
        _expect(Ready, await self._receive())
        asked_s = time.perf_counter()
        await self._send(Ping())
        while isinstance(message := await self._receive(), Span):
            pass  # its generator waits for prompts already, and says so; by a clock that is not known yet
        pong = _expect(Pong, message)
        answered_s = time.perf_counter()
        behind_s = (asked_s + answered_s) / 2 - pong.now_s
        # within what the message took it may well be the same clock, as it is on Linux and macOS
        self._behind_s = behind_s if abs(behind_s) > (answered_s - asked_s) / 2 else 0.0

    def _packed(self, part: Part) -> list[PackedPrompt]:
        """The prompts of a part that it has in hand from now on; none where it had it already."""
        if part.name in self.parts:
            return []
        self.parts[part.name] = {prompt.gid for prompt in part.prompts}
        self._prompts |= {prompt.gid: prompt for prompt in part.prompts}
        self.pace.work(is_there=True)
        return [pack_prompt(prompt, round_size=len(part.prompts)) for prompt in part.prompts]

    async def _send(self, message: ToProcess) -> None:
        await self._child.send(encode(message))

    async def _receive(self) -> FromProcess:
        message = decode_from_process(await self._child.receive())
        if isinstance(message, Refused):
            kind = getattr(errors, message.kind, RunError)
            raise kind(message.message) if issubclass(kind, TroupeError) else RunError(message.message)
        return message

    async def _act_on(self, message: FromProcess) -> None:
        match message:
            case Completed():
                await self._complete(message)
            case TurnEnded() if self.setup.acts is not None:
                self.pace.add(len(message.token_ids) // 4)
                if message.gid in self._prompts:
                    await self._listener.on_turn(unpack_turn(message, self._prompts[message.gid]))
            case Span():
                self._listener.on_span(_shifted(message, self._behind_s))
            case Made(tokens=tokens):
                self._listener.on_made(tokens)
            case Incident():
                await self._listener.on_incident(message)
            case Loaded(version=version) if version in self._told:
                self._told[version] = True
                self.newest = max(self.newest, version)
                for old in [v for v in self._told if v < self.newest - self.setup.max_staleness]:
                    del self._told[old]
                self._reading.set()
                self._reading = anyio.Event()
            case Ended():
                self._ended = True
            case _:
                raise MessageError(f"the generator's process sent {type(message).__name__} out of turn")

    async def _complete(self, completed: Completed) -> None:
        prompt = self._prompts.pop(completed.gid, None)
        if prompt is None:
            raise MessageError(f"the generator's process completed group {completed.gid}, which it does not have")
        rollouts = tuple(map(unpack_rollout, completed.rollouts))
        if self.setup.acts is None:
            self.pace.add(sum(len(rollout.token_ids) for rollout in rollouts))
        await self._listener.on_group(
            RolloutGroup(prompt=prompt, rollouts=rollouts, prompt_experts=completed.prompt_experts)
        )
        for name, left in [*self.parts.items()]:
            left.discard(completed.gid)
            if not left:
                del self.parts[name]
        self.pace.work(is_there=bool(self.parts))
        self._came.set()
        self._came = anyio.Event()


def _shifted(span: Span, shift_s: float) -> Span:
    return msgspec.structs.replace(span, start_s=span.start_s + shift_s, end_s=span.end_s + shift_s)


def _expect(kind: type[M], message: FromProcess) -> M:
    if not isinstance(message, kind):
        raise MessageError(f"the generator's process sent {type(message).__name__} where {kind.__name__} was due")
    return message
