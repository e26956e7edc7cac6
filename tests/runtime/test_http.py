"""The small HTTP server: what it understands, what it refuses, whom it drops."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus

import anyio
import pytest

from troupe.runtime.http import HOST, HttpLimits, HttpRequest, HttpResponse, HttpServer, RefusedError, parse_head

pytestmark = pytest.mark.anyio
PATIENCE_S = 30.0


class Handler:
    """Answers by path, and remembers what was asked."""

    def __init__(self) -> None:
        self.heard: list[HttpRequest] = []
        self.streams_ended = 0
        self.go_on = anyio.Event()

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        self.heard.append(request)
        match request.path:
            case "/stream":
                return HttpResponse(kind="text/event-stream", body=self._stream())
            case "/flood":
                return HttpResponse(body=self._flood())
            case "/refuse":
                raise RefusedError(HTTPStatus.FORBIDDEN, "not you")
            case "/break":
                raise RuntimeError("a bug")
        return HttpResponse(kind="application/json", headers={"X-Odd": "yes"}, body=b'{"ok":1}')

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"one\n"
            await self.go_on.wait()
            yield b"two\n"
        finally:
            self.streams_ended += 1

    async def _flood(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            self.streams_ended += 1


@asynccontextmanager
async def serving(handler: Handler, **limits: float) -> AsyncIterator[HttpServer]:
    with anyio.fail_after(PATIENCE_S):
        async with HttpServer(handler, limits=HttpLimits(**limits)) as server:  # type: ignore[arg-type]
            yield server


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
        await anyio.sleep(0.005)


async def said(server: HttpServer, request: bytes, *, ends: bool = False) -> bytes:
    """All that the server says to these bytes."""
    async with await anyio.connect_tcp(HOST, server.port) as stream:
        if request:
            await stream.send(request)
        if ends:
            await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode("latin-1")


async def test_a_request_and_its_answer() -> None:
    handler = Handler()
    async with serving(handler) as server:
        answer = await said(server, get("/a%20b?x=1&y=%C3%A4&z=", "Cookie: a=1", "COOKIE: b=2", "X-It:  spaced \t"))
        body = b"hello"
        await said(server, b"POST /p HTTP/1.0\r\nHost: h\r\nContent-Length: 5\r\n\r\n" + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"Content-Type: application/json",
        b"Connection: close",
        b"X-Odd: yes",
        b"Content-Length: 8",
    ]
    assert rest == b'{"ok":1}'
    assert handler.heard[0] == HttpRequest(
        method="GET",
        path="/a%20b",
        query={"x": "1", "y": "ä", "z": ""},
        headers={"host": "localhost", "cookie": "a=1; b=2", "x-it": "spaced"},
    )
    assert (handler.heard[1].method, handler.heard[1].body) == ("POST", b"hello")


async def test_a_request_in_small_pieces() -> None:
    handler = Handler()
    async with serving(handler) as server, await anyio.connect_tcp(HOST, server.port) as stream:
        for byte in b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab":
            await stream.send(bytes([byte]))
        assert (await stream.receive()).startswith(b"HTTP/1.1 200")
    assert handler.heard[0].body == b"ab"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET / HTTP/2\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET nowhere HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (get("/", "no colon"), 400),
        (get("/", "Odd : h"), 400),
        (get("/", "A: \x00"), 400),
        (get("/", "A: b\nB: c"), 400),
        (get("/", "A: b\rB: c"), 400),
        (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 400),
        (b"M-SEARCH / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (get("/", "A: b", " folded"), 400),
        (get("/", "Host: b"), 400),
        (get("/", "Origin: a", "Origin: a"), 400),
        (get("/", "Content-Type: a", "Content-Type: b"), 400),
        (get("/", "Content-Length: 1", "Content-Length: 1"), 400),
        (get("/", "Content-Length: 1, 1"), 400),
        (get("/?" + "a&" * 40), 400),
        (get("/", "Transfer-Encoding: chunked"), 400),
        (get("/", "Transfer-Encoding: gzip"), 400),
        (get("/", "Content-Length: -1"), 400),
        (get("/", "Content-Length: " + "9" * 5_000), 400),
        (get("/", "Content-Length: 1", "Content-Length: 2"), 400),
        (get("/", "Content-Length: 65537"), 413),
        (get("/", "A: " + "x" * 20_000), 431),
        (b"x" * 20_000, 431),
        (get("/refuse"), 403),
        (get("/break"), 500),
    ],
)
async def test_what_is_refused_is_told_and_harms_nobody(request_: bytes, status: int) -> None:
    handler = Handler()
    async with serving(handler) as server:
        answer = await said(server, request_)
        assert int(answer.split()[1]) == status, answer
        assert answer.endswith(b"\n")
        assert (await said(server, get("/"))).startswith(b"HTTP/1.1 200")


def test_a_body_is_not_looked_for_in_a_head() -> None:
    assert parse_head(b"GET / HTTP/1.1\r\nHost: h").body == b""


async def test_a_stream_piece_by_piece() -> None:
    handler = Handler()
    async with serving(handler) as server, await anyio.connect_tcp(HOST, server.port) as stream:
        await stream.send(get("/stream"))
        told = b""
        while not told.endswith(b"one\n"):
            told += await stream.receive()
        assert b"Content-Length" not in told
        handler.go_on.set()
        assert b"".join([chunk async for chunk in stream]) == b"two\n"
    assert handler.streams_ended == 1


@pytest.mark.parametrize("goes", [False, True])
async def test_a_client_that_reads_nothing_or_goes_while_it_is_told_is_dropped(goes: bool) -> None:
    handler = Handler()
    async with serving(handler, write_s=10.0 if goes else 0.2) as server:
        async with await anyio.connect_tcp(HOST, server.port) as stream:
            await stream.send(get("/flood"))
            if goes:
                await stream.receive()
            else:
                await until(lambda: handler.streams_ended > 0)
        await until(lambda: handler.streams_ended > 0)
        assert (await said(server, get("/"))).startswith(b"HTTP/1.1 200")


async def test_clients_that_ask_for_nothing() -> None:
    handler = Handler()
    async with serving(handler, request_s=0.2) as server:
        assert await said(server, b"", ends=True) == b""
        assert await said(server, b"GET / HT", ends=True) == b""
        assert await said(server, get("/", "Content-Length: 9") + b"abc") == b"", "it waited, and hung up"
    assert handler.heard == []


async def test_one_too_many() -> None:
    handler = Handler()
    async with serving(handler, connections=2) as server:
        async with await anyio.connect_tcp(HOST, server.port), await anyio.connect_tcp(HOST, server.port):
            answer = await said(server, get("/"))
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"2 clients are there already" in answer
        await until(lambda: server.connections == 0)
        assert (await said(server, get("/"))).startswith(b"HTTP/1.1 200")


async def test_a_crowd_is_not_even_heard() -> None:
    handler = Handler()
    async with serving(handler, connections=1, request_s=1000.0) as server:
        async with await anyio.connect_tcp(HOST, server.port), await anyio.connect_tcp(HOST, server.port):
            await until(lambda: server.connections == 2)
            assert await said(server, b"") == b"", "it is dropped at once, and takes up no descriptor"
        await until(lambda: server.connections == 0)
        assert (await said(server, get("/"))).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("end", [b"", b"\x01", b"\x0b", b"\rb"])
@pytest.mark.parametrize("line", [b"A:" + b" " * 16_000, b"A" * 16_000, b"A: " + b"\t " * 8_000])
def test_a_long_header_takes_no_time(line: bytes, end: bytes) -> None:
    since_s = time.process_time()
    with suppress(RefusedError):
        parse_head(b"GET / HTTP/1.1\r\nHost: h\r\n" + line + end)
    assert time.process_time() - since_s < 0.1


def test_white_space_around_a_value_is_no_part_of_it() -> None:
    assert parse_head(b"GET / HTTP/1.0\r\nA: \t b : c\t ").headers == {"a": "b : c"}


async def test_leaving_drops_everybody() -> None:
    handler = Handler()
    async with serving(handler) as server:
        stream = await anyio.connect_tcp(HOST, server.port)
        await stream.send(get("/stream"))
        await stream.receive()
    assert handler.streams_ended == 1
    await stream.aclose()
    with pytest.raises(OSError, match=r"."):
        await anyio.connect_tcp(HOST, server.port)


async def test_a_port_that_is_taken_and_one_that_is_free_again() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            await HttpServer(Handler(), taken.getsockname()[1]).__aenter__()
    handler = Handler()
    async with HttpServer(handler) as server:
        assert (await said(server, get("/"))).startswith(b"HTTP/1.1 200")
    async with HttpServer(handler, server.port) as again:
        assert again.port == server.port
        assert (await said(again, get("/"))).startswith(b"HTTP/1.1 200")
