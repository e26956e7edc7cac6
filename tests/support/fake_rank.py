"""A rank of the learner that learns nothing: it says what it is told to say, and may do harm. No MLX."""

from __future__ import annotations

import os
from typing import Any

import anyio
import msgspec

from troupe.runtime.frames import Connection
from troupe.runtime.process import serve
from troupe.runtime.roles import together

HARM = "FAKE_RANK_HARM"


async def run(connection: Connection) -> None:
    harm = os.environ[HARM]

    async def say(kind: str, **fields: Any) -> None:
        await connection.send(msgspec.msgpack.encode({"type": kind, **fields}))

    async def beat() -> None:
        while harm != "silent":
            await say("Beat", version=0, waits=harm == "stuck")
            await anyio.sleep(0.05)

    begin = msgspec.msgpack.decode(await connection.receive())
    assert os.path.exists(begin["weights"])  # noqa: ASYNC240, PTH110
    await (say("Refused", message="no room") if harm == "refuses" else say("Ready", device="none"))

    async def listen() -> None:
        while True:
            message = msgspec.msgpack.decode(await connection.receive())
            if message["type"] == "Learn":
                if harm == "dies":
                    print(f"asked to learn at {message['rates']}", flush=True)
                    os._exit(5)
                await say("Done", version=message["version"] + 1, parts=[("pass", 1.0, 2.0)])

    await together([beat, listen])


if __name__ == "__main__":
    serve(run)
