"""The client against servers that are none."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.control.test_protocol import STATUS
from troupe.daemon.control.client import NobodyThereError, ask
from troupe.daemon.control.protocol import decode_request, encode_line
from troupe.errors import RunError
from troupe.messages import GetStatus, Pause
from troupe.records.layout import CONTROL_SOCKET

Script = Callable[[socket.socket], None]


@contextmanager
def served(folder: Path, script: Script) -> Iterator[None]:
    """Somebody who does this to one client."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(folder / CONTROL_SOCKET))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_answers_come_whole_however_they_are_cut(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        assert decode_request(connection.recv(1000)) == GetStatus()
        for byte in encode_line(STATUS):
            connection.sendall(bytes([byte]))

    with served(tmp_path, script):
        assert ask(tmp_path, GetStatus()) == STATUS


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(NobodyThereError, match="no run is live in this folder now"):
        ask(tmp_path, Pause())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(tmp_path / CONTROL_SOCKET))
    with pytest.raises(NobodyThereError, match="nobody answers"):
        ask(tmp_path, Pause())


def test_it_hangs_up_before_it_answers(tmp_path: Path) -> None:
    with served(tmp_path, lambda connection: None), pytest.raises(NobodyThereError, match="went away"):
        ask(tmp_path, Pause())


def test_it_does_not_answer(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        while connection.recv(1000):
            pass

    with served(tmp_path, script), pytest.raises(RunError, match=r"no answer within 0\.05 s"):
        ask(tmp_path, Pause(), 0.05)


def test_it_answers_nonsense(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"hello\n")

    with served(tmp_path, script), pytest.raises(RunError, match="what came is no answer"):
        ask(tmp_path, Pause())


def test_it_answers_without_end(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"x" * 2000)
        connection.recv(1)

    with served(tmp_path, script), pytest.raises(RunError, match="more than 1,000 bytes"):
        ask(tmp_path, Pause(), most_bytes=1000)
