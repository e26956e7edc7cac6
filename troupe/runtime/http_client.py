"""A small HTTP/1.1 client: one request a connection, an answer of a bounded size, no proxies, no redirects."""

import os
import re
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

import anyio
import h11
from anyio.abc import ByteStream

_CHUNK_BYTES = 64 * 1024
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_USUAL = re.compile(r"[!-~]+")


class HttpError(Exception):
    """No whole answer came: nobody listens, the connection was cut, it took too long, or what came is no HTTP."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        """`late`: it took too long."""
        super().__init__(message)
        self.late = late


class HttpAnswer(NamedTuple):
    """What a server said."""

    status: int
    body: bytes


class HttpClient:
    """Asks one server. Certificates of https are checked as the system does it; proxies are passed by."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 60.0,
        most_bytes: int = 1 << 26,
        connecting: int = 4,
    ) -> None:
        """`url`: http or https, with a path to which those of requests are added. `key`: sent as a bearer token.
        `timeout_s`: from the connection to the end of the answer. `connecting`: connections that are opened at a time,
        since many servers let few wait. Raises ValueError for what is no such URL."""
        self._parts = checked_url(url)
        self._key = key
        self._timeout_s = timeout_s
        self._most_bytes = most_bytes
        self._connecting = anyio.Semaphore(connecting)

    @property
    def place(self) -> str:
        """Host and port."""
        return self._parts.netloc

    async def get(self, path: str) -> HttpAnswer:
        """Raises HttpError."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: bytes, *, timeout_s: float | None = None) -> HttpAnswer:
        """`body`: JSON. `timeout_s`: None takes that of the client. Raises HttpError."""
        return await self._ask("POST", path, body, timeout_s)

    async def _ask(self, method: str, path: str, body: bytes, timeout_s: float | None = None) -> HttpAnswer:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            with anyio.fail_after(limit_s):
                async with self._connecting:
                    stream = await self._connect()
                async with stream:
                    return await self._exchange(stream, method, path, body)
        except TimeoutError:
            raise HttpError(f"no whole answer within {limit_s:g} s", late=True) from None
        except ssl.SSLError as error:
            raise HttpError(f"no connection by TLS: {error}") from None
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            raise HttpError(f"{error or 'the connection was cut'}") from None
        except h11.RemoteProtocolError as error:
            raise HttpError(f"no HTTP: {error}") from None

    async def _connect(self) -> ByteStream:
        parts = self._parts
        host = parts.hostname or ""
        if parts.scheme == "http":
            return await anyio.connect_tcp(host, parts.port or 80)
        context = ssl.create_default_context()
        return await anyio.connect_tcp(
            host, parts.port or 443, tls=True, ssl_context=context, tls_standard_compatible=False
        )

    async def _exchange(self, stream: ByteStream, method: str, path: str, body: bytes) -> HttpAnswer:
        connection = h11.Connection(h11.CLIENT)
        headers: Mapping[str, str] = {
            "Host": self._parts.netloc,
            "Accept": "application/json",
            "Connection": "close",
            **({"Content-Type": "application/json", "Content-Length": str(len(body))} if body else {}),
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        request = h11.Request(method=method, target=self._parts.path.rstrip("/") + path, headers=list(headers.items()))
        sent = [connection.send(request), connection.send(h11.Data(data=body)), connection.send(h11.EndOfMessage())]
        await stream.send(b"".join(part for part in sent if part))
        status, found = 0, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                try:
                    connection.receive_data(await stream.receive(_CHUNK_BYTES))
                except anyio.EndOfStream:
                    connection.receive_data(b"")
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                found += event.data
                if len(found) > self._most_bytes:
                    raise HttpError(f"an answer of more than {self._most_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return HttpAnswer(status, bytes(found))
            elif not isinstance(event, h11.InformationalResponse):
                raise HttpError("the connection was cut")


def checked_url(url: str) -> SplitResult:
    """The parts of a URL that can be asked; ValueError for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not _USUAL.fullmatch(url):
        raise ValueError(f"url is {url!r}; give http://HOST:PORT or https://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("url has a user, a question or a fragment in it; give http://HOST:PORT, and keys another way")
    return parts


def is_in_the_clear(url: str) -> bool:
    """Whether others on the way can read what is said there."""
    parts = checked_url(url)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def key_from(name: str) -> str:
    """The key in an environment variable; ValueError, without it, where there is none that a header can hold."""
    key = os.environ.get(name, "")
    if not _USUAL.fullmatch(key):
        raise ValueError(f"the environment variable {name} {'holds no usable key' if key else 'is not set'}")
    return key
