from __future__ import annotations

import mlx.core as mx
import msgspec
import pytest

from troupe.messages import GroupClosed, Incident, Replace, Slot, Snapshot, Span, Update

MESSAGES = [
    Update(step=3, version=3, total_steps=9, metrics={"loss": -0.25, "reward": 1.0}),
    GroupClosed(gid=4, slot=Slot(step=1, place=0), state="quarantined", version=2),
    Replace(slots=(Slot(step=1, place=0), Slot(step=1, place=3))),
    Incident(actor="scorer", kind="reward_timeout", message="no answer within 60 s", gid=4),
    Span(actor="learner", name="learn", start_s=1.5, end_s=2.25, step=1),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_survives_msgpack_and_json_by_tag(message: Update | GroupClosed | Replace | Incident | Span) -> None:
    union = Update | GroupClosed | Replace | Incident | Span
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message
    assert msgspec.json.decode(msgspec.json.encode(message), type=union) == message


def test_a_group_closes_in_one_of_four_states() -> None:
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'lost'"):
        msgspec.convert(
            {"type": "GroupClosed", "gid": 1, "slot": {"step": 0, "place": 0}, "state": "lost"}, GroupClosed
        )


def test_a_snapshot_hands_arrays_over_by_reference() -> None:
    weights = {"w": mx.array([1.0, 2.0])}
    snapshot = Snapshot(version=1, weights=weights, optimizer_state={}, behind={0: weights})
    assert snapshot.weights["w"] is weights["w"]
    assert snapshot.behind[0]["w"] is weights["w"]
    assert not snapshot.final
    with pytest.raises(AttributeError, match="immutable"):
        snapshot.version = 2  # type: ignore[misc]
