"""The control socket under every kind of client."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from tests.daemon.control.test_protocol import REQUESTS, STATUS
from troupe.daemon.control.place import Peer, Place, peer_of
from troupe.daemon.control.protocol import (
    MAX_REQUEST_BYTES,
    NobodyThereError,
    Reply,
    Request,
    ask,
    decode_request,
    encode_line,
)
from troupe.daemon.control.server import ControlServer, Limits
from troupe.errors import OutputError
from troupe.messages import Done, Drain, GetStatus, Pause, Refused, Set, Stop
from troupe.records.layout import CONTROL_LOCK, CONTROL_SOCKET

pytestmark = pytest.mark.anyio


class Host:
    """Answers every request, and remembers it."""

    def __init__(self) -> None:
        self.heard: list[tuple[Request, Peer]] = []

    async def __call__(self, request: Request, peer: Peer) -> Reply:
        self.heard.append((request, peer))
        match request:
            case GetStatus():
                return STATUS
            case Stop():
                raise RuntimeError("no brakes")
            case Set(key="unsayable"):
                return Done(message="caf\udce9")
            case Set(key="unsayable.fault"):
                raise RuntimeError("caf\udce9")
            case Drain():
                await anyio.sleep_forever()
        return Done(message=type(request).__name__)


@asynccontextmanager
async def hosted(folder: Path, peer: Callable[[socket.socket], Peer] = peer_of, **limits: float) -> AsyncIterator[Host]:
    host = Host()
    async with ControlServer(folder, host, Limits(**limits), peer_of=peer) as server:  # type: ignore[arg-type]
        assert server.unavailable is None
        yield host


async def asked(folder: Path, *requests: Request) -> list[Reply]:
    """The answers, each over a connection of its own."""
    return await anyio.to_thread.run_sync(lambda: [ask(folder, request, 30.0) for request in requests])


class Raw:
    """A client that says what it likes."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30.0)
        self.socket.connect(os.fspath(folder / CONTROL_SOCKET))

    async def say(self, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            await anyio.to_thread.run_sync(self.socket.sendall, data)

    async def hear(self) -> bytes:
        """Everything until the server hangs up."""

        def read() -> bytes:
            parts = []
            with suppress(ConnectionResetError):
                while part := self.socket.recv(65536):
                    parts.append(part)
            return b"".join(parts)

        return await anyio.to_thread.run_sync(read)

    async def line(self) -> bytes:
        def read() -> bytes:
            got = b""
            while not got.endswith(b"\n") and (part := self.socket.recv(1)):
                got += part
            return got

        return await anyio.to_thread.run_sync(read)

    def close(self) -> None:
        self.socket.close()


async def test_requests_are_answered_in_order_on_one_connection(tmp_path: Path) -> None:
    async with hosted(tmp_path) as host:
        answers = await asked(tmp_path, GetStatus(), Pause(), GetStatus())
        assert answers == [STATUS, Done(message="Pause"), STATUS]
    assert [request for request, _ in host.heard] == [GetStatus(), Pause(), GetStatus()]
    assert {(peer.uid, peer.pid) for _, peer in host.heard} == {(os.geteuid(), os.getpid())}


async def test_several_lines_at_once_and_a_line_in_pieces(tmp_path: Path) -> None:
    async with hosted(tmp_path) as host:
        client = Raw(tmp_path)
        first, second = encode_line(Set(key="a.b", value=1)), encode_line(Pause())
        await client.say(first + second[:5])
        assert json.loads(await client.line())["message"] == "Set"
        assert len(host.heard) == 1
        await client.say(second[5:])
        assert json.loads(await client.line())["message"] == "Pause"
        client.close()


async def test_many_clients_at_once(tmp_path: Path) -> None:
    async with hosted(tmp_path):
        clients = [Raw(tmp_path) for _ in range(20)]
        for client in clients:
            await client.say(encode_line(Pause()))
        assert [json.loads(await client.line())["type"] for client in clients] == ["Done"] * 20
        for client in clients:
            client.close()


async def test_a_client_that_waits_for_its_answer_holds_up_nobody(tmp_path: Path) -> None:
    async with hosted(tmp_path) as host:
        waiting = Raw(tmp_path)
        await waiting.say(encode_line(Drain()))
        while not host.heard:
            await anyio.lowlevel.checkpoint()
        assert await asked(tmp_path, Pause()) == [Done(message="Pause")]
        waiting.close()


async def test_a_request_that_fails_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with hosted(tmp_path):
        refused, status = await asked(tmp_path, Stop(), GetStatus())
    assert refused == Refused(message="the request failed: RuntimeError: no brakes")
    assert status == STATUS
    assert "no brakes" in caplog.text


async def test_what_utf_8_cannot_say_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what is logged goes into pytest's report, which is UTF-8 on its way from a worker
    monkeypatch.setattr(logging.getLogger("troupe.daemon"), "disabled", True)
    async with hosted(tmp_path):
        unsaid, fault, status = await asked(
            tmp_path, Set(key="unsayable", value=1), Set(key="unsayable.fault", value=1), GetStatus()
        )
    assert isinstance(unsaid, Refused)
    assert unsaid.message.startswith("the request failed: UnicodeEncodeError")
    assert fault == Refused(message=r"the request failed: RuntimeError: caf\udce9")
    assert status == STATUS


@pytest.mark.parametrize("tail", [b"\n", b""], ids=["a line", "no end"])
async def test_a_line_that_is_too_long_is_refused_and_its_client_dropped(tmp_path: Path, tail: bytes) -> None:
    async with hosted(tmp_path) as host:
        client = Raw(tmp_path)
        await client.say(b"x" * (MAX_REQUEST_BYTES + 1) + tail)
        assert b"at most 65,536 bytes" in await client.hear()
        client.close()
        assert await asked(tmp_path, GetStatus()) == [STATUS]
    assert len(host.heard) == 1


async def test_the_longest_line_that_is_allowed(tmp_path: Path) -> None:
    async with hosted(tmp_path) as host:
        line = encode_line(Set(key="a.b", value=""))
        value = "x" * (MAX_REQUEST_BYTES - len(line) + 1)
        assert await asked(tmp_path, Set(key="a.b", value=value)) == [Done(message="Set")]
    assert host.heard[0][0] == Set(key="a.b", value=value)


async def test_100_mb_take_no_memory(tmp_path: Path) -> None:
    async with hosted(tmp_path):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for client in [Raw(tmp_path), Raw(tmp_path)]:
            chunk = b"x" * (1024 * 1024)
            for _ in range(100):
                await client.say(chunk)
            client.close()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
        assert await asked(tmp_path, GetStatus()) == [STATUS]


async def test_half_a_message_is_no_request(tmp_path: Path) -> None:
    async with hosted(tmp_path) as host:
        client = Raw(tmp_path)
        await client.say(encode_line(Pause())[:-1])
        client.socket.shutdown(socket.SHUT_WR)
        assert await client.hear() == b""
        client.close()
        assert host.heard == []


async def test_a_line_that_is_not_finished_in_time_is_dropped(tmp_path: Path) -> None:
    async with hosted(tmp_path, line_s=0.05) as host:
        client = Raw(tmp_path)
        await client.say(b'{"type":')
        assert b"not finished within 0.05 s" in await client.hear()
        client.close()
        assert host.heard == []


async def test_who_asks_nothing_gives_way_in_the_end(tmp_path: Path) -> None:
    async with hosted(tmp_path, idle_s=0.05):
        client = Raw(tmp_path)
        assert b"nothing was asked within 0.05 s" in await client.hear()
        client.close()


async def test_who_does_not_read_its_answers_is_dropped(tmp_path: Path) -> None:
    async with hosted(tmp_path, write_s=0.05):
        client = Raw(tmp_path)
        client.socket.setblocking(False)
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while True:
                client.socket.send(encode_line(GetStatus()) * 100)
                await anyio.lowlevel.checkpoint()
        assert await asked(tmp_path, Pause()) == [Done(message="Pause")]
        client.close()


async def test_there_is_room_for_so_many_and_no_more(tmp_path: Path) -> None:
    async with hosted(tmp_path, connections=3):
        clients = [Raw(tmp_path) for _ in range(3)]
        for client in clients:
            await client.say(encode_line(Pause()))
            await client.line()
        late = Raw(tmp_path)
        assert b"3 clients are there already" in await late.hear()
        clients.pop().close()
        answer = b"clients are there"
        while b"clients are there" in answer:  # until the server has seen that one has gone
            late.close()
            late = Raw(tmp_path)
            await late.say(encode_line(Pause()))
            answer = await late.line()
        assert json.loads(answer) == {"type": "Done", "message": "Pause"}
        for client in [*clients, late]:
            client.close()


async def test_another_user_is_sent_away(tmp_path: Path) -> None:
    async with hosted(tmp_path, lambda connection: Peer(uid=os.geteuid() + 1000, pid=7)) as host:
        client = Raw(tmp_path)
        await client.say(encode_line(Pause()))
        assert b"belongs to another user" in await client.hear()
        client.close()
    assert host.heard == []


async def test_no_descriptors_left_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError(24, "Too many open files")])
    async with hosted(tmp_path):
        loop = asyncio.get_running_loop()
        accept = loop.sock_accept

        async def failing(listener: socket.socket) -> tuple[socket.socket, object]:
            for error in failures:
                raise error
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", failing)
        assert await asked(tmp_path, Pause(), Pause()) == [Done(message="Pause")] * 2
        assert await asked(tmp_path, Pause()) == [Done(message="Pause")]


