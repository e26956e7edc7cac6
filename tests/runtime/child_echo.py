"""What the children of test_process.py do: the first argument says."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import anyio

from troupe.runtime.frames import Connection
from troupe.runtime.process import serve


async def echo(connection: Connection) -> None:
    while True:
        await connection.send(await connection.receive())


async def spin(connection: Connection) -> None:
    """Compute for ever on the event loop's own thread: nothing is ever read."""
    await connection.send(str(os.getpid()).encode())
    while True:
        pass


async def hang(connection: Connection) -> None:
    """Hang, with a grandchild that hangs as well."""
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    )
    await connection.send(str(child.pid).encode())
    time.sleep(600)  # noqa: ASYNC251 - that is the point


async def talk(connection: Connection) -> None:
    """Print in every way there is, then send one frame."""
    print("printed")
    os.write(1, b"written to 1\n")
    subprocess.run([sys.executable, "-I", "-S", "-c", "print('by a grandchild')"], check=True)  # noqa: ASYNC221
    await connection.send(b"frame")
    await connection.receive()


async def fail(connection: Connection) -> None:
    await connection.receive()
    raise ValueError("no such luck")


async def half(connection: Connection) -> None:
    """Half a frame, then the end."""
    connection._writer.write((100).to_bytes(4, "big") + b"too little")
    await connection._writer.drain()


async def garbage(connection: Connection) -> None:
    connection._writer.write(b"Hello, this is no frame")
    await connection._writer.drain()
    await connection.receive()


async def leave(connection: Connection) -> None:
    """Close the connection and stay."""
    connection.close()
    await anyio.sleep(600)


async def environment(connection: Connection) -> None:
    told = [os.environ.get(name, "-") for name in ("PYTHONPATH", "GIVEN", "TROUPE_CHILD_WIRES")]
    await connection.send(" ".join([*told, *sys.argv[2:]]).encode())


async def quit_with_7(connection: Connection) -> None:
    sys.exit(7)


if __name__ == "__main__":
    serve(globals()[sys.argv[1]])
