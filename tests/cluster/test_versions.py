"""Policy versions by way of the message server: a worker's files are the run's weights, however they came."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import anyio
import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import virtual_time
from tests.support.fake_bus import FakeBroker, FakeBus
from tests.support.fake_child import InlineDevice
from troupe.cluster.blobs import BlobMissingError
from troupe.cluster.bus import HUB, NoAnswer, Why
from troupe.cluster.deltas import applied, deltas
from troupe.cluster.version_files import VersionFiles
from troupe.cluster.versions import WeightsPublisher
from troupe.errors import RunError
from troupe.policy import Weights
from troupe.policy.safetensors import safetensors_chunks
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import MessageError


def file_of(weights: Weights) -> bytes:
    return b"".join(map(bytes, safetensors_chunks(weights)))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await anyio.sleep(0.02)
    raise AssertionError("it never came to that")


def version(number: int, size: int = 3000) -> Weights:
    """Weights of which a few numbers change from one version to the next."""
    body = mx.arange(size).astype(mx.bfloat16) + mx.where(mx.arange(size) % 50 == number % 50, number, 0)
    weights = {"body": body.astype(mx.bfloat16), "norm": mx.ones(7) * number, "packed": mx.arange(9, dtype=mx.uint32)}
    mx.eval(weights)
    return weights


class Losing(FakeBus):
    """A bus of which what is got is lost as often as there are reasons."""

    def __init__(self, broker: FakeBroker, name: str, losses: list[Why]) -> None:
        super().__init__(broker, name)
        self._losses = losses

    async def get(self, subject: str) -> bytes | None:
        if self._losses:
            raise NoAnswer(subject, self._losses.pop())
        return await super().get(subject)


class Pair:
    """A publisher and a worker's files, on one fake server."""

    def __init__(self, folder: Path, device: DeviceThread, *, full_every: int = 32) -> None:
        self.broker = FakeBroker()
        self.told: list[str] = []
        bus = self.broker.bus(HUB)
        self.publisher = WeightsPublisher(bus, "r1", device, full_every=full_every, tell=self.told.append)
        self.known: dict[int, Weights] = {}
        self.asked_full: list[int] = []
        self.losses: list[Why] = []
        self.files = VersionFiles(Losing(self.broker, "w", self.losses), "r1", folder, device, damaged=self.damaged)

    async def publish(self, number: int) -> None:
        self.known[number] = version(number)
        await self.publisher.publish(number, self.known[number])

    async def damaged(self, number: int) -> None:
        self.asked_full.append(number)
        await self.publisher.full(number, self.known[number])

    async def check(self, number: int) -> None:
        assert (await self.files.fetch(number)).read_bytes() == file_of(version(number))

    def forms(self) -> list[int | None]:
        return [head.base for _, head in sorted(self.publisher.there.items())]


def drive(tmp_path: Path, test: Callable[[Pair], Awaitable[None]], **options: int) -> None:
    async def main() -> None:
        async with DeviceThread("test") as device:
            await test(Pair(tmp_path, device, **options))

    anyio.run(main)