def mutated(draw: random.Random) -> bytes:
    """A valid request that something has happened to, or no request at all. It holds no end of a line."""
    kind = draw.randrange(8)
    line = bytearray(encode_line(draw.choice(REQUESTS)).rstrip(b"\n"))
    if kind == 0:
        line = bytearray(draw.randbytes(draw.randrange(200)))
    elif kind == 1:
        del line[draw.randrange(len(line)) :]
    elif kind == 2:
        line[draw.randrange(len(line))] = draw.randrange(256)
    elif kind == 3:
        at = draw.randrange(len(line))
        line[at:at] = draw.randbytes(draw.randrange(1, 20))
    elif kind == 4:
        line += bytes(line)
    elif kind == 5:
        line = bytearray(b'{"type":' + bytes(draw.choices(b'"{}[]:,0123456789truefalsn ', k=30)))
    elif kind == 6:
        line = bytearray(draw.choice([b"[", b'{"a":', b'{"type":"Set","key":"k","value":[']) * draw.randrange(1, 3000))
    else:
        line = line.replace(b'"', draw.choice([b"'", b"\\", b"\x00", b"\xff", b'""']), 1)
    return bytes(line.replace(b"\n", b" "))


def is_request(line: bytes) -> bool:
    try:
        decode_request(line)
    except ValueError:
        return False
    return True


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - names of what may be gone by then


