from __future__ import annotations

import msgspec
import pytest

from troupe.messages import Checkpoint, Drain, Hold, LiveGroup, Pause, Resume, Slot, Status, Step

Request = Checkpoint | Drain | Pause | Resume | Step | Hold


@pytest.mark.parametrize("request_", [Checkpoint(), Drain(), Pause(), Resume(), Step(steps=3), Hold(reasons=("x",))])
def test_requests_are_told_apart_by_their_tag(request_: Request) -> None:
    assert msgspec.json.decode(msgspec.json.encode(request_), type=Request) == request_


def test_a_request_for_no_step_is_refused_where_it_is_read() -> None:
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.json.decode(b'{"type":"Step","steps":0}', type=Step)


def test_a_status_survives_msgpack() -> None:
    group = LiveGroup(gid=2**48, slot=Slot(step=0, place=0, attempt=1), owner="scorer", waiting=True, age_s=1.5)
    status = Status(
        phase="held",
        step=1,
        total_steps=4,
        policy_version=1,
        groups=(group,),
        queues={"prompts": 2},
        doing={"learner": "waits: idle for 3.0 s"},
        held=("reward judge is down",),
        rewards_down={"judge": "no answer"},
        restarts={"scorer": 1},
        incidents={"actor_restarted": 1},
        metrics={"loss": 0.5},
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(status), type=Status) == status