@given(
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8]),
    numbers=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=40),
)
def test_a_delta_makes_the_same_bytes_of_any_two_arrays(
    dtype: mx.Dtype, numbers: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = ({"a": mx.array([pair[i] for pair in numbers]).astype(dtype), "b": mx.array(2.0)} for i in (0, 1))
    mx.eval(old, new)
    base = tmp_path_factory.getbasetemp() / "base"
    base.write_bytes(file_of(old))
    made = b"".join(applied(base, io.BytesIO(b"".join(deltas(old, new)))))
    assert made == file_of(new)


def test_what_is_no_delta_of_a_base_is_refused(tmp_path: Path) -> None:
    old, new = version(0), version(1)
    base = tmp_path / "base"
    base.write_bytes(file_of(old))
    whole = b"".join(deltas(old, new))
    for wrong in (whole[:-1], whole + b"\0", b"\xff" * 40, b"\x05\0\0\0hello" + whole, b"\x01\0\0\0"):
        with pytest.raises(MessageError):
            list(applied(base, io.BytesIO(wrong)))


def test_versions_come_as_changes_and_a_late_worker_takes_what_it_needs(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for number in range(8):
            await pair.publish(number)
        assert pair.forms() == [None, 0, 0, 0, None, 4, 4, 4]
        assert pair.publisher.sent_bytes < 4 * len(file_of(version(0)))
        await pair.check(6)
        assert names_in(tmp_path) == ["00000004.safetensors", "00000006.safetensors"]
        await pair.check(2)
        pair.files.keep([7])
        await pair.check(7)
        assert names_in(tmp_path) == ["00000004.safetensors", "00000007.safetensors"]

    drive(tmp_path, test, full_every=4)


def test_a_connection_that_is_lost_for_a_while_ends_no_fetch(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        await pair.publish(0)
        pair.losses += ["lost", "timeout", "lost"]
        await pair.check(0)
        assert pair.losses == []
        pair.losses.append("refused")
        with pytest.raises(NoAnswer):
            await pair.files.fetch(1)

    drive(tmp_path, test)


def test_what_changes_too_much_or_has_another_shape_comes_whole(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        mx.random.seed(0)
        drawn: list[Weights] = [{"a": mx.random.normal((5000 + i // 2,))} for i in range(4)]
        mx.eval(drawn)
        for number, weights in enumerate(drawn):
            await pair.publisher.publish(number, weights)
        assert pair.forms() == [None] * 4
        for number, weights in enumerate(drawn):
            assert (await pair.files.fetch(number)).read_bytes() == file_of(weights)

    drive(tmp_path, test)


def test_what_is_not_kept_goes_but_not_what_others_are_changes_of(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for number in range(3):
            await pair.publish(number)
        await pair.publisher.keep([2])
        assert sorted(pair.publisher.there) == [0, 2]
        assert not [subject for subject in pair.broker.stored if ".v1." in subject]
        with pytest.raises(BlobMissingError):
            await pair.files.fetch(1)
        await pair.check(2)

    drive(tmp_path, test)


def test_a_change_that_comes_to_other_weights_is_asked_for_whole(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for number in range(3):
            await pair.publish(number)
        await pair.check(0)
        (tmp_path / "00000000.safetensors").write_bytes(file_of(version(9)))  # the worker's own disk
        await pair.check(2)
        assert pair.asked_full == [2]
        assert pair.forms() == [None, 0, None]

    drive(tmp_path, test)


def test_damage_for_good_is_an_error(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        await pair.publish(0)
        head = pair.broker.stored["r1.w.v0.head"]
        pair.broker.stored["r1.w.v0.head"] = head.replace(pair.publisher.there[0].digest.encode(), b"0" * 64)
        with pytest.raises(RunError, match="version 0 of the policy came damaged"):
            await pair.files.fetch(0)
        assert not names_in(tmp_path)

    drive(tmp_path, test)


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), every=st.booleans())
def test_whatever_befalls_server_and_chunks_a_worker_has_the_weights_of_the_run(
    seed: int, every: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random, folder = Random(seed), tmp_path_factory.mktemp("versions")

    async def harm(broker: FakeBroker) -> None:
        while True:
            await anyio.sleep(random.expovariate(1 / 5))
            broker.away = True
            if random.random() < 0.4:
                broker.restart()
            await anyio.sleep(random.random() * 3)
            broker.away = False

    async def main() -> None:
        device: Any = InlineDevice()
        pair = Pair(folder, device, full_every=3)
        pair.broker.delay_s = lambda subject: random.random() * 0.2
        pair.broker.damage = lambda subject, data: data[:-1] if random.random() < 0.02 and data[5:] else data
        board: PolicyBoard[Weights] = PolicyBoard(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pair.publisher.follow(board, every=every))
            tasks.start_soon(harm, pair.broker)
            for number in range(12):
                pair.known[number] = version(number, 200)
                board.publish(number, pair.known[number])
                await anyio.sleep(random.expovariate(1 / 3))
                await pair.publisher.until_there(number)
                newest = pair.publisher.newest
                for _ in range(1000):
                    with suppress(BlobMissingError, NoAnswer, MessageError):
                        path = await pair.files.fetch(newest)
                        break
                    await anyio.sleep(0.3)
                assert path.name == f"{newest:08d}.safetensors"
                assert path.read_bytes() == file_of(pair.known[newest])
                pair.files.keep([newest])
            tasks.cancel_scope.cancel()

    virtual_time.run(main)


@pytest.mark.parametrize("every", [True, False])
def test_a_board_is_followed_and_a_new_server_gets_everything_again(tmp_path: Path, every: bool) -> None:
    async def test(pair: Pair) -> None:
        board: PolicyBoard[Weights] = PolicyBoard(1)
        pair.publisher.shelve("setup", lambda: [b"how to", b" work"])
        async with anyio.create_task_group() as tasks:
            board.publish(0, version(0))
            tasks.start_soon(lambda: pair.publisher.follow(board, every=every))
            await until(lambda: pair.publisher.newest == 0)
            board.publish(1, version(1))
            board.publish(2, version(2))
            await until(lambda: pair.publisher.newest == 2)
            assert sorted(pair.publisher.there) == ([0, 1, 2] if every else [0, 2])
            await pair.check(2)
            pair.broker.restart()
            await until(lambda: "r1.w.v2.head" in pair.broker.stored and pair.publisher.newest == 2)
            assert sorted(pair.publisher.there) == ([1, 2] if every else [2])
            assert pair.broker.stored["r1.w.setup.0"] == b"how to work"
            await pair.check(2)
            board.hold({0: version(0)})
            await until(lambda: 0 in pair.publisher.there)
            await pair.check(0)
            board.publish(3, version(3))
            await until(lambda: pair.publisher.newest == 3)
            assert 0 in pair.publisher.there, "as long as it is evaluated"
            await pair.check(3)
            board.hold({})
            await until(lambda: 0 not in pair.publisher.there)
            tasks.cancel_scope.cancel()

    drive(tmp_path, test)


@pytest.mark.parametrize("every", [True, False])
def test_what_a_full_server_has_no_room_for_is_put_when_there_is_some(tmp_path: Path, every: bool) -> None:
    async def main() -> None:
        device: Any = InlineDevice()
        pair, board = Pair(tmp_path, device, full_every=1), PolicyBoard[Weights](0)
        board.publish(0, version(0))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pair.publisher.follow(board, every=every))
            await pair.publisher.until_there(0)
            pair.broker.room = 1.5 * len(file_of(version(0)))
            board.publish(1, version(1))
            await anyio.sleep(30.0)
            assert pair.publisher.newest == (1 if every else 0), "room is made where older versions are wanted no more"
            pair.broker.room /= 2
            board.publish(2, version(2))
            await anyio.sleep(30.0)
            assert pair.publisher.newest < 2
            assert not [subject for subject in pair.broker.stored if ".v2." in subject]
            pair.broker.room *= 4
            await pair.publisher.until_there(2)
            await pair.check(2)
            await anyio.sleep(5.0)
            tasks.cancel_scope.cancel()
        assert len(pair.told) == (4 if every else 2)
        assert "it is tried again" in pair.told[0]
        assert "stores what workers need again" in pair.told[-1]

    virtual_time.run(main)


def test_where_all_versions_go_whole_none_is_held_for_changes(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for number in range(3):
            await pair.publish(number)
        assert pair.forms() == [None, None, None]
        await pair.publisher.keep([2])
        assert sorted(pair.publisher.there) == [2]
        await pair.check(2)

    drive(tmp_path, test, full_every=1)
