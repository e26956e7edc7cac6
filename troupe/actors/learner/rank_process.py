"""Another rank of the learner, in a process of its own: `python -m troupe.actors.learner.rank_process`.

It has the learner's state, gets every batch whole, and makes every update as the learner does; of the gradient it
computes the share of its lanes.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import mlx.core as mx
from anyio.abc import TaskGroup

from troupe.actors.generator.bases import read_base
from troupe.actors.generator.hosted import GeneratorHost, Line
from troupe.actors.learner.collective import MlxRanks
from troupe.actors.learner.rank_wire import (
    Beat,
    Begin,
    Done,
    Join,
    Learn,
    OfGenerator,
    Ready,
    Refused,
    ToGenerator,
    decode_in_rank,
    unpack_batch,
)
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.errors import TroupeError
from troupe.grpo import adamw_init
from troupe.policy import Base, Weights
from troupe.runtime import linux_cpu
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import Connection, encode
from troupe.runtime.memory import memory_limited
from troupe.runtime.process import serve
from troupe.runtime.roles import together

BEAT_S = 1.0


async def run_rank(connection: Connection) -> None:
    """Learn from the first frame to the end of the connection."""
    begin = decode_in_rank(await connection.receive())
    assert isinstance(begin, Begin)
    setup = begin.setup
    if setup.on_cpu:
        mx.set_default_device(mx.cpu)
    try:
        with linux_cpu.blas_limited(setup.blas_threads), memory_limited(setup.limit_gb):
            if setup.on_cpu:
                linux_cpu.take_buffers(setup.streams + (setup.blas_threads or 1))
            async with DeviceThread("learner") as device:
                await _Rank(connection, begin, device).run()
    except TroupeError as error:
        await connection.send(encode(Refused(message=str(error))))
        while True:
            await connection.receive()  # until the learner has read it and closes


class _Rank:
    """The rank with its wires."""

    def __init__(self, connection: Connection, begin: Begin, device: DeviceThread) -> None:
        self._connection, self._begin, self._device = connection, begin, device
        self._ranks = MlxRanks(begin.meeting, begin.rank)
        self._board: PolicyBoard[Weights] = PolicyBoard(begin.setup.max_staleness)
        self._lines: dict[int, Line] = {}
        self._tasks: TaskGroup
        self._rates: Sequence[float] = ()
        self._trainer: BatchTrainer
        self._state: LearnerState

    async def run(self) -> None:
        self._state = await self._device.run(self._load)
        self._board.publish(self._state.version, self._state.weights)
        await self._connection.send(encode(Ready(device=str(mx.default_device()))))
        async with DeviceThread("generator") as thread:
            self._host = GeneratorHost(self._board, self._trainer.base, thread)
            await together([self._listen, self._tell_alive, self._host.run, self._pass_on])

    def _load(self) -> LearnerState:
        begin, setup = self._begin, self._begin.setup
        base = Base() if setup.base is None else read_base(setup.policy, setup.base)
        self._trainer = _Trainer(
            setup.learner,
            setup.policy,
            reward_weights={},
            temperature=setup.temperature,
            max_completion_length=setup.max_completion_length,
            pad_id=setup.pad_id,
            total_steps=setup.total_steps,
            streams=setup.streams,
            base=base,
            seed=setup.seed,
        )
        self._trainer.ranks, self._trainer.supervision = self._ranks, setup.supervision
        weights, before = _read(begin.weights), begin.optimizer_state
        return LearnerState(
            version=begin.version,
            weights=weights,
            optimizer_state=adamw_init(weights) if before is None else dict(_read(before)),
            reference=None if begin.reference is None else _read(begin.reference),
        )

    def _join(self) -> None:
        self._trainer.open()
        self._ranks.join()

    def _learn(self, message: Learn) -> tuple[LearnerState, tuple[tuple[str, float, float], ...]]:
        parts: list[tuple[str, float, float]] = []
        began_s = time.perf_counter()

        def end_part(name: str) -> None:
            parts.append((name, parts[-1][2] if parts else began_s, time.perf_counter()))

        batch = None if message.batch is None else unpack_batch(message.batch)
        assert isinstance(self._trainer, _Trainer)
        self._trainer.rates = message.rates
        self._state, _ = self._trainer.advance(self._state, batch, end_part)
        return self._state, tuple(parts)

    async def _listen(self) -> None:
        """Until the learner closes the connection, which ends all the rest."""
        while True:
            match decode_in_rank(await self._connection.receive()):
                case Join():
                    await self._device.run(self._join)
                case Learn() as message:
                    self._tasks.start_soon(self._advance, message)
                case ToGenerator() as message:
                    await self._to_generator(message)

    async def _advance(self, message: Learn) -> None:
        """The learner says nothing more of learning before this is done."""
        state, parts = await self._device.run(self._learn, message)
        self._board.publish(state.version, state.weights)
        await self._connection.send(encode(Done(version=state.version, parts=parts)))

    async def _pass_on(self) -> None:
        """Run what goes on beside listening."""
        async with anyio.create_task_group() as self._tasks:
            await anyio.sleep_forever()

    async def _to_generator(self, message: ToGenerator) -> None:
        line = self._lines.get(message.session)
        if message.frame is None:
            if line is not None:
                line.close()
            return
        if line is None:
            line = self._lines[message.session] = self._host.open()
            self._tasks.start_soon(self._of_generator, message.session, line)
        with suppress(anyio.BrokenResourceError):
            await line.send(message.frame)

    async def _of_generator(self, session: int, line: Line) -> None:
        with suppress(anyio.EndOfStream):
            while True:
                await self._connection.send(encode(OfGenerator(session=session, frame=await line.receive())))
        del self._lines[session]
        await self._connection.send(encode(OfGenerator(session=session, frame=None, why=line.why)))

    async def _tell_alive(self) -> None:
        waited_for: float | None = None
        while True:
            since = self._ranks.waiting_since_s
            waits = since is not None and since == waited_for
            waited_for = since
            await self._connection.send(encode(Beat(version=self._state.version, waits=waits)))
            await anyio.sleep(BEAT_S)


class _Trainer(BatchTrainer):
    """Learning rates are told."""

    rates: Sequence[float] = ()

    def learning_rates(self, step: int) -> list[float]:
        return list(self.rates)


def _read(path: str) -> Weights:
    loaded = mx.load(str(Path(path)))
    assert isinstance(loaded, dict)
    mx.eval(list(loaded.values()))
    return loaded


if __name__ == "__main__":
    serve(run_rank)
