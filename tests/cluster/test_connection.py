"""The real bus, over a real server: asking, serving, storing, and being there again after each of them has died."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import anyio
import pytest

from tests.support.nats import PATIENCE_S, STORE_BYTES, echoing, ends, server, ticket_of, until
from troupe.cluster.bus import (
    CHUNK_BYTES,
    MAX_BYTES,
    FullError,
    NoAnswer,
    TooLargeError,
    asked_subjects,
    hub_subject,
    stored_subject,
)
from troupe.cluster.connection import Connection
from troupe.cluster.serving import MOST

pytestmark = pytest.mark.anyio


async def test_what_is_asked_is_answered_and_what_is_stored_is_read(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        run = message_server.run
        pull, chunk = hub_subject(run, "worker", "pull"), stored_subject(run, "7", "0")
        async with ends(message_server.ticket, ticket_of(message_server, "worker")) as (hub, worker):
            with pytest.raises(NoAnswer, match=r"nobody|timeout"):  # older servers do not tell
                await worker.request(pull, b"", timeout_s=0.5)
            assert await worker.get(chunk) is None
            async with echoing(hub, run) as asked:
                large = os.urandom(MAX_BYTES)
                assert await worker.request(pull, large, timeout_s=10.0) == b"worker:" + large[:16]
                with pytest.raises(TooLargeError):
                    await worker.request(pull, large + b"x", timeout_s=10.0)
                assert asked == [pull]
            data = os.urandom(CHUNK_BYTES)
            await hub.put(chunk, b"old")
            await hub.put(chunk, data)
            assert await worker.get(chunk) == data
            await filled(hub, run, data)
            assert await worker.get(chunk) == data
            await hub.purge(stored_subject(run, "7", ">"))
            assert await worker.get(chunk) is None


async def filled(hub: Connection, run: str, data: bytes) -> None:
    """Store until no more goes in; what is there is not given up for it."""
    for number in range(2 * STORE_BYTES // len(data)):
        try:
            await hub.put(stored_subject(run, "8", str(number)), data)
        except FullError:
            return
    pytest.fail("there is no end to what the server stores")


async def answer_of(one: Connection, run: str, data: bytes = b"") -> bytes:
    """The reply to a request that is repeated until there is one."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            try:
                return await one.request(hub_subject(run, one.name, "x"), data, timeout_s=5.0)
            except NoAnswer:
                await anyio.sleep(0.05)


async def test_who_asks_too_much_holds_up_nobody_else(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        run, open_now = message_server.run, anyio.Event()
        async with ends(
            message_server.ticket, ticket_of(message_server, "worker"), ticket_of(message_server, "other")
        ) as (hub, worker, other):
            held: list[str] = []
            replies: list[bytes | str] = []

            async def answer(subject: str, data: bytes) -> bytes:
                if data:
                    held.append(subject)
                    await open_now.wait()
                return b"answered"

            async def ask(timeout_s: float) -> None:
                try:
                    replies.append(await worker.request(hub_subject(run, "worker", "x"), b"x", timeout_s=timeout_s))
                except NoAnswer as error:
                    replies.append(error.why)

            async with hub.serve(asked_subjects(run), answer), anyio.create_task_group() as group:
                for _ in range(MOST):
                    group.start_soon(ask, PATIENCE_S)
                with anyio.fail_after(PATIENCE_S):
                    while len(held) < MOST:  # noqa: ASYNC110 - all of them
                        await anyio.sleep(0.01)
                async with anyio.create_task_group() as further:
                    for _ in range(36):
                        further.start_soon(ask, 0.5)
                assert replies == ["timeout"] * 36
                assert await other.request(hub_subject(run, "other", "x"), b"", timeout_s=PATIENCE_S) == b"answered"
                open_now.set()
            assert replies[36:] == [b"answered"] * MOST
            assert len(held) == MOST


async def test_a_server_that_is_killed_is_there_again_and_empty(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        run = message_server.run
        chunk = stored_subject(run, "7", "0")
        tickets = message_server.ticket, ticket_of(message_server, "worker")
        async with ends(*tickets) as (hub, worker), echoing(hub, run):
            await hub.put(chunk, b"weights")
            for epoch in (1, 2):
                assert (hub.epoch, worker.epoch) == (epoch, epoch)
                os.kill(message_server.pids[-1], signal.SIGKILL)
                await until(worker, "lost")
                assert await answer_of(worker, run, b"again") == b"worker:again"
                assert await worker.get(chunk) is None
                await hub.put(chunk, b"weights")
                assert await worker.get(chunk) == b"weights"
        assert message_server.starts == 3


@pytest.mark.slow
async def test_twenty_kills_of_the_server_at_any_moment_are_each_outlived(tmp_path: Path) -> None:
    moments = random.Random(7)
    with server(tmp_path) as message_server:
        run = message_server.run
        tickets = message_server.ticket, ticket_of(message_server, "worker")
        async with ends(*tickets) as (hub, worker), echoing(hub, run):
            for _ in range(20):
                await anyio.sleep(moments.uniform(0.0, 0.6))  # also while they come back from the last one
                for pid in message_server.pids[-1:]:
                    os.kill(pid, signal.SIGKILL)
                with anyio.fail_after(10.0):
                    assert await answer_of(worker, run, b"again") == b"worker:again"
            await hub.put(stored_subject(run, "7"), b"weights")
            assert await worker.get(stored_subject(run, "7")) == b"weights"


async def test_a_revoked_key_is_cut_off_and_a_new_one_of_the_name_is_not(tmp_path: Path) -> None:
    gone: list[str] = []
    with server(tmp_path, revoked=gone.append) as message_server:
        run = message_server.run
        tickets = message_server.ticket, ticket_of(message_server, "worker"), ticket_of(message_server, "other")
        async with ends(*tickets) as (hub, worker, other), echoing(hub, run):
            message_server.users.revoke("worker")
            await until(worker, "refused")
            assert gone == ["worker"]
            with pytest.raises(NoAnswer, match="refused"):
                await worker.request(hub_subject(run, "worker", "x"), b"", timeout_s=5.0)
            async with ends(ticket_of(message_server, "worker")) as (again,):
                assert await answer_of(again, run) == b"worker:"
            assert await answer_of(other, run) == b"other:"
            assert (hub.state, other.state) == ("connected", "connected")
        assert (hub.epoch, other.epoch, message_server.starts) == (1, 1, 1)


async def test_a_bus_that_is_closed_ends_what_is_being_asked(tmp_path: Path) -> None:
    with server(tmp_path) as message_server:
        subject = hub_subject(message_server.run, "worker", "x")
        async with ends(message_server.ticket) as (hub,):

            async def never(subject: str, data: bytes) -> bytes:
                await anyio.sleep_forever()
                raise AssertionError

            async def ask(worker: Connection) -> None:
                with pytest.raises(NoAnswer):
                    await worker.request(subject, b"", timeout_s=60.0)

            async with (
                hub.serve(asked_subjects(message_server.run), never),
                anyio.create_task_group() as group,
                ends(ticket_of(message_server, "worker")) as (worker,),
            ):
                group.start_soon(ask, worker)
                await anyio.sleep(0.1)
            with pytest.raises(NoAnswer, match="closed"):
                await worker.request(subject, b"", timeout_s=60.0)
