"""The client's end of the control socket: ask, and wait for the answer. Plain blocking calls, quick to import."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from troupe.daemon.control.place import connected, find_socket
from troupe.daemon.control.protocol import MAX_REPLY_BYTES, ProtocolError, Reply, Request, decode_reply, encode_line
from troupe.errors import InputError, RunError


class NobodyThereError(InputError):
    """No trainer and no daemon answers for this folder."""


class Client:
    """A connection to whoever plays the run in a folder; a context manager.

    Raises NobodyThereError where nobody does, RunError where somebody does but gives no answer.
    """

    def __init__(self, folder: Path, timeout_s: float = 15.0) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self._read = b""
        try:
            path = find_socket(folder)
            if path is None:
                raise NobodyThereError(f"{folder}: nobody plays a run in this folder now")
            self._connection = connected(path, timeout_s)
        except OSError as error:
            raise NobodyThereError(f"{folder}: nobody answers on the control socket there: {error}") from None

    def ask(self, request: Request) -> Reply:
        """Send one request → the answer to it."""
        try:
            self._connection.sendall(encode_line(request))
            return decode_reply(self._line())
        except TimeoutError:
            raise RunError(f"{self._folder}: no answer within {self._timeout_s:g} s; the run may hang") from None
        except (OSError, EOFError) as error:
            raise NobodyThereError(f"{self._folder}: the run went away before it answered ({error})") from None
        except ProtocolError as error:
            raise RunError(f"{self._folder}: what came is no answer ({error}); is it of another version?") from None

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> bytes:
        parts = [self._read]
        length = len(self._read)
        while b"\n" not in parts[-1]:
            if length > MAX_REPLY_BYTES:
                raise ProtocolError(f"more than {MAX_REPLY_BYTES:,} bytes on one line")
            chunk = self._connection.recv(1024 * 1024)
            if not chunk:
                raise EOFError("it closed the connection")
            parts.append(chunk)
            length += len(chunk)
        line, _, self._read = b"".join(parts).partition(b"\n")
        return line


def ask(folder: Path, request: Request, timeout_s: float = 15.0) -> Reply:
    """One request and its answer."""
    with Client(folder, timeout_s) as client:
        return client.ask(request)


__all__ = ["Client", "NobodyThereError", "ask"]
