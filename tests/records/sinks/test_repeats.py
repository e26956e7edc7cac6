"""Which incidents get a line, and how the others are counted."""

from __future__ import annotations

from troupe.messages import Incident
from troupe.records.sinks.repeats import Repeats


def fault(message: str = "refused", kind: str = "reward_error") -> Incident:
    return Incident(actor="scorer", kind=kind, message=message)


def test_the_first_is_told_at_once_and_four_hundred_as_a_number() -> None:
    repeats = Repeats()
    assert [repeats.is_told_alone(fault(), i / 100) for i in range(400)].count(True) == 1
    assert repeats.counted(9.9) == []
    assert repeats.counted(10.0) == ["399 more reward_error in scorer within 10 s, the newest: refused"]
    assert not repeats.is_told_alone(fault(), 11.0), "the same goes on"
    assert repeats.counted(20.1) == ["1 more reward_error in scorer within 10 s, the newest: refused"]
    assert repeats.counted(40.0) == []
    assert repeats.is_told_alone(fault(), 41.0), "after a while of silence it is new again"


def test_three_different_ones_of_a_kind_are_told_and_other_kinds_are_not_held_up() -> None:
    repeats = Repeats()
    assert [repeats.is_told_alone(fault(f"sample {i}"), 1.0) for i in range(5)] == [True, True, True, False, False]
    assert repeats.is_told_alone(fault(kind="reward_down"), 1.0)
    assert repeats.counted(2.0, all_of_them=True) == ["2 more reward_error in scorer within 1 s, the newest: sample 4"]
