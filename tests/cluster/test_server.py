"""The message server as a child: it is there while the run is, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.extras import extra
from tests.support.nats import PATIENCE_S, Raw, server
from troupe.cluster import binary
from troupe.cluster.addresses import Place, reachable
from troupe.cluster.server import parse_place
from troupe.cluster.ticket import Ticket, read_ticket
from troupe.errors import ConfigError, InputError


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(met: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_it_ends_with_the_run_however_that_ends(tmp_path: Path) -> None:
    extra("nkeys")
    hub = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.hub_alone", str(tmp_path / "join")], stdout=subprocess.PIPE, text=True
    )
    assert hub.stdout is not None
    pids = list(map(int, hub.stdout.readline().split()))
    assert [lives(pid) for pid in pids] == [True, True]
    hub.kill()
    hub.wait()
    hub.stdout.close()
    wait_for(lambda: not any(map(lives, pids)))
    with server(tmp_path) as again:  # the port is where workers look for it
        assert again.addresses == again.users.read().addresses
        keeper_pid, server_pid = again.pids
        os.kill(keeper_pid, signal.SIGKILL)
        wait_for(lambda: not lives(server_pid))
        wait_for(lambda: again.starts == 2 and len(again.pids) == 2)
        pids = again.pids
    assert not any(map(lives, pids))


def test_a_run_keeps_its_key_its_users_and_its_port_when_it_goes_on(tmp_path: Path) -> None:
    with server(tmp_path) as first:
        before, hub_key = first.users.read(), first.ticket.seed
        ticket = read_ticket(tmp_path / "join" / "worker.toml")
    with server(tmp_path) as second:
        assert second.users.read() == before
        assert second.ticket.seed != hub_key
        assert read_ticket(tmp_path / "join" / "worker.toml") == ticket
        second.users.revoke("worker")
    with server(tmp_path, f"localhost:{second.addresses[0].rpartition(':')[2]}") as third:
        assert third.users.read().users == ()  # who was revoked is not invited again
        third.users.invite("two")
    with server(tmp_path, "127.0.0.1:0") as fourth:  # join files follow an address that changes
        assert read_ticket(tmp_path / "join" / "two.toml").addresses == fourth.addresses != third.addresses


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_list_of_users_that_is_damaged_opens_no_door_and_closes_none(tmp_path: Path) -> None:
    told: list[str] = []
    with server(tmp_path, tell=told.append) as message_server:
        ticket = read_ticket(tmp_path / "join" / "worker.toml")
        file = tmp_path / "join" / "users.toml"
        whole = file.read_bytes()
        for damage in (b"run = 1", b"\xff", b'run = "r1"\nusers = [{ name = "x", key = "*" }]', None):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            told.clear()
            wait_for(lambda: any("cannot be read" in line for line in told))
            with Raw(ticket.addresses[0], ticket.run, ticket.ca) as worker:
                assert worker.join(ticket.seed) == b"PONG"
        os.kill(message_server.pids[-1], signal.SIGKILL)  # it is started again by the list as it was
        wait_for(lambda: message_server.starts == 2 and len(message_server.pids) == 2)
        wait_for(lambda: any("started again" in line for line in told))
        file.write_bytes(whole)
        file.chmod(0o600)
        message_server.users.revoke("worker")
        wait_for(lambda: answer_to(ticket) != b"PONG")


def answer_to(ticket: Ticket) -> bytes:
    try:
        with Raw(ticket.addresses[0], ticket.run, ticket.ca) as worker:
            return worker.join(ticket.seed)
    except OSError:
        return b"PONG"  # not there yet


def test_an_address_that_cannot_be_had_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for place in (f"127.0.0.1:{taken.getsockname()[1]}", "192.0.2.1:0"):
            with pytest.raises(ConfigError, match="nobody can listen"), server(tmp_path, place):
                raise AssertionError
    for text in ("", "4222", "host:", ":4222", "host:port", "host:70000"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            parse_place(text)
    assert parse_place("[::1]:0") == Place("::1", 0)
    assert all(address.endswith(":4222") for address in reachable(Place("0.0.0.0", 4222)))


def test_a_program_that_was_not_tried_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(folder: str, text: str) -> Path:
        file = tmp_path / folder / binary.PROGRAM
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        return file

    old = program("old", "echo nats-server: v2.9.10")
    new = program("new", "echo nats-server: v2.12.1")
    packaged = program("packaged", "echo nats-server: v2.15.1")
    monkeypatch.setenv("PATH", f"{new.parent}:/usr/bin:/bin")
    assert binary.find_server(packaged) == new
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    with pytest.raises(InputError, match=r"2\.9\.10, too old.*sha256"):
        binary.find_server(packaged)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no nats-server"):
        binary.find_server(tmp_path / "nowhere")
