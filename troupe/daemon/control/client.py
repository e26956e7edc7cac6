"""The client's end of the control socket: ask, and wait for the answer. Plain blocking calls, quick to import."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from troupe.daemon.control.place import connect, find_socket
from troupe.daemon.control.protocol import MAX_REPLY_BYTES, ProtocolError, Reply, Request, decode_reply, encode_line
from troupe.errors import InputError, RunError


class NobodyThereError(InputError):
    """No trainer and no daemon answers for this folder."""


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
