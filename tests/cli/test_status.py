"""A status at a glance."""

from __future__ import annotations

import msgspec
import pytest

from tests.daemon.control.test_protocol import STATUS
from tests.records.members import ALONE, CROWD, STUDIO
from troupe.cli.status import Past, describe, describe_past, duration, headline
from troupe.messages import Activity, Evaluated, Finding, LiveGroup, Restarting, Slot
from troupe.records.held_out import Standings
from troupe.records.trend import trend_of


def group(owner: str, *, waiting: bool = False, age_s: float = 1.0) -> LiveGroup:
    return LiveGroup(gid=1, slot=Slot(step=0, place=0, attempt=0), owner=owner, waiting=waiting, age_s=age_s)


def test_everything_that_is_known_is_shown() -> None:
    status = msgspec.structs.replace(
        STATUS,
        groups=(group("generator", age_s=75.0), group("scorer"), group("scorer", waiting=True)),
        metrics={
            "reward": 0.53125,
            "loss": -0.001,
            "rewards/kind/mean": 0.75,
            "learning_rate": 1e-6,
            "step_time": 2.5,
            "grad_norm": 1.0,
            "kl": 0.5,
            "unknown": 3.0,
        },
        restarting=Restarting(attempt=2, limit=5, next_try_s=7.4, reason="it ended by SIGKILL: no memory"),
    )
    assert describe(status, "runs/kind").splitlines() == [
        "runs/kind: restarting, step 3 of 10 (30%)",
        "  restarting    start 2 of 5 in 7 s; it ended by SIGKILL: no memory",
        "  held          judge is down",
        "  down          judge: no answer",
        "  incidents     2 reward_error",
        "  newest step   reward 0.5312  loss -0.0010  kl 0.5000  grad_norm 1.000  learning_rate 1.00e-06",
        "                step_time 2.50",
        "  rewards       kind 0.7500",
        "  groups        3 alive: generator 1, scorer 2 (1 waiting); the oldest is 1 min 15 s old",
        "  scorer        judge for 1.5 s",
        "  new actors    1 scorer",
    ]


def test_the_way_of_the_reward_and_what_is_wrong() -> None:
    finding = Finding(rule="r", title="nothing to learn", since=2, evidence="all are equal", remedy="--set a.b=1")
    status = msgspec.structs.replace(STATUS, findings=(finding,))
    trend, held_out = trend_of([(1, 0.0), (2, 0.5), (3, 1.0)]), Standings()
    lines = describe(status, "o", Past(reward=trend)).splitlines()
    assert "  diagnosis     nothing to learn: all are equal (since step 2); try --set a.b=1" in lines
    assert "  reward        0.0000 → 1.0000  ▁▅█  steps 1 to 3" in lines
    assert "  reward        0.0000 -> 1.0000  .:#  steps 1 to 3" in describe(
        status, "o", Past(reward=trend, encoding="ascii")
    )
    held_out.add(Evaluated(version=7, name="hard", metrics={"eval/hard/accuracy": 0.5}, rows=()))
    assert describe_past(Past(reward=trend_of([(7, 0.25)]), held_out=held_out)) == [
        "  reward        0.2500",
        "  held-out      hard  accuracy 50.0% at step 7",
    ]
    assert describe_past(Past()) == []


def test_what_is_not_known_is_left_out() -> None:
    status = msgspec.structs.replace(
        STATUS, phase="starting", step=0, total_steps=0, groups=(), doing={}, held=(), rewards_down={}, metrics={}
    )
    status = msgspec.structs.replace(status, restarts={}, incidents={}, restarting=None)
    assert describe(status, "o") == "o: starting"


def test_a_start_under_way() -> None:
    restarting = Restarting(attempt=1, limit=5, next_try_s=0.0, reason="killed")
    assert "start 1 of 5 now; killed" in describe(msgspec.structs.replace(STATUS, restarting=restarting), "o")


def test_the_time_that_is_left() -> None:
    status = msgspec.structs.replace(STATUS, phase="running", step=100, total_steps=1300, metrics={"step_time": 3.0})
    assert headline(status, "o") == (
        "o: running, step 100 of 1,300 (8%), about 1 h 00 min left at the newest step's pace"
    )
    assert "left" not in headline(msgspec.structs.replace(status, phase="paused"), "o")
    assert "left" not in headline(msgspec.structs.replace(status, metrics={}), "o")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_000, "1 d 01 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_the_run_is_at_comes_first_and_nothing_acts_on_a_terminal() -> None:
    odd = "j\x1b[2J\x07"
    status = msgspec.structs.replace(
        STATUS,
        activity=Activity(what=f"waiting for reward {odd}", detail=": refused (2 tries, 1 s)", waiting=True),
        held=(f"{odd}\nis down",),
        rewards_down={odd: odd},
        metrics={f"rewards/{odd}/mean": 0.5},
        doing={"scorer": f"score {odd}"},
        incidents={odd: 1},
    )
    lines = describe(status, f"runs/{odd}").splitlines()
    assert lines[2] == "  now           waiting for reward j\\x1b[2J\\x07: refused (2 tries, 1 s)"
    assert "".join(lines).isprintable()


def test_a_notice_comes_first() -> None:
    lines = describe(msgspec.structs.replace(STATUS, notice="finishing step 4"), "o").splitlines()
    assert lines[1] == "  notice        finishing step 4"


def test_workers_have_a_line_each_and_a_lone_process_none() -> None:
    before = describe(STATUS, "o").splitlines()
    assert describe(msgspec.structs.replace(STATUS, members=(ALONE,)), "o").splitlines() == before
    lines = describe(msgspec.structs.replace(STATUS, members=(*CROWD, *(STUDIO,) * 40)), "o").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  workers"))
    assert lines[at] == "  workers       1 of 2 at work, 212 tokens/s, 42 gone"
    assert lines[at + 2] == "                studio: silent: nothing was heard of it for 10 s, heard of 12.3 s ago"
    assert lines[at + 33] == "                and 12 more"
