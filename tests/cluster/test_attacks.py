"""Intruders at the message server, with no key, with a wrong one, and with a worker's own: each is refused."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tests.support.nats import PATIENCE_S, Raw, echoing, ends, published, server, ticket_of, until
from troupe.cluster.bus import MAX_BYTES, hub_subject, inbox_of, stored_subject
from troupe.cluster.connection import connect
from troupe.cluster.keys import new_seed
from troupe.cluster.server import MessageServer
from troupe.cluster.ticket import Ticket
from troupe.cluster.users import stream_of

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MessageServer]:
    """A server with two workers, `worker` and `other`, that all these intruders come to; it must outlast them."""
    with server(tmp_path_factory.mktemp("run")) as message_server:
        ticket_of(message_server, "other")
        yield message_server
        assert message_server.starts == 1


def intruder(ticket: Ticket, **more: ssl.TLSVersion) -> Raw:
    return Raw(ticket.addresses[0], ticket.run, ticket.ca, **more)


def test_who_has_no_key_or_another_one_is_refused(served: MessageServer) -> None:
    ticket = ticket_of(served, "worker")
    with intruder(ticket) as one:
        nonce = one.info["nonce"]
    for seed, more in (
        (None, {}),
        (None, {"user": "worker", "pass": ticket.name}),
        (None, {"auth_token": "worker"}),
        (new_seed(), {}),
        (ticket.seed, {"sig": "AAAA"}),
    ):
        with intruder(ticket) as one:
            assert one.info["nonce"] != nonce
            assert b"Authorization Violation" in one.join(seed, **more)
            assert one.line() == b""
    with intruder(ticket) as one:
        one.info["nonce"] = nonce  # the signature of another connection, sent again
        assert b"Authorization Violation" in one.join(ticket.seed)
    with intruder(ticket) as one:
        assert one.join(ticket.seed) == b"PONG"


def test_who_does_not_speak_tls_1_3_hears_nothing(served: MessageServer) -> None:
    ticket = ticket_of(served, "worker")
    host, _, port = ticket.addresses[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain:
        plain.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        heard = b""
        try:
            while got := plain.recv(4096):
                heard += got
        except ConnectionResetError:
            pass
    assert b"INFO" not in heard
    assert b"nonce" not in heard
    with pytest.raises(ssl.SSLError):
        intruder(ticket, tls=ssl.TLSVersion.TLSv1_2)


async def test_a_worker_sends_nothing_to_a_server_of_another_run(served: MessageServer, tmp_path: Path) -> None:
    ticket = ticket_of(served, "worker")
    with server(tmp_path) as foreign:
        there = Ticket(run=ticket.run, name="worker", addresses=foreign.addresses, ca=ticket.ca, seed=ticket.seed)
        async with connect(there) as worker:
            await until(worker, "untrusted")
            assert "certificate" in worker.detail
            assert ticket.seed not in worker.detail
        renamed = Ticket(run="another", name="worker", addresses=ticket.addresses, ca=ticket.ca, seed=ticket.seed)
        async with connect(renamed) as worker:  # signed by the same, for another
            await until(worker, "untrusted")


async def test_a_worker_gives_a_server_without_tls_no_key(served: MessageServer) -> None:
    ticket = ticket_of(served, "worker")
    heard: list[bytes] = []

    async def pretend(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1,"nonce":"abc"}\r\n')
            with anyio.move_on_after(0.4):
                try:
                    while True:
                        heard.append(await stream.receive())
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    there = Ticket(run=ticket.run, name="worker", addresses=(f"127.0.0.1:{port}",), ca=ticket.ca, seed=ticket.seed)
    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, pretend)
        async with connect(there) as worker:
            await until(worker, "untrusted")
        group.cancel_scope.cancel()
    await listener.aclose()
    assert heard
    assert b"CONNECT" not in b"".join(heard)
    assert b"nkey" not in b"".join(heard)


PUBLISHED = (
    "{run}.hub.other.x",
    "{run}.hub.worker",
    "{run}.hub.x",
    "{run}.w.7.0",
    "{run}",
    "another.hub.worker.x",
    "_INBOX_other.x",
    "_INBOX_hub.x",
    "_R_.x",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.INFO.{stream}",
    "$JS.API.STREAM.CREATE.mine",
    "$JS.API.STREAM.UPDATE.{stream}",
    "$JS.API.STREAM.DELETE.{stream}",
    "$JS.API.STREAM.PURGE.{stream}",
    "$JS.API.STREAM.MSG.GET.{stream}",
    "$JS.API.STREAM.MSG.DELETE.{stream}",
    "$JS.API.STREAM.SNAPSHOT.{stream}",
    "$JS.API.CONSUMER.CREATE.{stream}",
    "$JS.API.CONSUMER.CREATE.{stream}.mine.{run}.w.7",
    "$JS.API.CONSUMER.DURABLE.CREATE.{stream}.mine",
    "$JS.API.DIRECT.GET.{stream}",
    "$JS.API.DIRECT.GET.another.{run}.w.7.0",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$SYS.REQ.ACCOUNT.HUB.CONNZ",
    "$SYS.REQ.CLAIMS.LIST",
)
HEARD = (
    ">",
    "*.>",
    "{run}.>",
    "{run}.hub.>",
    "{run}.hub.other.>",
    "{run}.hub.*.x",
    "{run}.w.>",
    "_INBOX.>",
    "_INBOX_other.>",
    "_INBOX_hub.>",
    "_INBOX_worker",
    "_R_.>",
    "*.x",
    "$JS.>",
    "$JS.API.>",
    "$SYS.>",
    "$SYS.REQ.>",
)


async def test_a_worker_neither_asks_nor_hears_in_anothers_name(served: MessageServer) -> None:
    ticket, other = ticket_of(served, "worker"), ticket_of(served, "other")
    run, stream = served.run, stream_of(served.run)
    chunk = stored_subject(run, "7", "0")
    async with ends(served.ticket, other) as (hub, _), echoing(hub, run) as asked:
        await hub.put(chunk, b"weights")
        with intruder(ticket) as one:
            assert one.join(ticket.seed) == b"PONG"
            for subject in PUBLISHED:
                name = subject.format(run=run, stream=stream)
                said = one.told(published(name, b"{}", f"{inbox_of('worker')}.y"))
                assert len(said) == 1, name
                assert b"Permissions Violation for Publish" in said[0], name
            for number, subject in enumerate(HEARD):
                said = one.told(f"SUB {subject.format(run=run)} {number}\r\n".encode())
                assert [b"Permissions Violation for Subscription" in line for line in said] == [True], subject
            assert one.told(f"SUB {inbox_of('worker')}.y.> 99\r\n".encode()) == []
        assert asked == []
        assert await hub.get(chunk) == b"weights"


async def test_nobody_is_made_to_write_where_a_worker_may_not(served: MessageServer) -> None:
    """A server and a hub send replies where the asker wants them: not among the weights, nor in another's name."""
    ticket, other = ticket_of(served, "worker"), ticket_of(served, "other")
    run = served.run
    chunk, forged = stored_subject(run, "7", "0"), stored_subject(run, "7", "1")
    read = f"$JS.API.DIRECT.GET.{stream_of(run)}.{chunk}"
    async with ends(served.ticket, other) as (hub, there), echoing(hub, run) as asked:
        await hub.put(chunk, b"weights")
        await hub.put(forged, b"true")
        with intruder(ticket) as one, intruder(other) as victim:
            assert one.join(ticket.seed) == victim.join(other.seed) == b"PONG"
            assert victim.told(f"SUB {inbox_of('other')}.> 1\r\n".encode()) == []
            own = hub_subject(run, "worker", "x")
            for target in (forged, hub_subject(run, "other", "x"), f"$JS.API.STREAM.PURGE.{stream_of(run)}"):
                one.told(published(read, b"", target), published(own, b"a", target))
                traced = f"NATS/1.0\r\nNats-Trace-Dest: {target}\r\n\r\n".encode()
                one.told(f"HPUB {own} {len(traced)} {len(traced)}\r\n".encode() + traced + b"\r\n")
            assert await there.request(hub_subject(run, "other", "last"), b"", timeout_s=5.0) == b"other:"
            assert await hub.get(forged) == b"true"
            assert await hub.get(chunk) == b"weights"
            assert {subject for subject in asked if ".other." in subject} == {hub_subject(run, "other", "last")}


