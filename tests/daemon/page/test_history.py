"""The history: what is told to whom, whatever he has read before."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon.control.test_protocol import STATUS
from tests.support.stored import closed
from troupe.daemon.page.history import Event, History, _table, figures, read_curves
from troupe.daemon.page.news import excerpt
from troupe.daemon.trainer.frames import Happened, Started, Stepped
from troupe.messages import Evaluated, Incident
from troupe.records.evaluations import write_evaluations

pytestmark = pytest.mark.anyio
LATE = Incident(actor="scorer", kind="reward_timeout", message="late")


def new_history() -> History:
    return History("kind", "/runs/kind", clock=lambda: 1234.56)


def stepped(step: int, **metrics: float) -> Stepped:
    return Stepped(step=step, total_steps=9, metrics={"reward": step / 10, **metrics}, incidents={})


def started(step: int) -> Started:
    return Started(notices=(), step=step, total_steps=9, speaks=False)


def told(events: list[Event]) -> list[tuple[str, Any]]:
    return [(event.kind, json.loads(event.data)) for event in events]


async def test_who_comes_is_told_everything_and_then_what_is_new() -> None:
    history = new_history()
    history.add(started(0))
    history.add(stepped(1))
    history.add(Happened(incidents=(LATE,), groups=(excerpt(closed(1, 0)),)))
    history.now(STATUS)
    events, number = history.since(0)
    assert [kind for kind, _ in told(events)] == ["about", "curves", "group", "incident", "status"]
    by_kind = dict(told(events))
    assert by_kind["about"] == {"run": "kind", "folder": "/runs/kind"}
    assert by_kind["curves"] == {"step": [1], "reward": [0.1]}
    assert by_kind["incident"] == {"at": 1234.6, "actor": "scorer", "kind": "reward_timeout", "message": "late"}
    assert by_kind["group"]["group"]["samples"][0]["scores"] == {"r": 1.0}
    assert by_kind["status"]["phase"] == STATUS.phase
    assert history.since(number) == ([], number)
    history.add(stepped(2, loss=0.5))
    history.failed("killed")
    events, number = history.since(number)
    assert told(events) == [
        ("step", {"step": 2, "figures": {"reward": 0.2, "loss": 0.5}}),
        ("incident", {"at": 1234.6, "actor": "daemon", "kind": "trainer_failed", "message": "killed"}),
    ]
    assert not history.over
    history.end("complete", well=True)
    assert told(history.since(number)[0]) == [("end", {"message": "complete", "well": True})]
    assert history.over


async def test_a_start_that_makes_steps_again_tells_the_curves_anew() -> None:
    history = new_history()
    for step in range(1, 6):
        history.add(stepped(step))
    _, number = history.since(0)
    history.add(started(2))
    history.add(stepped(3))
    assert told(history.since(number)[0]) == [("curves", {"step": [1, 2, 3], "reward": [0.1, 0.2, 0.3]})]


async def test_one_who_is_slow_gets_what_is_left() -> None:
    history = new_history()
    history.add(stepped(1))
    _, number = history.since(0)
    for step in range(2, 2000):
        history.add(stepped(step))
        history.add(Happened(incidents=(LATE,), left_out=step, groups=(excerpt(closed(step, 0)),)))
        history.now(STATUS)
    events, _ = history.since(number)
    kinds = [event.kind for event in events]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"curves": 1, "incident": 64, "group": 16, "status": 1}
    assert dict(told(events))["curves"]["step"][-1] == 1999
    assert sum(len(event.data) for event in events) < 200_000
    assert "1999 further incidents are not shown" in str(told(events))


async def test_it_begins_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"reward":0.5}\n{"step":2,"reward":0.75}\n')
    history = new_history()
    await history.read(tmp_path)
    history.add(started(1))
    assert dict(told(history.since(0)[0]))["curves"] == {"step": [1], "reward": [0.5]}


async def test_evaluations_are_told_when_there_are_new_ones(tmp_path: Path) -> None:
    def evaluated(version: int, **figures: float) -> Evaluated:
        metrics = {f"eval/sums/{name}": value for name, value in figures.items()}
        return Evaluated(version=version, name="sums", metrics=metrics, rows=())

    history = new_history()
    await history.look(tmp_path)
    assert [event.kind for event in history.since(0)[0]] == ["about", "curves"]
    first = evaluated(0, length=4.0, accuracy=0.25, accuracy_se=0.125)
    write_evaluations(tmp_path, [first])
    await history.look(tmp_path)
    _, number = history.since(0)
    await history.look(tmp_path)
    assert history.since(number) == ([], number)
    write_evaluations(tmp_path, [first, evaluated(10, accuracy=0.5)])
    os.utime(tmp_path / "evaluations.jsonl", ns=(1, 1))  # written within one tick of the clock
    await history.look(tmp_path)
    sums = {"name": "sums", "figure": "accuracy", "share": True, "step": [0, 10], "y": [0.25, 0.5]}
    assert told(history.since(number)[0]) == [("held_out", [sums | {"errors": [0.125, None]}])]


async def test_a_change_wakes_those_who_wait() -> None:
    history = new_history()
    woken = 0

    async def wait() -> None:
        nonlocal woken
        await history.change.wait()
        woken += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        history.now(STATUS)
    assert woken == 3
    assert not history.change.is_set()


async def test_figures_that_json_cannot_say() -> None:
    history = new_history()
    history.add(stepped(1, loss=float("nan"), kl=float("inf")))
    assert dict(told(history.since(0)[0]))["curves"] == {"step": [1], "reward": [0.1]}


async def test_an_incident_that_happens_again_takes_its_own_place() -> None:
    history, other = new_history(), Incident(actor="scorer", kind="odd", message="!")
    history.add(Happened(incidents=(other, LATE), times=(1, 3)))
    _, number = history.since(0)
    for _ in range(100):
        history.add(Happened(incidents=(LATE,), times=(4,)))
    [(_, again)] = [one for one in told(history.since(number)[0]) if one[0] == "incident"]
    assert (again["message"], again["times"]) == ("late", 403)
    history.add(Happened(incidents=(other, LATE)))
    incidents = [data for kind, data in told(history.since(0)[0]) if kind == "incident"]
    assert [(data["kind"], data.get("times", 1)) for data in incidents] == [("odd", 2), ("reward_timeout", 404)]
    others = tuple(Incident(actor="scorer", kind=f"kind {number}", message="late") for number in range(4))
    history.add(Happened(incidents=(*others, LATE)))
    incidents = [data for kind, data in told(history.since(0)[0]) if kind == "incident"]
    assert [data.get("times", 1) for data in incidents] == [2, 404, 1, 1, 1, 1, 1], "long ago: told of once more"


def test_the_figures_that_are_drawn() -> None:
    metrics = {
        "reward": 0.123456789,
        "loss": math.nan,
        "kl": math.inf,
        "rewards/r/mean": 1,
        "rewards/r/std": 2.0,
        "x": 3,
    }
    assert figures(metrics) == {"reward": 0.123457, "rewards/r/mean": 1.0}
    many = {f"rewards/r{number}/mean": 0.0 for number in range(20)}
    assert len(figures(many)) == 8
    assert figures({"reward": None, "loss": 10**400, "kl": True}) == {"kl": 1.0}


def test_a_file_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert len(read_curves(path)) == 0
    path.write_bytes(
        b'{"step":1,"version":1,"reward":0.5,"x":"text"}\nnot json\n\xff\n{"step":"two"}\n{"step":-4}\n[1]\n'
        b'{"step":2,"reward":null,"loss":0.1}\n{"step":99999999999999999999999,"reward":1}\n{"step":3,"rew'
    )
    assert _table(read_curves(path)) == {"step": [1, 2], "reward": [0.5, None], "loss": [None, 0.1]}
    assert len(read_curves(tmp_path)) == 0, "a folder"
