"""A real message server for tests, and ends of it."""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import msgspec

from tests.support.extras import extra
from troupe.cluster.bus import asked_subjects, asker_of
from troupe.cluster.connection import Connection, connect
from troupe.cluster.keys import server_name
from troupe.cluster.server import MessageServer, serving
from troupe.cluster.ticket import Ticket, read_ticket

STORE_BYTES = 24 * 1024 * 1024
PATIENCE_S = 30.0


@contextmanager
def server(
    folder: Path,
    serve: str = "127.0.0.1:0",
    tell: Callable[[str], None] = lambda line: None,
    revoked: Callable[[str], None] = lambda name: None,
) -> Iterator[MessageServer]:
    """The message server of a run whose folder this is; the test is skipped where there is none to be had."""
    extra("nkeys")
    folder.mkdir(exist_ok=True)
    with serving(folder / "join", serve, store_bytes=STORE_BYTES, tell=tell, revoked=revoked) as serving_now:
        yield serving_now


def ticket_of(server: MessageServer, name: str) -> Ticket:
    """The ticket of a worker, who is invited if need be."""
    file = server.users.ticket_file(name)
    return read_ticket(file if file.exists() else server.users.invite(name))


@asynccontextmanager
async def ends(*tickets: Ticket) -> AsyncIterator[list[Connection]]:
    """Their ends of the bus, when all are connected."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(connect(ticket)) for ticket in tickets]
        with anyio.fail_after(PATIENCE_S):
            for one in made:
                await until(one, "connected")
        yield made


async def until(one: Connection, state: str) -> None:
    """Wait for a state of a connection."""
    with anyio.fail_after(PATIENCE_S):
        while one.state != state:  # noqa: ASYNC110 - it is told in another thread
            await anyio.sleep(0.01)


@asynccontextmanager
async def echoing(hub: Connection, run: str) -> AsyncIterator[list[str]]:
    """The hub answers every request with who asked and the first 16 bytes → the subjects that it was asked on."""
    asked: list[str] = []

    async def answer(subject: str, data: bytes) -> bytes:
        asked.append(subject)
        return asker_of(subject).encode() + b":" + data[:16]

    async with hub.serve(asked_subjects(run), answer):
        yield asked


class Raw:
    """Somebody who speaks to a server byte by byte, as an intruder would."""

    def __init__(self, address: str, run: str, ca: str | None, tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        """`ca` None: believes any server."""
        host, _, port = address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = tls
        if ca is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            context.load_verify_locations(cadata=ca)
        plain = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        try:
            self._socket = context.wrap_socket(plain, server_hostname=server_name(run))
        except BaseException:
            plain.close()
            raise
        self._buffer = b""
        self.info = msgspec.json.decode(self.line().removeprefix(b"INFO "))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send it; that the server has closed meanwhile is not seen here."""
        with suppress(OSError):
            self._socket.sendall(data)

    def line(self) -> bytes:
        """The server's next line; empty where it has closed."""
        while b"\r\n" not in self._buffer:
            try:
                got = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError:
                got = b""
            if not got:
                return b""
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def join(self, seed: str | None, **more: object) -> bytes:
        """Say who this is → what the server answers to a ping: PONG, or an error."""
        said: dict[str, object] = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
        if seed is not None:
            pair = extra("nkeys").from_seed(bytearray(seed.encode()))
            signed = pair.sign(self.info["nonce"].encode())
            said |= {"nkey": pair.public_key.decode(), "sig": base64.b64encode(signed).decode()}
        self.send(b"CONNECT " + msgspec.json.encode(said | more) + b"\r\nPING\r\n")
        return self.line()

    def told(self, *frames: bytes) -> list[bytes]:
        """Send frames, then a ping → what the server says to them before it answers that, or closes."""
        self.send(b"".join(frames) + b"PING\r\n")
        said = []
        while (line := self.line()) and line != b"PONG":
            said.append(line)
        return said


def published(subject: str, data: bytes = b"x", reply: str = "") -> bytes:
    """The frame that publishes."""
    return f"PUB {subject} {reply} {len(data)}\r\n".encode() + data + b"\r\n"