@pytest.mark.parametrize(
    "frame",
    [
        f"PUB x {MAX_BYTES * 2}\r\n".encode(),
        b"PUB x -1\r\n",
        b"PUB x 99999999999999999999\r\n",
        b"PUB " + b"x" * 4000 + b" 1\r\n",
        b"SUB " + b"x." * 2000 + b" 1\r\n",
        b"x" * 8192,
        bytes(range(256)),
        b"HPUB x 99 1\r\nx\r\n",
        b"RS+ x y\r\n",
        b"LS+ x y\r\n",
        b"\x16\x03\x01" + b"\0" * 400,
        b"CONNECT " + b"{" * 1500 + b"\r\n",
    ],
    ids=range(12),
)
def test_frames_that_are_too_large_or_none_end_the_connection(served: MessageServer, frame: bytes) -> None:
    ticket = ticket_of(served, "worker")
    with intruder(ticket) as one:
        assert one.join(ticket.seed) == b"PONG"
        one.send(frame + b"\r\n")
        said = [one.line()]
        while said[-1]:
            said.append(one.line())
        assert not said[0] or said[0].startswith(b"-ERR"), said
    with intruder(ticket) as one:
        before = one.join(None)  # before it is known who speaks
        assert b"Authorization Violation" in before


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_there_is_no_other_door(served: MessageServer) -> None:
    keeper_pid, server_pid = served.pids
    sockets = set()
    for descriptor in Path(f"/proc/{server_pid}/fd").iterdir():
        try:
            sockets.add(str(descriptor.readlink()))
        except OSError:
            continue
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{server_pid}/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in sockets
    ]
    assert len(listening) == 1
    folder = served.users.folder
    seeds = [ticket_of(served, name).seed for name in ("worker", "other")] + [served.ticket.seed]
    for file in folder.rglob("*"):
        mode = file.stat().st_mode & 0o777
        assert mode & 0o077 == 0 or file.is_relative_to(folder / "server"), file
        if file.is_file() and file.parent != folder:
            assert not any(seed in file.read_text(errors="replace") for seed in seeds), file
    assert folder.stat().st_mode & 0o777 == (folder / "server").stat().st_mode & 0o777 == 0o700
    for pid in (keeper_pid, server_pid):
        for what in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
            assert not any(seed in text for seed in seeds)


