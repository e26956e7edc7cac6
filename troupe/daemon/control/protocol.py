"""What is said over the control socket: one JSON object a line, one answer a line, in order; and who asks there.

A request names its type: `{"type": "Step", "steps": 2}`; the answer is a Done, a Refused, or a Status. To watch a run
is to ask for its status again and again: the server then keeps nothing for a watcher, and one that is slow or gone can
hold up nobody. The client makes plain blocking calls, and is quick to import.
"""

import math
from pathlib import Path
from typing import BinaryIO, TypeAlias, get_args

import msgspec

from troupe.daemon.control.place import connect, find_socket
from troupe.errors import InputError, RunError
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


class NobodyThereError(InputError):
    """No trainer and no daemon answers for this folder."""


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


def ask(folder: Path, request: Request, timeout_s: float = 15.0, most_bytes: int = MAX_REPLY_BYTES) -> Reply:
    """Send one request to whoever runs what is in a folder → the answer.

    Raises NobodyThereError where nobody does, RunError where somebody does but gives no answer.
    """
    try:
        if (path := find_socket(folder)) is None:
            raise NobodyThereError(f"{folder}: no run is live in this folder now")
        connection = connect(path, timeout_s)
    except OSError as error:
        raise NobodyThereError(f"{folder}: nobody answers on the control socket there: {error}") from None
    with connection, connection.makefile("rb") as answers:
        try:
            connection.sendall(encode_line(request))
            return decode_reply(_read_line(answers, most_bytes))
        except TimeoutError:
            raise RunError(f"{folder}: no answer within {timeout_s:g} s; the run may hang") from None
        except (OSError, EOFError) as error:
            raise NobodyThereError(f"{folder}: the run went away before it answered ({error})") from None
        except ProtocolError as error:
            raise RunError(f"{folder}: what came is no answer ({error}); is it of another version?") from None


def _read_line(answers: BinaryIO, most_bytes: int) -> bytes:
    line = answers.readline(most_bytes + 1)
    if len(line) > most_bytes:
        raise ProtocolError(f"more than {most_bytes:,} bytes on one line")
    if not line.endswith(b"\n"):
        raise EOFError("it closed the connection")
    return line
