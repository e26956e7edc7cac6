"""Blobs: whole or not there, whatever happens to chunks on the way."""

from __future__ import annotations

import pytest

from tests.support import virtual_time
from tests.support.fake_bus import FakeBroker
from troupe.cluster.blobs import BlobMissingError, digest_of, drop_blob, get_bytes, in_chunks, put_bytes
from troupe.cluster.bus import HUB
from troupe.errors import RunError
from troupe.runtime.frames import MessageError

DATA = bytes(range(256)) * 5
MOST = 10_000


def put_and_get(broker: FakeBroker, data: bytes = DATA, chunk: int = 100) -> bytes:
    async def both() -> bytes:
        await put_bytes(broker.bus(HUB), "r1.w.b", data, chunk=chunk)
        return await get_bytes(broker.bus("w"), "r1.w.b", most=MOST)

    return virtual_time.run(both)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1280])
def test_what_was_put_comes_back(size: int) -> None:
    assert put_and_get(FakeBroker(), DATA[:size]) == DATA[:size]


def test_chunks_that_come_damaged_or_late_are_asked_for_until_they_are_right() -> None:
    broker, damaged = FakeBroker(), set[str]()

    def once(subject: str, data: bytes) -> bytes:
        if subject.endswith("head") or subject in damaged:
            return data
        damaged.add(subject)
        return bytes([data[0] ^ 1]) + data[1:]

    broker.damage = once
    broker.delay_s = lambda subject: float(len(subject) + ord(subject[-1]) % 7)
    assert put_and_get(broker) == DATA
    assert len(damaged) == 13


def test_what_is_damaged_for_good_is_an_error_that_names_the_chunk() -> None:
    broker = FakeBroker()
    broker.damage = lambda subject, data: data[:-1] if subject.endswith(".7") else data
    with pytest.raises(RunError, match=r"r1\.w\.b\.7: came damaged"):
        put_and_get(broker)


def test_a_connection_that_is_lost_meanwhile_is_waited_for() -> None:
    broker = FakeBroker()

    async def drive() -> bytes:
        bus = broker.bus("w")
        await put_bytes(broker.bus(HUB), "r1.w.b", DATA, chunk=100)
        asked = iter(range(100))

        def sometimes(subject: str) -> float:
            broker.away = next(asked) in (3, 4, 9)
            return 0.1

        broker.delay_s = sometimes
        return await get_bytes(bus, "r1.w.b", most=MOST)

    assert virtual_time.run(drive) == DATA


def test_a_blob_without_a_head_or_a_chunk_is_not_there() -> None:
    broker = FakeBroker()

    async def drive() -> None:
        hub, bus = broker.bus(HUB), broker.bus("w")
        for gone in ("head", "3"):
            await put_bytes(hub, "r1.w.b", DATA, chunk=100)
            del broker.stored[f"r1.w.b.{gone}"]
            with pytest.raises(BlobMissingError):
                await get_bytes(bus, "r1.w.b", most=MOST)
        await put_bytes(hub, "r1.w.b", DATA, chunk=100)
        await drop_blob(hub, "r1.w.b")
        assert not broker.stored

    virtual_time.run(drive)


@pytest.mark.parametrize("head", [b"", b"\x80", b"no head"])
def test_a_head_that_is_none_is_refused(head: bytes) -> None:
    broker = FakeBroker()

    async def drive() -> None:
        broker.stored["r1.w.b.head"] = head
        await get_bytes(broker.bus("w"), "r1.w.b", most=MOST)

    with pytest.raises(MessageError):
        virtual_time.run(drive)


def test_more_than_was_asked_for_is_not_read() -> None:
    with pytest.raises(MessageError, match="10,001 bytes"):
        put_and_get(FakeBroker(), bytes(10_001))


def test_a_digest_does_not_depend_on_the_pieces() -> None:
    assert digest_of([DATA]) == digest_of([DATA[:7], b"", DATA[7:]]) == digest_of(in_chunks([DATA], 3))
    assert digest_of([DATA]) != digest_of([DATA, b"\0"])
