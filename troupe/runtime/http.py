"""A small, strict part of HTTP/1.1 on 127.0.0.1: one request a connection, one answer, whole or as a stream.

What a client may use up is bounded: connections, bytes of a request, the time that asking takes and the time that a
chunk of the answer takes to be read. Whoever goes over a bound is dropped, and harms neither the run nor the others.
"""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import TypeAlias
from urllib.parse import parse_qsl

import anyio
import h11
import msgspec

from troupe.runtime.arrivals import SocketServer

HOST = "127.0.0.1"
_LOG = logging.getLogger("troupe.daemon")
_CHUNK_BYTES = 64 * 1024
_MOST_FIELDS = 16
_HEAD_ENDS = b"\r\n\r\n"
_UNUSUAL = re.compile(rb"[^\t\r\n -~\x80-\xff]|\r(?!\n)|(?<!\r)\n|\r\n[ \t]")
"""In a head: what is no line of text, or goes on with one. h11 would take some of it, and long over the rest."""
_METHOD = re.compile(rb"[A-Z]{1,16}")
_LENGTHS = re.compile(rb"(?i)\r\ncontent-length:[^\r]*(?:,|\r.*\ncontent-length:)", re.DOTALL)
"""Several lengths, which h11 takes for one where they are equal."""
_GOES_ON = {"cookie": "; "}
"""How the values of a header that comes twice are joined, where that has a meaning."""
_ONCE = ("host", "origin", "content-length", "authorization", "content-type")
_LINGERS_S = 1.0
"""That a client may take to close its side, so that it has read the answer before the connection is gone."""


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may use up."""

    connections: int = 32
    """That are served; as many again are told that there are too many, and any further one is dropped unheard, so that
    the process keeps its descriptors."""
    head_bytes: int = 16 * 1024
    body_bytes: int = 64 * 1024
    request_s: float = 10.0
    """From the beginning of the connection to the end of the request."""
    write_s: float = 10.0
    """That a client may take to read one chunk of the answer."""


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for."""

    method: str
    path: str
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    """By their names in lower case."""
    body: bytes = b""


class HttpResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What it is told: the body at once, or chunk by chunk until the stream or the client ends."""

    status: HTTPStatus = HTTPStatus.OK
    kind: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}
    body: bytes | AsyncGenerator[bytes, None] = b""


HttpHandler: TypeAlias = Callable[[HttpRequest], Awaitable[HttpResponse]]


class RefusedError(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.response = HttpResponse(status=status, body=f"{message}\n".encode())


class HttpServer(SocketServer):
    """Serves one port: `async with HttpServer(handler, port) as server`; 0: one that the system chooses.

    Entering raises OSError where the port cannot be had. Leaving drops everybody.
    """

    whose = "page"

    def __init__(self, handler: HttpHandler, port: int = 0, limits: HttpLimits | None = None) -> None:
        self.port = port
        self._handler = handler
        self._limits = limits or HttpLimits()
        self.most = 2 * self._limits.connections

    def _open(self) -> socket.socket:
        listener = socket.create_server((HOST, self.port))  # which may be had again right after a restart
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        return listener

    async def _serve(self, connection: socket.socket) -> None:
        try:
            response = await self._answer(connection)
            await self._send(connection, response)
            await _part(connection)
        except (OSError, TimeoutError, EOFError) as error:
            _LOG.debug("a client of the page is gone: %r", error)

    async def _answer(self, connection: socket.socket) -> HttpResponse:
        try:
            with anyio.fail_after(self._limits.request_s):
                request = await self._read(connection)
            if self.connections > (most := self._limits.connections):
                message = f"{most} clients are there already; close one and try again"
                return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, message).response
            return await self._handler(request)
        except RefusedError as refusal:
            return refusal.response
        except (OSError, TimeoutError, EOFError):
            raise
        except Exception as error:  # a request must not end the run
            _LOG.exception("a request of the page failed")
            return RefusedError(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"the request failed: {type(error).__name__}: {error}"
            ).response

    async def _read(self, connection: socket.socket) -> HttpRequest:
        """RefusedError where it is none that is served, EOFError where the client leaves before its end."""
        read, most = b"", self._limits
        while _HEAD_ENDS not in read and len(read) <= most.head_bytes:
            read += await _more(connection)
        head, end, body = read.partition(_HEAD_ENDS)
        if not end or len(head) > most.head_bytes:
            message = f"a request's head has at most {most.head_bytes} bytes"
            raise RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
        request = parse_head(head)
        if "transfer-encoding" in request.headers:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a request's body has to have a plain Content-Length")
        length = int(request.headers.get("content-length", "0"))
        if length > most.body_bytes:
            message = f"a request's body has at most {most.body_bytes} bytes"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        while len(body) < length:
            body += await _more(connection)
        return msgspec.structs.replace(request, body=body[:length])

    async def _send(self, connection: socket.socket, response: HttpResponse) -> None:
        body = response.body
        headers = {"Content-Type": response.kind, "Connection": "close", **response.headers}
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}", *map(": ".join, headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if isinstance(body, bytes):
            await self._write(connection, head + body)
            return
        async with aclosing(body) as chunks:
            await self._write(connection, head)
            async for chunk in chunks:
                await self._write(connection, chunk)

    async def _write(self, connection: socket.socket, data: bytes) -> None:
        with anyio.fail_after(self._limits.write_s):
            await asyncio.get_running_loop().sock_sendall(connection, data)


def parse_head(head: bytes) -> HttpRequest:
    """The request with this head, without its body. RefusedError for anything out of the ordinary."""
    if _UNUSUAL.search(head):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "this is no request of HTTP/1.1: there are control characters in it")
    if _LENGTHS.search(head):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the request has two headers content-length")
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(head + _HEAD_ENDS)
    try:
        request = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"this is no request of HTTP/1.1: {error}") from None
    if not (
        isinstance(request, h11.Request)
        and request.http_version in (b"1.0", b"1.1")
        and _METHOD.fullmatch(request.method)
        and request.target.startswith(b"/")
    ):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "this is no request that a server of pages understands")
    headers: dict[str, str] = {}
    for name, value in ((name.decode(), value.decode("latin-1")) for name, value in request.headers):
        if name in headers and name in _ONCE:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"the request has two headers {name}")
        headers[name] = _GOES_ON.get(name, ", ").join([headers[name], value]) if name in headers else value
    path, _, query = request.target.decode("latin-1").partition("?")
    try:
        pairs = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"an address has at most {_MOST_FIELDS} parameters") from None
    return HttpRequest(method=request.method.decode(), path=path, query=pairs, headers=headers)


async def _more(connection: socket.socket) -> bytes:
    chunk = await asyncio.get_running_loop().sock_recv(connection, _CHUNK_BYTES)
    if not chunk:
        raise EOFError("it left before its request was whole")
    return chunk


async def _part(connection: socket.socket) -> None:
    """Close our side, and let the client close its own: what it had still to send would make its system forget the
    answer."""
    with anyio.move_on_after(_LINGERS_S), suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while await asyncio.get_running_loop().sock_recv(connection, _CHUNK_BYTES):
            pass
