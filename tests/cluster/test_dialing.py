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

    client: Any = SimpleNamespace(_server_info={}, is_connected=True, publish=publish)
    dialed = Dialed(client, "worker")
    with anyio.fail_after(10.0):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dialed.until_ended)
            with pytest.raises(NoAnswer, match="the connection ended"):
                await dialed.ask("r.hub.worker.x", b"")
    assert dialed.ended.is_set()