async def test_thousands_of_malformed_messages_harm_nothing(tmp_path: Path) -> None:
    draw = random.Random(5)
    lines = [line for line in (mutated(draw) for _ in range(3000)) if not is_request(line)]
    assert len(lines) > 2000
    async with hosted(tmp_path, connections=5000) as host:  # clients come faster than it sees the last ones go
        await asked(tmp_path, GetStatus())
        gc.collect()
        files, memory = descriptors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began_s = time.perf_counter()
        await anyio.to_thread.run_sync(say_all, tmp_path, lines, draw)
        assert time.perf_counter() - began_s < 60
        assert await asked(tmp_path, GetStatus()) == [STATUS]
        while descriptors() > files:  # the server sees the last clients go
            await anyio.lowlevel.checkpoint()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000
    assert {type(request) for request, _ in host.heard} == {GetStatus}


def say_all(folder: Path, lines: list[bytes], draw: random.Random) -> None:
    """Over many connections, some of which hear the answers, and some of which break off."""
    pending = list(lines)
    while pending:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(30.0)
            client.connect(os.fspath(folder / CONTROL_SOCKET))
            hears = draw.random() < 0.7
            for _ in range(draw.randrange(1, 60)):
                if not pending:
                    return
                line = pending.pop()
                with suppress(BrokenPipeError):  # it is over the limit, and the server stops listening
                    client.sendall(line + b"\n")
                got = b""
                while hears and not got.endswith(b"\n"):
                    got += client.recv(65536)
                assert not hears or json.loads(got)["type"] == "Refused", (line, got)
                if len(line) > MAX_REQUEST_BYTES:
                    break


async def test_a_second_server_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    async with hosted(tmp_path):
        with pytest.raises(OutputError, match=f"there already \\(process {os.getpid()}\\).*troupe status"):
            async with hosted(tmp_path):
                raise AssertionError
        assert await asked(tmp_path, GetStatus()) == [STATUS]
    assert names(tmp_path) == []


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def failing_host(folder: Path) -> None:
    async with hosted(folder):
        Raw(folder).close()
        raise ValueError("mine")


async def test_nothing_is_left_behind_and_the_bodys_error_goes_on_as_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"):
        await failing_host(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(NobodyThereError, match="no run is live"):
        ask(tmp_path, GetStatus())


class NoPlace(Place):
    """Of a system that has no locks, or no sockets, to give."""

    def __init__(self, folder: Path, lacking: str) -> None:
        super().__init__(folder)
        self._lacking = lacking

    def take(self) -> None:
        if self._lacking == "locks":
            raise OSError(95, "Operation not supported")
        super().take()

    def listen(self) -> socket.socket:
        raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("lacking", ["sockets", "locks"])
async def test_without_sockets_the_run_goes_on(tmp_path: Path, lacking: str) -> None:
    async with ControlServer(tmp_path, Host(), place=NoPlace(tmp_path, lacking)) as server:
        assert server.unavailable is not None
        assert "not supported" in server.unavailable
    assert names(tmp_path) == []


def test_names_of_files_are_what_others_rely_on() -> None:
    assert (CONTROL_SOCKET, CONTROL_LOCK) == ("control.sock", "control.lock")
