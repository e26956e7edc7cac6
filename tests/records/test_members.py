"""Members in words."""

from __future__ import annotations

import msgspec

from tests.records.members import ALONE, CROWD, JUDGE, LAPTOP, STRANGER, STUDIO
from troupe.records.members import Comings, at_a_glance, called, cluster_figures, summary, told, worth_telling


def test_a_run_with_its_one_generator_in_a_process_is_told_of_as_before() -> None:
    assert not worth_telling(())
    assert not worth_telling((ALONE,))
    assert worth_telling((ALONE, ALONE))
    assert worth_telling((LAPTOP,))


def test_what_they_are_together() -> None:
    assert (called((ALONE, ALONE)), called(CROWD), called((ALONE, LAPTOP))) == ("processes", "workers", "workers")
    assert summary(CROWD) == "1 of 2 at work, 212 tokens/s, 2 gone"
    assert summary((STRANGER,)) == "none is here, 1 gone"


def test_each_on_a_line() -> None:
    assert told(LAPTOP) == "working on 12.0.1, 12.0.4, 212 tokens/s, version 12, MacBook Pro, Apple M2"
    assert told(STUDIO) == "silent: nothing was heard of it for 10 s, heard of 12.3 s ago"
    assert told(STRANGER) == "refused: MLX 0.31 gives other bits than the run's, heard of 5 min 0 s ago"
    assert told(JUDGE) == "idle, offers rewards, 1 × H200"
    many = msgspec.structs.replace(LAPTOP, leases=tuple(map(str, range(9))), device="")
    assert told(many) == "working on 0, 1, 2 and 6 more, 212 tokens/s, version 12"
    assert [at_a_glance(one) for one in CROWD] == ["212", "silent 12 s", "refused", "idle"]


def test_of_workers_a_step_tells_how_many_there_are_and_how_fast() -> None:
    assert cluster_figures([ALONE]) == {}
    assert cluster_figures([ALONE, *CROWD]) == {"cluster/members": 2.0, "cluster/tokens_per_second": 212.4}
    assert cluster_figures([STRANGER]) == {"cluster/members": 0.0, "cluster/tokens_per_second": 0.0}


def test_who_comes_and_who_comes_back_is_told_once() -> None:
    comings = Comings()
    assert comings.look([ALONE, LAPTOP, STRANGER]) == ["worker laptop is here: MacBook Pro, Apple M2"]
    assert comings.look([ALONE, LAPTOP, JUDGE]) == ["worker judge is here: 1 × H200"]
    assert comings.look([msgspec.structs.replace(LAPTOP, state="lost"), JUDGE]) == []
    assert comings.look([LAPTOP, JUDGE]) == ["worker laptop is here: MacBook Pro, Apple M2"]
