"""Decoding in a process of its own: `python -m troupe.run.measure.child`, which `Beside` starts and asks for rounds."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import mlx.core as mx
import msgspec

from troupe.policy import random_policy
from troupe.run.measure.work import Decoding, Size
from troupe.runtime import linux_cpu
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import Connection, decoder, encode
from troupe.runtime.process import ChildProcess, serve

MODULE = "troupe.run.measure.child"


class Begin(msgspec.Struct, frozen=True, tag=True):
    """What to decode, and with how many threads of OpenBLAS."""

    size: Size
    rows: int
    on_cpu: bool
    blas_threads: int | None


class Decode(msgspec.Struct, frozen=True, tag=True):
    """So many rounds, please."""

    rounds: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """What was asked for is done."""


_to_child = decoder(Begin | Decode, "the measuring process and its child")
_from_child = decoder(Done, "the measuring process and its child")


class Beside:
    """A process that decodes when asked to."""

    def __init__(self, process: ChildProcess) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def started(cls, begin: Begin, env: Mapping[str, str] | None = None) -> AsyncIterator["Beside"]:
        """Start it; it ends with the block. ChildEnded where it ends before."""
        process = await ChildProcess.start(MODULE, env=env)
        try:
            await process.send(encode(begin))
            _from_child(await process.receive())
            yield cls(process)
        finally:
            process.kill()
            await process.aclose()

    async def decode(self, rounds: int) -> None:
        """Have it decode so many rounds, and wait for them."""
        await self._process.send(encode(Decode(rounds)))
        _from_child(await self._process.receive())


async def decode_when_asked(connection: Connection) -> None:
    """In the child, from the first frame until it is killed."""
    begin = _to_child(await connection.receive())
    if begin.on_cpu:
        mx.set_default_device(mx.cpu)
    with linux_cpu.blas_limited(begin.blas_threads):
        if begin.on_cpu:
            linux_cpu.take_buffers(1 + (begin.blas_threads or 1))
        async with DeviceThread("decoder") as device:
            policy = await device.run(partial(random_policy, begin.size.policy, dtype=begin.size.dtype), plain=True)
            decoding = await device.run(Decoding, begin.size, policy, begin.rows, plain=True)
            while True:
                await connection.send(encode(Done()))
                for number in range(_to_child(await connection.receive()).rounds):
                    await device.run(decoding.round, number, on_cancel=decoding.engine.abort, plain=True)


if __name__ == "__main__":
    serve(decode_when_asked)
