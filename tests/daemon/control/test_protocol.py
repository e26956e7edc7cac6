"""What is a message of the control socket, and what is none."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from troupe.daemon.control.protocol import (
    NobodyThereError,
    ProtocolError,
    Reply,
    Request,
    ask,
    decode_reply,
    decode_request,
    encode_line,
)
from troupe.errors import RunError
from troupe.messages import (
    Checkpoint,
    Done,
    Drain,
    GetStatus,
    LiveGroup,
    Pause,
    Refused,
    Reload,
    Restarting,
    Resume,
    Set,
    Slot,
    Status,
    Step,
    Stop,
)
from troupe.records.layout import CONTROL_SOCKET

Script = Callable[[socket.socket], None]
REQUESTS: list[Request] = [
    GetStatus(),
    Pause(),
    Resume(),
    Step(),
    Step(steps=7),
    Checkpoint(),
    Drain(),
    Stop(),
    Set(key="learner.lr", value=1e-6),
    Set(key="rewards.kind", value="rewards.py:kind"),
    Reload(),
]
STATUS = Status(
    phase="restarting",
    step=3,
    total_steps=10,
    policy_version=3,
    groups=(LiveGroup(gid=7, slot=Slot(step=3, place=1, attempt=0), owner="scorer", waiting=True, age_s=1.5),),
    queues={"scored": 1},
    doing={"scorer": "judge for 1.5 s"},
    held=("judge is down",),
    rewards_down={"judge": "no answer"},
    restarts={"scorer": 1},
    incidents={"reward_error": 2},
    metrics={"reward": 0.5},
    restarting=Restarting(attempt=1, limit=5, next_try_s=2.0, reason="killed"),
)
REPLIES: list[Reply] = [Done(), Done(message="it will"), Refused(message="it is not paused"), STATUS]


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
def test_a_request_is_one_line_and_comes_back(request_: Request) -> None:
    line = encode_line(request_)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_request(line) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_an_answer_is_one_line_and_comes_back(reply: Reply) -> None:
    line = encode_line(reply)
    assert line.count(b"\n") == 1
    assert decode_reply(line) == reply


def test_a_request_reads_as_the_docs_say() -> None:
    assert json.loads(encode_line(Step(steps=2))) == {"type": "Step", "steps": 2}
    assert decode_request(b'{"type":"Set","key":"log.level","value":"debug"}') == Set(key="log.level", value="debug")


def test_figures_that_json_cannot_say_are_left_out() -> None:
    metrics = {"loss": math.nan, "kl": math.inf, "reward": 0.5}
    status = decode_reply(encode_line(msgspec.structs.replace(STATUS, metrics=metrics)))
    assert isinstance(status, Status)
    assert status.metrics == {"reward": 0.5}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"", "not a request"),
        (b"stop", "not a request: JSON is malformed"),
        (b"[]", "got `array`"),
        (b"{}", "missing required field `type`; the types are GetStatus, Pause"),
        (b'{"type": "Explode"}', "'Explode'.*the types are GetStatus"),
        (b'{"type": "Status"}', "the types are"),
        (b'{"type": "Pause", "now": true}', "unknown field `now`"),
        (b'{"type": "Step", "steps": 0}', "`int` >= 1"),
        (b'{"type": "Step", "steps": "2"}', "Expected `int`"),
        (b'{"type": "Set", "key": "a.b"}', "missing required field `value`"),
        (b'{"type": "Pause"} {"type": "Stop"}', "trailing characters"),
        (b'{"type": "Pause\xff"}', "not a request"),
        (b'{"type": "Set", "key": "a", "value": ' + b"[" * 60_000, "nested too deeply"),
        (b'{"type":"Set","key":"\xed\xa0\x80","value":1}', "not a request"),
    ],
)
def test_what_is_no_request_says_why(line: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        decode_request(line)


@pytest.mark.parametrize("line", [b"", b"null", b'{"type": "Pause"}', b'{"type": "Done", "message": 3}', b"[" * 60_000])
def test_what_is_no_answer_is_told(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="not an answer"):
        decode_reply(line)


@pytest.mark.parametrize("number", [10**20, -(10**20), 10**400])
def test_a_number_that_no_key_takes(number: int) -> None:
    line = f'{{"type":"Set","key":"checkpoint.every","value":[{number}]}}'.encode()
    with pytest.raises(ProtocolError, match=r"more than 64 bits|out of range"):
        decode_request(line)


# The client, against servers that are none


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
