"""The generator in a process of its own: `python -m troupe.actors.generator.process`.

The same actor as in a thread, behind a mailbox that is fed from the connection. Its policy board holds what it has
loaded of the files that the run wrote.
"""

import os
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import anyio
import mlx.core as mx

from troupe.actors.evaluator.decoding import CompletionDecoder
from troupe.actors.generator.acting import ActingGenerator
from troupe.actors.generator.actor import Generator
from troupe.actors.generator.bases import read_base
from troupe.actors.generator.rows import RowsDecoding
from troupe.actors.generator.wire import (
    Completed,
    End,
    Ended,
    Loaded,
    Made,
    NewWeights,
    Ping,
    Pong,
    Prompts,
    Ready,
    Refused,
    Rows,
    Setup,
    decode_in_process,
    pack_group,
    pack_turn,
    unpack_prompt,
)
from troupe.errors import TroupeError
from troupe.messages import Incident, Observation, Prompt, RolloutGroup, Span, TurnTaken
from troupe.policy import (
    Base,
    Companions,
    GenerationConfig,
    RolloutEngine,
    Tokenizer,
    Weights,
)
from troupe.runtime import linux_cpu
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import Connection, encode
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.memory import memory_limited
from troupe.runtime.process import serve
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import together

_INCIDENTS, _SPANS = 256, 4096
_MADE_EVERY_S = 1.0


async def run_generator(connection: Connection) -> None:
    """Run a generator from the first frame to the end of the connection."""
    setup = decode_in_process(await connection.receive())
    assert isinstance(setup, Setup)
    if setup.on_cpu:
        mx.set_default_device(mx.cpu)
    try:
        with linux_cpu.blas_limited(setup.blas_threads), memory_limited(setup.limit_gb):
            if setup.on_cpu:
                linux_cpu.take_buffers(1 + (setup.blas_threads or 1))
            await GeneratorProcess(connection, setup).run()
    except TroupeError as error:
        await connection.send(encode(Refused(kind=type(error).__name__, message=str(error))))
        while True:
            await connection.receive()  # until the run has read it and closes


class Frames(Protocol):
    """What frames come and go by."""

    async def send(self, frame: bytes) -> None: ...

    async def receive(self) -> bytes: ...


class GeneratorProcess:
    """The generator with its wires."""

    def __init__(
        self,
        connection: Frames,
        setup: Setup,
        *,
        board: PolicyBoard[Weights] | None = None,
        base: Base | None = None,
        device: DeviceThread | None = None,
    ) -> None:
        """`board`, `base`, `device`: what is there already, where the process learns, too; not closed at the end."""
        self._connection, self._setup = connection, setup
        self._base, self._has_base = Base() if base is None else base, base is not None
        tokenizer = _tokenizer(setup)
        inbox, self._outbox = Mailbox("generator"), Mailbox("outbox")
        self._prompts: Channel[Prompt] = inbox.channel("prompts", Prompt, bound=setup.live)
        self._board: PolicyBoard[Weights] = PolicyBoard(setup.max_staleness) if board is None else board
        self._device, self._loader = device or DeviceThread("generator"), DeviceThread("weights")
        self._threads = [self._loader] if device is not None else [self._device, self._loader]
        self._observations: Channel[Observation] | None = None
        groups = self._outbox.channel("rollouts", RolloutGroup, bound=setup.live)
        report = Reporter(
            setup.name,
            self._outbox.channel("incidents", Incident, bound=_INCIDENTS),
            self._outbox.channel("spans", Span, bound=_SPANS, overflow="drop_oldest"),
            process=os.getpid(),
        )
        shared: dict[str, Any] = {
            "engine": partial(self._engine, tokenizer, setup.generation, records_experts=setup.records_experts),
            "device": self._device,
            "board": self._board,
            "decode_text": tokenizer.decode_sampled,
            "report": report,
        }
        self._rows = RowsDecoding(
            [
                CompletionDecoder(
                    partial(self._engine, tokenizer, generation),
                    self._device,
                    seed=setup.seed,
                    decode_text=tokenizer.decode_sampled,
                    report=report,
                    told_as="evaluate",
                )
                for generation in setup.sets
            ],
            there=lambda: self._board.kept,
            load=partial(self._loader.run, _load),
            tell=self._send,
        )
        self._generator: Generator | ActingGenerator
        if setup.acts is None:
            shared |= {"seed": setup.seed, "most_at_once": setup.most_at_once, "parts": setup.parts}
            self._generator = Generator(inbox, groups, **shared)
        else:
            at_once = setup.live * setup.generation.num_generations
            self._observations = inbox.channel("observations", Observation, bound=at_once, side=True)
            turns = self._outbox.channel("turns", TurnTaken, bound=at_once)
            self._generator = ActingGenerator(inbox, groups, turns, config=setup.acts, **shared)

    async def run(self) -> None:
        async with AsyncExitStack() as devices:
            for thread in self._threads:
                await devices.enter_async_context(thread)
            if self._setup.base is not None and not self._has_base:
                self._base = await self._loader.run(read_base, self._setup.policy, self._setup.base)
            await self._connection.send(encode(Ready()))
            await together([self._listen, self._generate, self._rows.run, self._tell_made])

    def _engine(
        self, tokenizer: Tokenizer, generation: GenerationConfig, *, records_experts: bool = False
    ) -> RolloutEngine:
        setup = self._setup
        return RolloutEngine(
            setup.policy,
            generation,
            stop_ids=frozenset(setup.stop_ids),
            tokenizer=tokenizer,
            base=self._base,
            records_experts=records_experts,
        )

    async def _send(self, completed: Completed) -> None:
        await self._connection.send(encode(completed))

    async def _generate(self) -> None:
        await together([self._generator.run, self._tell])
        await self._connection.send(encode(Ended()))

    async def _tell(self) -> None:
        async for message in self._outbox:
            if isinstance(message, TurnTaken):
                message = pack_turn(message)
            elif isinstance(message, RolloutGroup):
                message = pack_group(message)
            await self._connection.send(encode(message))

    async def _tell_made(self) -> None:
        """As `_listen`."""
        told = 0
        while True:
            await anyio.sleep(_MADE_EVERY_S)
            if (made := self._generator.made) != told:
                told = made
                await self._connection.send(encode(Made(tokens=made)))

    async def _listen(self) -> None:
        """Until the run closes the connection, which ends all the rest."""
        while True:
            match decode_in_process(await self._connection.receive()):
                case Prompts(prompts=prompts):
                    for packed in prompts:
                        self._prompts.send_nowait(unpack_prompt(packed))
                case Rows() as rows:
                    self._rows.add(rows)
                case NewWeights(version=version, path=path):
                    self._rows.forget()
                    if path:
                        self._board.publish(version, await self._loader.run(_load, Path(path)))
                    else:
                        await self._board.get(version)
                    await self._connection.send(encode(Loaded(version=version)))
                case Observation() as observation if self._observations is not None:
                    await self._observations.send(observation)
                case Ping():
                    await self._connection.send(encode(Pong(now_s=time.perf_counter())))
                case End():
                    self._prompts.close()


def _tokenizer(setup: Setup) -> Tokenizer:
    if not setup.tokenizer_files:
        return Tokenizer.from_pretrained(setup.tokenizer)
    with TemporaryDirectory(prefix="troupe-tokenizer-") as folder:
        Companions(setup.tokenizer_files).write_unchanged(Path(folder))
        return Tokenizer.from_pretrained(folder)


def _load(path: Path) -> Weights:
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


if __name__ == "__main__":
    serve(run_generator)
