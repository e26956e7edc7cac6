"""A process for RemoteGenerator that computes nothing; CHILD_DOES says what it does wrong, if anything.

Every completion is `OF_EVERY`; the clock is an hour late.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

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
    decode_in_process,
    pack_rollout,
)
from troupe.messages import Incident, Rollout, Span
from troupe.runtime.frames import Connection, encode
from troupe.runtime.process import serve

HOUR_S = 3600.0
OF_EVERY = Rollout(
    token_ids=(72, 105),
    log_probs=(-0.5, -1.5),
    sampling_log_probs=(-0.25, -1.5),
    versions=(0, 1),
    finish_reason="stop",
    text="Hi",
)


async def drive(connection: Connection) -> None:
    does = os.environ.get("CHILD_DOES", "")
    await connection.receive()
    if does == "refuse":
        await connection.send(encode(Refused(kind="ModelError", message="no such folder")))
    elif does == "refuse strangely":
        await connection.send(encode(Refused(kind="KeyError", message="what is that?")))
    await connection.send(encode(Ready()))
    while True:
        match decode_in_process(await connection.receive()):
            case Ping():
                if does == "span first":
                    await connection.send(encode(Span(actor="generator", name="idle", start_s=0.0, end_s=0.0)))
                await connection.send(encode(Pong(now_s=time.perf_counter() - HOUR_S)))
            case NewWeights(version=version, path=path):
                assert os.path.getsize(path)  # noqa: ASYNC240, PTH202
                await connection.send(encode(Loaded(version=version)))
            case Prompts(prompts=prompts):
                if does == "die":
                    raise ValueError("out of ideas")
                if does == "frame":
                    await connection.send(b"no msgpack")
                if does == "turn":
                    await connection.send(encode(Ready()))
                if does == "garbage":
                    connection._writer.write(b"This is no frame at all")
                await connection.send(encode(Made(tokens=7)))
                for place, packed in enumerate(prompts):
                    if does == "die once" and place == 1:
                        with suppress(FileExistsError):
                            os.mkdir(os.environ["CHILD_MARK"])  # noqa: PTH102 - the next process finds it
                            os._exit(9)
                    now_s = time.perf_counter() - HOUR_S
                    await connection.send(encode(Span(actor="generator", name="generate", start_s=now_s, end_s=now_s)))
                    rollouts = (pack_rollout(OF_EVERY),) * packed.round_size
                    await connection.send(encode(Completed(gid=packed.gid, rollouts=rollouts)))
            case End():
                await connection.send(encode(Incident(actor="generator", kind="bored", message="nothing to do")))
                await connection.send(encode(Ended()))


if __name__ == "__main__":
    serve(drive)
