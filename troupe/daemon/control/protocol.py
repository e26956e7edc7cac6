"""What is said over the control socket: one JSON object a line, one answer a line, in order.

A request names its type: `{"type": "Step", "steps": 2}`; the answer is a Done, a Refused, or a Status. To watch a run
is to ask for its status again and again: the server then keeps nothing for a watcher, and one that is slow or gone can
hold up nobody.
"""

from __future__ import annotations

import math
from typing import TypeAlias, get_args

import msgspec

from troupe.messages import (
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    Pause,
    Refused,
    Reload,
    Resume,
    Set,
    Status,
    Step,
    Stop,
)

MAX_REQUEST_BYTES = 64 * 1024
"""Longest line that is taken as a request, its end not counted."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
"""Longest line that is taken as an answer: a Status names every live group."""

Request: TypeAlias = GetStatus | Pause | Resume | Step | Checkpoint | Drain | Stop | Set | Reload
Reply: TypeAlias = Done | Refused | Status

_DECODE_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_DECODE_REPLY: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_KNOWN = ", ".join(kind.__name__ for kind in get_args(Request))


class ProtocolError(ValueError):
    """What came is no message of this protocol."""


def encode_line(message: Request | Reply) -> bytes:
    """One message as one line, its end included. Figures that are not finite, which JSON cannot say, are left out."""
    if isinstance(message, Status):
        finite = {name: value for name, value in message.metrics.items() if math.isfinite(value)}
        message = msgspec.structs.replace(message, metrics=finite)
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """The request on a line; ProtocolError says what is wrong with it."""
    try:
        request = _DECODE_REQUEST.decode(line)
        if isinstance(request, Set):
            msgspec.msgpack.encode(request.value)  # as a daemon passes it on
    except RecursionError:
        raise ProtocolError("the request is nested too deeply") from None
    except OverflowError:
        raise ProtocolError("not a request: a number in it has more than 64 bits") from None
    except ValueError as error:  # msgspec's, and text that is no UTF-8
        hint = f"; the types are {_KNOWN}" if "$.type" in str(error) or "`type`" in str(error) else ""
        raise ProtocolError(f"not a request: {error}{hint}") from None
    return request


def decode_reply(line: bytes) -> Reply:
    """The answer on a line; ProtocolError says what is wrong with it."""
    try:
        return _DECODE_REPLY.decode(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not an answer: {error}") from None