@pytest.mark.slow
async def test_who_says_nothing_is_let_go_and_keeps_nobody_out(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        ticket = ticket_of(message_server, "worker")
        host, _, port = ticket.addresses[0].rpartition(":")
        silent = [socket.create_connection((host, int(port)), timeout=PATIENCE_S) for _ in range(200)]
        slow = [intruder(ticket) for _ in range(20)]
        async with ends(message_server.ticket, ticket) as (hub, worker), echoing(hub, message_server.run):
            subject = hub_subject(message_server.run, "worker", "x")
            assert await worker.request(subject, b"", timeout_s=5.0) == b"worker:"
            for one in silent:
                assert await anyio.to_thread.run_sync(one.recv, 1) == b""
                one.close()
            for each in slow:
                lines = [await anyio.to_thread.run_sync(each.line) for _ in range(2)]
                assert b"Authentication Timeout" in lines[0]
                assert lines[1] == b""
                each.__exit__()
            assert await worker.request(subject, b"", timeout_s=5.0) == b"worker:"
        assert message_server.starts == 1


@pytest.mark.slow
async def test_a_worker_that_takes_all_connections_does_not_keep_the_hub_out(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        ticket = ticket_of(message_server, "worker")
        held: list[Raw] = []
        try:
            while len(held) < 600:
                one = intruder(ticket)
                held.append(one)
                if (answer := one.join(ticket.seed)) != b"PONG":
                    break
            assert b"maximum" in answer
            assert len(held) < 520
            async with ends(message_server.ticket) as (hub,):
                await hub.put(stored_subject(message_server.run, "7"), b"weights")
            message_server.users.revoke("worker")
            with anyio.fail_after(PATIENCE_S):
                for each in held[:5]:
                    while await anyio.to_thread.run_sync(each.line):
                        pass
        finally:
            for each in held:
                each.__exit__()
