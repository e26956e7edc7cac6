from __future__ import annotations

import msgspec

from troupe.messages import Checkpoint, Drain


def test_requests_are_told_apart_by_their_tag() -> None:
    for request in (Checkpoint(), Drain()):
        assert type(msgspec.json.decode(msgspec.json.encode(request), type=Checkpoint | Drain)) is type(request)
