"""Why there is no score, and what an error says of its cause: a service that may come back, or code that is wrong.

Errors of libraries that are not ours to import are told by the names of their classes and by the HTTP status that they
carry.
"""

import errno
import http.client
import math
import re
import socket
import ssl
import subprocess
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import anyio
import msgspec

import troupe.errors
from troupe.errors import sayable

FaultKind = Literal["reward_timeout", "reward_error", "reward_nonfinite", "reward_log"]

_PASSING = (ConnectionError, TimeoutError, socket.gaierror, socket.herror, ssl.SSLError, http.client.HTTPException)
_PASSING_ERRNO = {
    getattr(errno, name)
    for name in (
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EPIPE", "ESHUTDOWN", "ENOTCONN", "ETIMEDOUT", "EADDRNOTAVAIL"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EPROTO"),
        *("EAGAIN", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EIO", "ESTALE"),  # the machine's, or a disk's
    )
    if hasattr(errno, name)
}
_PASSING_STATUS = {408, 425, 429}
"""Of HTTP, beside 5xx: too slow, too early, too many."""
_PASSING_CODES = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL"}
"""Of gRPC."""
_PASSING_NAME = re.compile(
    r"Timeout|TimedOut|Connect|Disconnect|Unavailable|Transport|Network|RateLimit|TooManyRequests|Overloaded"
    r"|ServerError|ProxyError|IncompleteRead|ChunkedEncoding|ClientPayload|RemoteProtocol"
    r"|BrokenResource|ClosedResource|EndOfStream"
)
_WRONG_NAME = re.compile(
    r"UnsupportedProtocol|LocalProtocol|Invalid\w*U(RL|rl)|MissingSchema|InvalidSchema|UnknownProtocol"
)
"""Of errors that those libraries raise for an address that cannot be right, some of them as kinds of the above."""


_REFUSED = re.compile(r"connection refused|connect call failed|\[Errno (111|61)\]", re.IGNORECASE)
_PLACE = re.compile(r" \([^()]*:\d+\)$")
_SHORT = 100


class Fault(msgspec.Struct, frozen=True):
    """Why there is no score; of the kind `reward_log`, why something that was logged is not there."""

    kind: FaultKind
    message: str
    by_code: bool = False
    """Whether no service that is away makes such an error."""


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one that it arose from, is of a kind that a service which is away or busy makes: a
    connection, a time limit, an HTTP status 5xx, 408, 425 or 429. Anything else would be the same at every try."""
    return any(_may_pass(each) for each in _with_causes(error))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = list(each.exceptions) if isinstance(each, BaseExceptionGroup) else []
        context = None if each.__suppress_context__ else each.__context__
        waiting += [one for one in (*inner, each.__cause__, context) if one is not None]


def _may_pass(error: BaseException) -> bool:
    names = [cls.__name__ for cls in type(error).__mro__ if cls.__module__ != "builtins"]
    if any(map(_WRONG_NAME.search, names)) or isinstance(error, http.client.InvalidURL):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if (code := _grpc_code(error)) is not None:
        return code in _PASSING_CODES
    reason = getattr(error, "reason", None)
    if "URLError" in names:  # of urllib: the reason is an error, or a text where the address cannot be right
        return isinstance(reason, BaseException) and may_pass(reason)
    if isinstance(error, (*_PASSING, subprocess.TimeoutExpired)):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    if type(error) is OSError and error.errno is None:  # raised by a library, or in words, not by the system
        return True
    return any(map(_PASSING_NAME.search, names))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as requests, httpx, aiohttp, urllib, openai and others have it."""
    response = _attribute(error, "response")
    for holder in (error, response):
        for name in ("status_code", "status", "code", "http_status"):
            value = _attribute(holder, name)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return int(value)
    return None


def _grpc_code(error: BaseException) -> str | None:
    code = _attribute(error, "code")
    if not callable(code) or "RpcError" not in [cls.__name__ for cls in type(error).__mro__]:
        return None
    try:
        return str(getattr(code(), "name", ""))
    except Exception:  # user code, or a library's
        return None


def _attribute(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # a property of a library's may raise anything
        return None


def place_of(error: BaseException) -> str:
    """`FILE:LINE` where an error arose: the innermost line that is neither a library's nor ours, or where there is
    none, the innermost one; empty without a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    own = [frame for frame in frames if not is_library(frame.filename)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def place_in(frame: FrameType | None) -> str:
    """The same for code that is at work: `frame` or who called it."""
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@cache
def is_library(filename: str) -> bool:
    """Whether a file is Python's, an installed package's or ours, and so not what the user wrote."""
    if filename.startswith("<"):
        return True
    path = Path(filename)
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return True
    return any(path.is_relative_to(folder) for folder in _folders())


@cache
def _folders() -> tuple[Path, ...]:
    ours = Path(troupe.errors.__file__).parent
    return (ours, *{Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})


def is_own_failure(error: BaseException) -> bool:
    """Whether the called code failed, as opposed to us or the user ending it."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_own_failure(inner) for inner in error.exceptions)
    if isinstance(error, anyio.get_cancelled_exc_class()):
        # Code that awaits a task cancelled elsewhere raises the same class without anybody cancelling us.
        return anyio.current_effective_deadline() != -math.inf
    return not isinstance(error, (KeyboardInterrupt, GeneratorExit))


def in_short(message: str) -> str:
    """A fault in a few words for a line of a display: without the place in the code, and no longer than that."""
    if _REFUSED.search(message):
        return "connection refused"
    text = _PLACE.sub("", " ".join(message.split()))
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"


def described(error: BaseException) -> str:
    """Class, text and place of an error in one line, as UTF-8 can say it; the place is the user's own line, if there is
    one."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its __str__ is code like any other
        text = ""
    text = text if len(text) <= 300 else text[:299] + "…"
    place = f" ({place})" if (place := place_of(error)) else ""
    return sayable(f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}")
