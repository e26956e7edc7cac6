from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from troupe.messages import Prompt, Rollout, RolloutGroup, ScoredGroup, Slot


def prompt(**changes: Any) -> Prompt:
    fields: dict[str, Any] = {
        "gid": 5,
        "slot": Slot(step=1, place=2),
        "epoch": 0,
        "row": 3,
        "prompt": [{"role": "user", "content": "2+2?"}],
        "prompt_ids": (1, 2, 3),
        "columns": {"answer": "4", "tags": ["sum", None], "weight": 0.5},
    }
    return Prompt(**(fields | changes))


ROLLOUT = Rollout(
    token_ids=(7, 8),
    log_probs=(-0.5, -1.25),
    sampling_log_probs=(-0.5, -1.0),
    versions=(0, 1),
    finish_reason="stop",
    text="4",
)
GROUP = RolloutGroup(prompt=prompt(), rollouts=(ROLLOUT, ROLLOUT))
SCORED = ScoredGroup(group=GROUP, scores={"exact": (1.0, None)}, logged={"length": 2.0})


@pytest.mark.parametrize("message", [prompt(), prompt(prompt="plain"), GROUP, SCORED])
def test_survives_msgpack_and_json_by_tag(message: Prompt | RolloutGroup | ScoredGroup) -> None:
    union = Prompt | RolloutGroup | ScoredGroup
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message
    assert msgspec.json.decode(msgspec.json.encode(message), type=union) == message
    assert msgspec.to_builtins(message)["type"] == type(message).__name__


def test_a_missing_score_stays_missing() -> None:
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(SCORED), type=ScoredGroup)
    assert decoded.scores["exact"] == (1.0, None)


def test_slots_order_by_step_then_place_then_attempt() -> None:
    ordered = [
        Slot(step=0, place=9),
        Slot(step=1, place=0, attempt=3),
        Slot(step=1, place=1),
        Slot(step=1, place=1, attempt=1),
    ]
    assert all(first < second for first, second in pairwise(ordered))


def test_messages_never_change() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        GROUP.prompt = prompt()  # type: ignore[misc]


def test_unknown_fields_and_reasons_are_refused() -> None:
    raw = msgspec.to_builtins(ROLLOUT)
    with pytest.raises(msgspec.ValidationError, match="unknown field `mood`"):
        msgspec.convert(raw | {"mood": 1}, Rollout)
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'bored'"):
        msgspec.convert(raw | {"finish_reason": "bored"}, Rollout)
