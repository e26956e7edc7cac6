"""The message server in memory does what the real one does, and loses what it is told to."""

from __future__ import annotations

import anyio
import pytest

from tests.support.fake_bus import FakeBroker
from tests.support.virtual_time import run
from troupe.cluster.bus import HUB, NoAnswer, asked_subjects, asker_of, hub_subject, stored_subject


async def _answers(subject: str, data: bytes) -> bytes:
    return asker_of(subject).encode() + b":" + data


def test_a_request_is_answered_or_lost_and_what_is_stored_goes_with_the_server() -> None:
    async def main() -> None:
        broker = FakeBroker("r1")
        hub, one, foreign = broker.bus(HUB), broker.bus("one"), broker.bus("two")
        pull, chunk = hub_subject("r1", "one", "pull"), stored_subject("r1", "setup", "0")
        with pytest.raises(NoAnswer, match="nobody"):
            await one.request(pull, b"x", timeout_s=1.0)
        async with hub.serve(asked_subjects("r1"), _answers):
            assert await one.request(pull, b"x", timeout_s=1.0) == b"one:x"
            with pytest.raises(NoAnswer, match="timeout"):
                await foreign.request(pull, b"x", timeout_s=1.0)
            broker.lose_reply = lambda subject: len(broker.asked) < 3
            with pytest.raises(NoAnswer, match="timeout"):
                await one.request(pull, b"y", timeout_s=1.0)
            assert await one.request(pull, b"y", timeout_s=1.0) == b"one:y"
            assert broker.asked == [pull] * 3
        await hub.put(chunk, b"weights")
        assert await one.get(chunk) == b"weights"
        broker.restart()
        assert (await one.get(chunk), one.epoch) == (None, 2)
        broker.cut.add("one")
        with pytest.raises(NoAnswer, match="lost"):
            await one.get(chunk)
        with anyio.fail_after(60.0):  # comes back while somebody waits
            async with anyio.create_task_group() as group, hub.serve(asked_subjects("r1"), _answers):
                group.start_soon(_after, 5.0, broker.cut.clear)
                assert await one.request(pull, b"z", timeout_s=20.0) == b"one:z"

    run(main)


async def _after(delay_s: float, act: object) -> None:
    await anyio.sleep(delay_s)
    assert callable(act)
    act()
