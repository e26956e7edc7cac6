"""RemoteGenerator: stands in for generators that run in processes of their own (`process.py`).

It brings prompts there and completions back. A process that dies is a fault of this actor; its successor starts all
anew.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import count
from typing import ClassVar, TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus

from troupe import errors
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import (
    Completed,
    End,
    Ended,
    FromProcess,
    Loaded,
    Made,
    NewWeights,
    Ping,
    Pong,
    Prompts,
    Ready,
    Refused,
    Setup,
    ToProcess,
    TurnEnded,
    decode_from_process,
    pack_prompt,
    unpack_rollout,
    unpack_turn,
)
from troupe.actors.ledgers import Rounds
from troupe.errors import RunError, TroupeError
from troupe.messages import Incident, Observation, Prompt, RolloutGroup, ScoredGroup, Span, TurnTaken
from troupe.policy import Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import MessageError, encode
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.process import ChildProcess
from troupe.runtime.reporter import Reporter

M = TypeVar("M")
_ASKERS = count(1)


class _Process:
    """One process and what is known of it."""

    def __init__(self, child: ChildProcess) -> None:
        self.child = child
        self.behind_s = 0.0
        """Seconds to add to its clock for the time of this process."""
        self.versions: set[int] = set()
        """Told to it, and not so old that its board has let go of them."""
        self.lent: Counter[int] = Counter()
        """Files that it has not said to have read."""
        self.made = 0
        """Tokens of the longest completion that it is at."""
        self.asker = 0
        """That its generator calls itself."""
        self.ended = anyio.Event()

    async def send(self, message: ToProcess) -> None:
        await self.child.send(encode(message))

    async def receive(self) -> FromProcess:
        message = decode_from_process(await self.child.receive())
        if isinstance(message, Refused):
            kind = getattr(errors, message.kind, RunError)
            raise kind(message.message) if issubclass(kind, TroupeError) else RunError(message.message)
        return message


class RemoteGenerator(Actor):
    """Receives Prompt, and Observation where the policy acts; sends RolloutGroup as groups come back, and TurnTaken.

    With several processes the prompts of a round are dealt to them by place, j mod n, so that what is decoded together
    is a function of slots alone. Weights go by file: in the pinned schedule the version of a step with its prompts, in
    the free one every version when it is published; prompts wait until the newest version of their time has been told,
    so that no process, which loads what it is told in order, completes them with an older one.
    """

    name = "generator"
    acknowledges: ClassVar[bool] = True

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        *,
        setups: Sequence[Setup],
        board: PolicyBoard[Weights],
        files: WeightsFiles,
        device: DeviceThread,
        turns: Channel[TurnTaken] | None = None,
        module: str = "troupe.actors.generator.process",
        handed_over: set[int] | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`setups`: one a process. `device`: the thread that writes files. `turns`: where turns of episodes are
        answered, where the policy acts. `module`: what each process runs. `handed_over` and `recorded` are as for
        `Rounds`."""
        super().__init__(inbox, [groups] if turns is None else [groups, turns], report)
        self._rounds = Rounds(inbox, groups, handed_over=handed_over, recorded=recorded)
        self._setups = setups
        self._pinned = setups[0].most_at_once is None
        self._board = board
        self._files = files
        self._device = device
        self._module = module
        self._turns = turns
        self._asker = next(_ASKERS)
        self._sending = anyio.Lock()
        self._came = anyio.Event()
        self._unsent: list[Prompt] = []
        self._shared, self._sharing = -1, anyio.Event()
        self._decoding: dict[int, tuple[list[Prompt], set[int]]] = {}
        """Group → the prompts that are done with together with its own, and those of them that are still open."""
        self._processes: list[_Process] = []
        self._following: anyio.CancelScope
        self._listeners: TaskGroup

    @property
    def made(self) -> int:
        """Tokens that the longest completion under way has, as of a second ago."""
        return max((process.made for process in self._processes), default=0)

    async def run(self) -> None:
        """Run while the processes are listened to."""
        self._following = anyio.CancelScope()
        async with anyio.create_task_group() as self._listeners:
            await super().run()

    async def start(self) -> None:
        """Start the processes, all at once."""
        with self.report.span("start process"):
            for _ in self._setups:
                self._processes.append(_Process(await ChildProcess.start(self._module)))
            async with anyio.create_task_group() as starting:
                for process, setup in zip(self._processes, self._setups, strict=True):
                    starting.start_soon(self._begin, process, setup)
        for process in self._processes:
            self._listeners.start_soon(self._listen, process)
        if not self._pinned:
            self._listeners.start_soon(self._follow)

    async def _begin(self, process: _Process, setup: Setup) -> None:
        await process.send(setup)
        _expect(Ready, await process.receive())
        asked_s = time.perf_counter()
        await process.send(Ping())
        while isinstance(message := await process.receive(), Span):
            pass  # its generator waits for prompts already, and says so; by a clock that is not known yet
        pong = _expect(Pong, message)
        answered_s = time.perf_counter()
        behind_s = (asked_s + answered_s) / 2 - pong.now_s
        # within what the message took it may well be the same clock, as it is on Linux and macOS
        process.behind_s = behind_s if abs(behind_s) > (answered_s - asked_s) / 2 else 0.0

    async def handle(self, message: Prompt | Observation) -> None:
        """Collect the prompts of a round and have it decoded when it is whole; or have decoded what is there."""
        if isinstance(message, Observation):
            self.inbox.done(message)  # who comes after would ask again
            await self._pass_on(message)
            return
        if self._pinned:
            if prompts := self._rounds.gather(message):
                await self._play([prompts], self._board.pinned_for(message.slot.step))
            return
        self._unsent.append(message)
        if not len(self.inbox):
            await self._until_shared(self._board.version)
            prompts, self._unsent = self._unsent, []
            await self._play([[prompt] for prompt in prompts], None)

    async def finish(self) -> None:
        """Wait until every process has told all."""
        self._following.cancel()
        for process in self._processes:
            await process.send(End())
        for process in self._processes:
            await process.ended.wait()

    async def stop(self) -> None:
        """End the processes; those that have not told all are killed."""
        processes, self._processes = self._processes, []
        for process in processes:
            if not process.ended.is_set():
                process.child.kill()
        for process in processes:
            await process.child.aclose()
            self.report.forget(process.child.pid)
            for version in process.lent.elements():
                self._files.give_back(version)

    async def _play(self, rounds: Sequence[list[Prompt]], version: int | None) -> None:
        """Have rounds decoded; where the policy acts, beside others, since answers to those come in meanwhile."""
        if self._turns is None:
            await self._decode(rounds, version)
        else:
            await self.tasks.start(self._decode_beside, rounds, version)

    async def _decode_beside(
        self, rounds: Sequence[list[Prompt]], version: int | None, *, task_status: TaskStatus[None]
    ) -> None:
        with self.inbox.kept_open():
            task_status.started()
            await self._decode(rounds, version)
            while any(prompt.gid in self._decoding for prompts in rounds for prompt in prompts):
                await self._came.wait()

    async def _pass_on(self, observation: Observation) -> None:
        if observation.gid not in self._decoding or observation.asker != self._asker:
            return
        process = self._processes[self._prompt(observation.gid).slot.place % len(self._processes)]
        await process.send(msgspec.structs.replace(observation, asker=process.asker))

    def _prompt(self, gid: int) -> Prompt:
        """Of a group that is being decoded."""
        return next(prompt for prompt in self._decoding[gid][0] if prompt.gid == gid)

    async def _decode(self, rounds: Sequence[list[Prompt]], version: int | None) -> None:
        parts: dict[int, list[Prompt]] = defaultdict(list)
        for prompts in rounds:
            if not await self._rounds.left(prompts, as_one=True):
                self._rounds.finish(prompts)
                continue
            still_open = {prompt.gid for prompt in prompts}
            for prompt in prompts:
                self._decoding[prompt.gid] = prompts, still_open
                parts[prompt.slot.place % len(self._processes)].append(prompt)
        if parts and version is not None:
            await self._share(version, [self._processes[i] for i in parts])
        for i, prompts in parts.items():
            packed = tuple(pack_prompt(prompt, round_size=len(prompts)) for prompt in prompts)
            self._processes[i].made = 0
            await self._processes[i].send(Prompts(prompts=packed))

    async def _share(self, version: int, processes: Sequence[_Process]) -> None:
        """Tell processes of a version that they have not been told of."""
        if all(version in process.versions for process in processes):
            return
        with self.report.span("wait for policy", kind="wait"):
            weights = await self._board.get(version)
        async with self._sending:  # another round may have had it sent meanwhile
            processes = [process for process in processes if version not in process.versions]
            if processes:
                await self._send_weights(version, weights, processes)

    async def _follow(self) -> None:
        """Tell every process of each new version, the newest where several came at once."""
        version = -1
        with self._following:
            while True:
                version, weights = await self._board.newer_than(version)
                await self._send_weights(version, weights, self._processes)
                del weights  # not held while the next one is waited for
                self._shared = version
                self._sharing.set()
                self._sharing = anyio.Event()

    async def _until_shared(self, version: int) -> None:
        """Wait until every process has been told of this version or of a newer one."""
        if self._shared < version:
            with self.report.span("wait for policy", kind="wait"):
                while self._shared < version:
                    await self._sharing.wait()

    async def _send_weights(self, version: int, weights: Weights, processes: Sequence[_Process]) -> None:
        self._files.keep(self._board.kept)
        for process in processes:
            self._files.lend(version)
            process.lent[version] += 1
        with self.report.span("write weights"):
            path = await self._device.run(self._files.write, version, weights)
        for process in processes:
            process.versions = {v for v in process.versions if v >= version - self._board.max_staleness} | {version}
            await process.send(NewWeights(version=version, path=str(path)))

    async def _listen(self, process: _Process) -> None:
        try:
            while not process.ended.is_set():
                await self._act_on(process, await process.receive())
        except Exception:
            if process in self._processes:  # else it was ended by us
                raise

    async def _act_on(self, process: _Process, message: FromProcess) -> None:
        match message:
            case Completed():
                await self._hand_over(message)
            case TurnEnded() if self._turns is not None:
                process.asker = message.asker
                taken = unpack_turn(message, self._prompt(message.gid))
                await self._turns.send(msgspec.structs.replace(taken, asker=self._asker))
            case Span():
                shift_s = process.behind_s
                self.report.forward(
                    msgspec.structs.replace(message, start_s=message.start_s + shift_s, end_s=message.end_s + shift_s)
                )
            case Made(tokens=tokens):
                process.made = tokens
            case Incident():
                await self.report.incident(message)
            case Loaded(version=version):
                process.lent -= Counter([version])  # which forgets what has come to 0
                self._files.give_back(version)
            case Ended():
                process.ended.set()
            case _:
                raise MessageError(f"the generator's process sent {type(message).__name__} out of turn")

    async def _hand_over(self, completed: Completed) -> None:
        prompt = self._prompt(completed.gid)
        prompts, still_open = self._decoding[completed.gid]
        rollouts = tuple(map(unpack_rollout, completed.rollouts))
        group = RolloutGroup(prompt=prompt, rollouts=rollouts, prompt_experts=completed.prompt_experts)
        await self._rounds.hand_over(group)
        still_open.discard(prompt.gid)
        if not still_open:
            self._rounds.finish(prompts)
        del self._decoding[completed.gid]
        self._came.set()
        self._came = anyio.Event()


def _expect(kind: type[M], message: FromProcess) -> M:
    if not isinstance(message, kind):
        raise MessageError(f"the generator's process sent {type(message).__name__} where {kind.__name__} was due")
    return message
