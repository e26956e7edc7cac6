"""A connection that stands, until it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from troupe.cluster.bus import NoAnswer
from troupe.cluster.dialing import Dialed

pytestmark = pytest.mark.anyio


async def test_an_end_that_the_client_tells_nobody_of_is_seen() -> None:
    async def publish(subject: str, data: bytes, reply: str) -> None:
        client.is_connected = False  # and no callback

    async def subscribe(subject: str, cb: Any) -> None:
        """Nothing comes."""

    client: Any = SimpleNamespace(_server_info={}, is_connected=True, publish=publish, subscribe=subscribe)
    dialed = Dialed(client, "worker")
    await dialed.listen()
    with anyio.fail_after(10.0), pytest.raises(NoAnswer, match="the connection ended"):
        await dialed.ask("r.hub.worker.x", b"")
    assert dialed.ended.is_set()
