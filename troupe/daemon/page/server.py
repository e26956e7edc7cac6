"""The live page of a daemon: who may see it, its files, what is told to those who watch, and its buttons.

Served on 127.0.0.1 alone, to whoever has the token, since other users of the machine reach that address too. The token
comes once in the address and lives in a cookie from then on. A cookie goes to every port of a host, so this one is
bound to a path that nobody can guess, and another user's server does not get to see it.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

import anyio
import msgspec

from troupe.daemon.control.place import read_address, remove_address, write_address
from troupe.daemon.control.protocol import ProtocolError, Reply, Request, decode_request
from troupe.daemon.page.completions import PATHS, Completions
from troupe.daemon.page.history import Event, History
from troupe.errors import ConfigError
from troupe.messages import Checkpoint, Drain, Pause, Refused, Resume, Status, Step, Stop
from troupe.records.figures import live_charts
from troupe.records.report.static import (
    BROWSER_SCRIPTS,
    BROWSER_STYLES,
    CHART_SCRIPTS,
    CHART_STYLES,
    read_asset,
    script_safe,
)
from troupe.records.sinks.prometheus import CONTENT_TYPE, exposition
from troupe.runtime.http import HOST, HttpLimits, HttpRequest, HttpResponse, HttpServer, RefusedError

_FILES = {
    "": ("live.html", "text/html; charset=utf-8"),
    **{Path(name).name: (name, "text/css; charset=utf-8") for name in (*CHART_STYLES, "live.css", *BROWSER_STYLES)},
    **{
        Path(name).name: (name, "text/javascript; charset=utf-8")
        for name in (*CHART_SCRIPTS, *BROWSER_SCRIPTS, "served.js", "show.js", "members.js", "live.js", "buttons.js")
    },
}
_ASSETS = Path(__file__).with_name("assets")
_BUTTONS = (Pause, Resume, Step, Checkpoint, Drain, Stop)
_SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_NAMES = ("127.0.0.1", "localhost")
_WATCHERS = 16
_READS_THE_END_S = 1.0
"""That those who watch may take to read the end."""
_NO_TOKEN = "this page is for those who have its token: open the address that the daemon printed, which is in page.url"


class Served(Protocol):
    """What a page asks of its daemon."""

    async def answer(self, request: Request, who: str) -> Reply: ...
    async def status(self) -> Status: ...


class Page:
    """Serves the page as long as it is entered: `async with Page(daemon, history, folder, port)`; port 0: any.

    Entering raises ConfigError where the port cannot be had. `page.url` in the folder says the address meanwhile.
    """

    def __init__(
        self,
        daemon: Served,
        history: History,
        folder: Path,
        port: int = 0,
        limits: HttpLimits | None = None,
        *,
        status_s: float = 1.0,
        gathers_s: float = 0.2,
    ) -> None:
        """`status_s`: between two looks at the run. `gathers_s`: for how long events are gathered."""
        self._daemon, self._status_s, self._gathers_s = daemon, status_s, gathers_s
        self._history = history
        self._folder = folder
        self._server = HttpServer(self.answer, port, limits)
        self._token = secrets.token_urlsafe(32)
        self._base = f"/{secrets.token_urlsafe(12)}/"
        self._files = {name: (_read(file), kind) for name, (file, kind) in _FILES.items()}
        self._completions = Completions(folder)
        self._watchers = 0
        self._watched = anyio.Event()
        self._left = anyio.Event()
        self._tasks: anyio.abc.TaskGroup

    @property
    def address(self) -> str:
        """With the token; good as long as this daemon lives."""
        return f"http://{HOST}:{self._server.port}/?token={self._token}"

    async def __aenter__(self) -> Page:
        try:
            await self._server.__aenter__()
        except OSError as error:
            raise ConfigError(
                f"daemon.page: port {self._server.port} of {HOST} cannot be had ({error}); give another one, or leave "
                "the choice to the system (--page alone)"
            ) from None
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._look, name="page status")
        with suppress(OSError):  # a full disk: the address was printed, too
            write_address(self._folder, self.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if read_address(self._folder) == self.address:  # and not that of a daemon whose folder lies there now
            remove_address(self._folder)
        if self._history.over and self._watchers:
            with anyio.move_on_after(_READS_THE_END_S):
                while self._watchers:
                    await self._left.wait()
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        await self._server.__aexit__(None, None, None)

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """What a client is told."""
        try:
            self._check_host(request)
            response = await self._routed(request)
        except RefusedError as refusal:
            response = refusal.response
        return msgspec.structs.replace(response, headers={**_SAFETY, **response.headers})

    async def _routed(self, request: HttpRequest) -> HttpResponse:
        base, path = self._base, request.path
        if path == "/" and request.method == "GET" and self._is_token(request.query.get("token")):
            return HttpResponse(status=HTTPStatus.SEE_OTHER, headers={"Location": base, "Set-Cookie": self._cookie})
        self._check_token(request)
        match request.method, path.removeprefix(base) if path.startswith(base) else path:
            case "GET", "events":
                return self._watch()
            case "GET", "/metrics":
                return await self._exposition()
            case "GET", name if name in self._files and path.startswith(base):
                body, kind = self._files[name]
                return HttpResponse(kind=kind, body=body)
            case "GET", name if path.startswith(base) and name in PATHS:
                return await self._completions.answer(name, request.query)
            case "POST", "ask":
                return await self._ask(request)
            case "GET" | "POST", _:
                raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "the page answers GET and POST only")

    def _check_host(self, request: HttpRequest) -> None:
        """A name that somebody else's server has made point to this machine is refused."""
        host = request.headers.get("host", "")
        if _name_in(f"//{host}") not in _NAMES:
            raise RefusedError(
                HTTPStatus.FORBIDDEN, f"this page is at {' and '.join(_NAMES)} only, not at {host[:100]!r}"
            )

    def _check_token(self, request: HttpRequest) -> None:
        headers = request.headers
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        tokens = [*self._cookies_in(headers.get("cookie", "")), credentials if scheme.lower() == "bearer" else None]
        if request.method == "GET":
            tokens.append(request.query.get("token"))
        if not any(map(self._is_token, tokens)):
            raise RefusedError(HTTPStatus.FORBIDDEN, _NO_TOKEN)

    def _is_token(self, token: str | None) -> bool:
        return token is not None and hmac.compare_digest(token.encode(errors="replace"), self._token.encode())

    @property
    def _cookie_name(self) -> str:
        return f"troupe-{self._server.port}"

    @property
    def _cookie(self) -> str:
        return f"{self._cookie_name}={self._token}; Path={self._base}; HttpOnly; SameSite=Strict"

    def _cookies_in(self, header: str) -> list[str]:
        """The values of our cookie: a server at another port may have set one of its name, too, and others of any
        shape beside it."""
        pairs = (pair.strip().partition("=") for pair in header.split(";"))
        return [value for name, _, value in pairs if name == self._cookie_name]

    async def _ask(self, request: HttpRequest) -> HttpResponse:
        """A button."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        if origin != f"http://{host}":
            raise RefusedError(HTTPStatus.FORBIDDEN, f"requests come from the page itself, not from {origin[:100]!r}")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a request is application/json")
        reply: Reply
        try:
            asked = decode_request(request.body)
        except ProtocolError as error:
            return _json(Refused(message=str(error)), HTTPStatus.BAD_REQUEST)
        if not isinstance(asked, _BUTTONS):
            reply = Refused(message=f"the page has no button for {type(asked).__name__}; use the `troupe` command")
        else:
            reply = await self._daemon.answer(asked, "the page")
        return _json(reply)

    async def _exposition(self) -> HttpResponse:
        return HttpResponse(kind=CONTENT_TYPE, body=exposition(await self._daemon.status()).encode())

    def _watch(self) -> HttpResponse:
        if self._watchers >= _WATCHERS:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, f"{_WATCHERS} pages are open already; close one")
        return HttpResponse(kind="text/event-stream", body=self._events())

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Everything, and then what is new, until the daemon ends or the client has gone."""
        self._watchers += 1
        self._watched.set()
        number = 0
        try:
            yield b"retry: 1000\n\n"
            while True:
                change, over = self._history.change, self._history.over
                events, number = self._history.since(number)
                if events:
                    yield b"".join(map(_line, events))
                if over:
                    return
                await change.wait()
                await anyio.sleep(self._gathers_s)
        finally:
            self._watchers -= 1
            self._left.set()
            self._left = anyio.Event()

    async def _look(self) -> None:
        """Look at the run again and again while somebody watches."""
        while True:
            if not self._watchers:
                self._watched = anyio.Event()
                await self._watched.wait()
            self._history.now(await self._daemon.status())
            await self._history.look(self._folder)
            await anyio.sleep(self._status_s)


def _read(file: str) -> bytes:
    """A file of the page, with the charts that its scripts draw where it asks for them."""
    return read_asset(file, _ASSETS).replace("CHARTS</script>", f"{script_safe(live_charts())}</script>").encode()


def _json(reply: Reply, status: HTTPStatus = HTTPStatus.OK) -> HttpResponse:
    return HttpResponse(status=status, kind="application/json", body=msgspec.json.encode(reply))


def _line(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.kind.encode(), event.data)


def _name_in(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
