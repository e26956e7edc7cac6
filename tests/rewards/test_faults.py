"""Which errors a service makes that may come back, and where in the user's own code an error arose."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import ssl
import subprocess
import urllib.error
from collections.abc import Callable
from email.message import Message
from http.client import IncompleteRead, InvalidURL, RemoteDisconnected
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from troupe.rewards.faults import described, in_short, is_library, may_pass, place_of


def http_error(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://judge", status, "said", Message(), None)


def of_library(name: str, *bases: str, **attributes: Any) -> Exception:
    """An error as libraries define them: known by the names of its class and of those that it derives from."""
    cls: type = Exception
    for each in (*reversed(bases), name):
        cls = type(each, (cls,), {"__module__": "library.errors"})
    error = cls("said")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error  # type: ignore[no-any-return]


def arising(error: Exception, *, cause: BaseException, named: bool) -> Exception:
    try:
        try:
            raise cause
        except type(cause) as known:
            raise error from (known if named else error.__cause__)
    except type(error) as raised:
        return raised


def while_handling(error: Exception, cause: BaseException) -> Exception:
    try:
        try:
            raise cause
        except type(cause):
            raise error  # noqa: B904 - what the error arose from is its context only
    except type(error) as raised:
        return raised


PASS = [
    ConnectionError("away"),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    TimeoutError(),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    ssl.SSLError("handshake"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError("away"),
    RemoteDisconnected("no response"),
    IncompleteRead(b""),
    asyncio.IncompleteReadError(b"", 4),
    subprocess.TimeoutExpired("judge", 3),
    urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    *(http_error(status) for status in (408, 425, 429, 500, 502, 503, 529)),
    of_library("ConnectError", "NetworkError", "TransportError", "RequestError"),
    of_library("ReadTimeout", "TimeoutException", "TransportError"),
    of_library("HTTPStatusError", response=SimpleNamespace(status_code=503)),
    of_library("HTTPError", "RequestException", response=SimpleNamespace(status_code=429)),
    of_library("ClientResponseError", "ClientError", status=500),
    of_library("ClientConnectorError", "ClientOSError", "ClientError"),
    of_library("ServerDisconnectedError"),
    of_library("APIConnectionError", "APIError"),
    of_library("RateLimitError", "APIStatusError", status_code=429),
    of_library("InternalServerError", "APIStatusError", status_code=500),
    of_library("AioRpcError", "RpcError", code=lambda: SimpleNamespace(name="UNAVAILABLE")),
    arising(ValueError("no verdict"), cause=ConnectionResetError(), named=True),
    while_handling(KeyError("verdict"), TimeoutError()),
    ExceptionGroup("x", [ValueError("x"), ConnectionError("away")]),
]
STAY = [
    ValueError("x"),
    ZeroDivisionError("x"),
    json.JSONDecodeError("x", "", 0),
    re.error("x"),
    AssertionError(),
    FileNotFoundError(errno.ENOENT, "No such file"),
    PermissionError(errno.EACCES, "Permission denied"),
    RecursionError("x"),
    SystemExit(1),
    MemoryError(),
    RuntimeError("x"),
    UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
    OverflowError("x"),
    NotImplementedError(),
    EOFError(),
    NameError("x"),
    AttributeError("x"),
    TypeError("x"),
    KeyError("x"),
    ImportError("x"),
    asyncio.CancelledError(),
    InvalidURL("x"),
    urllib.error.URLError("unknown url type: judge"),
    urllib.error.URLError(FileNotFoundError(errno.ENOENT, "No such file")),
    *(http_error(status) for status in (400, 401, 403, 404, 422)),
    of_library("HTTPStatusError", response=SimpleNamespace(status_code=404)),
    of_library("AuthenticationError", "APIStatusError", status_code=401),
    of_library("UnsupportedProtocol", "TransportError"),
    of_library("MissingSchema", "RequestException"),
    of_library("AioRpcError", "RpcError", code=lambda: SimpleNamespace(name="UNIMPLEMENTED")),
    of_library("ParseError"),
    ExceptionGroup("x", [TypeError("x"), KeyError("x")]),
]


@pytest.mark.parametrize("error", PASS, ids=repr)
def test_what_a_service_makes_may_pass(error: BaseException) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", STAY, ids=repr)
def test_everything_else_is_the_codes(error: BaseException) -> None:
    assert not may_pass(error)


def test_what_was_handled_and_left_out_is_no_cause() -> None:
    hidden = arising(ValueError("x"), cause=ConnectionError("away"), named=False)
    assert hidden.__suppress_context__
    assert not may_pass(hidden)


def test_errors_that_lead_in_a_circle_are_looked_at_once() -> None:
    one, other = ValueError("x"), KeyError("y")
    one.__cause__, other.__cause__ = other, one
    assert not may_pass(one)


def raised(code: Callable[[], object]) -> BaseException:
    try:
        code()
    except BaseException as error:
        return error
    raise AssertionError


def test_the_place_is_the_users_own_line_not_the_librarys() -> None:
    error = raised(lambda: json.loads("{"))
    line = raised.__code__.co_firstlineno
    here = test_the_place_is_the_users_own_line_not_the_librarys.__code__.co_firstlineno + 1
    assert place_of(error) == f"{__file__}:{here}"
    assert line < here
    assert described(error).endswith(f"({__file__}:{here})")
    assert place_of(ValueError("never raised")) == ""


def test_a_text_that_cannot_be_made_is_left_out() -> None:
    class Mute(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise ValueError("x")

    assert described(Mute()) == "Mute"


def test_what_is_installed_or_ours_is_a_library() -> None:
    libraries = [json.__file__, re.__file__, pytest.__file__, may_pass.__code__.co_filename, "<string>"]
    assert all(map(is_library, libraries))
    assert not is_library(__file__)
    assert not is_library(str(Path("rewards.py")))


def test_what_utf_8_cannot_say_is_told_by_its_escape() -> None:
    assert described(ValueError("no file caf\udce9")) == r"ValueError: no file caf\udce9"


def test_long_texts_are_cut_and_empty_ones_left_out() -> None:
    assert described(ValueError()) == "ValueError"
    assert described(ValueError("x" * 1000)) == "ValueError: " + "x" * 299 + "…"


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("ConnectionRefusedError: [Errno 111] Connection refused (/home/me/judge.py:12)", "connection refused"),
        ("OSError: Multiple exceptions: [Errno 111] Connect call failed ('::1', 9, 0, 0)", "connection refused"),
        ("URLError: <urlopen error [Errno 61] Connection refused>", "connection refused"),
        ("no answer within 60 s", "no answer within 60 s"),
        ("ValueError: odd (f.py:1) one\ntwo (/a b/judge.py:3)", "ValueError: odd (f.py:1) one two"),
        ("x" * 200, "x" * 99 + "…"),
    ],
)
def test_a_fault_in_a_few_words(message: str, short: str) -> None:
    assert in_short(message) == short
