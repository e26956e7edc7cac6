"""wandb and trackio with modules in their place that keep what they are told; the real ones are in
`runs/records/test_tracked.py`."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.records.sinks.steps import closed, evaluated, update
from troupe.messages import Incident
from troupe.records.evaluations import write_evaluations
from troupe.records.sinks.base import MetricsConfig, RunInfo, Sink
from troupe.records.sinks.jsonl import JsonlSink
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.trackers import TrackioSink, WandbSink

PATIENCE_S = 60.0


class Tracker:
    """What `import wandb`, or trackio, gives."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.__version__ = "0.43.0"
        self.resumed, self.offline, self.step, self.starting_step = False, True, 0, 0
        self.fails: set[str] = set()
        self.gate: threading.Event | None = None
        self.summary: dict[str, float] = {}
        self.Settings = self.Histogram = self.Table = lambda *given, **named: SimpleNamespace(given=given, **named)

    def init(self, **named: Any) -> Tracker:
        self._meet("init")
        self.inits.append(named)
        return self

    def log(self, row: dict[str, Any], *, step: int, commit: bool = True) -> None:
        self._meet("log")
        assert commit
        self.rows.append((step, row))

    def finish(self) -> None:
        self._meet("finish")
        self.finished += 1

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("eval/*", "eval/version")

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]

    def _meet(self, call: str) -> None:
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if call in self.fails:
            raise RuntimeError("no such host")


@pytest.fixture(params=["wandb", "trackio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch, kind: str) -> Tracker:
    made = Tracker()
    monkeypatch.setitem(sys.modules, kind, made)
    for module in ("trackio.run", "trackio.utils"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return made


def sink_of(kind: str, folder: Path, first_step: int = 0, **settings: Any) -> Sink:
    run = RunInfo(
        name="kind-001", folder=str(folder), total_steps=9, first_step=first_step, config={"learner": {"lr": 1e-6}}
    )
    return {"wandb": WandbSink, "trackio": TrackioSink}[kind](run, MetricsConfig(**settings))


def feed(sink: Sink, *messages: object) -> None:
    sink.open()
    for message in messages:
        sink.write(message)
        sink.flush()
    sink.close()
    sink.close()


def test_a_run_is_told_with_its_config_and_steps(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    texts = ("46\ud800", "45")
    feed(sink_of(kind, tmp_path), closed(1, texts=texts), update(1, loss=0.5), closed(2), update(2, loss=0.25))
    [init] = tracker.inits
    assert init["config"] == {"learner": {"lr": 1e-6}}
    assert init["project"] == "troupe"
    assert [(step, row["loss"]) for step, row in tracker.rows] == [(1, 0.5), (2, 0.25)]
    first, second = (row for _, row in tracker.rows)
    assert first["histograms/rewards"].given == ([1.0, 0.5],)
    assert first["histograms/completions/lengths"].given == ([1.0, 2.0],)
    assert first["completions"].columns == ["step", "prompt", "completion", "reward", "scores", "tokens"]
    assert first["completions"].data[0] == [1, "12+34=", "46\\ud800", 1.0, '{"exact":1.0}', 1]
    assert "completions" not in second
    assert tracker.finished == 1


@pytest.mark.parametrize("kind", ["wandb"])
def test_wandb_is_told_where_and_how(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    feed(sink_of("wandb", tmp_path, wandb_project="sums", wandb_entity="us", wandb_name="first"))
    feed(sink_of("wandb", tmp_path, wandb_mode="online"))
    first, second = tracker.inits
    assert (first["project"], first["entity"], first["name"], first["mode"]) == ("sums", "us", "first", "offline")
    assert (second["name"], second["mode"], second["resume"], second["dir"]) == (
        "kind-001",
        "online",
        "allow",
        str(tmp_path),
    )
    assert first["id"] == second["id"]
    assert first["settings"].console == "off"


def test_a_resumed_run_is_the_same_one_and_has_each_step_once(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    feed(sink_of(kind, tmp_path), *(update(step) for step in range(1, 6)))
    feed(sink_of(kind, tmp_path, 3), *(update(step) for step in range(4, 8)))  # 4 and 5 are made once more
    feed(sink_of(kind, tmp_path, 7), update(8))
    assert tracker.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    name = "id" if kind == "wandb" else "name"
    assert len({init[name] for init in tracker.inits}) == 1
    assert [init["resume"] for init in tracker.inits] == (
        ["allow"] * 3 if kind == "wandb" else ["never", "allow", "allow"]
    )
    assert json.loads((tmp_path / f"{kind}.json").read_bytes())["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == [f"{kind}.json"]


def test_a_run_that_was_killed_before_its_first_checkpoint_stays_the_same_one(
    tmp_path: Path, kind: str, tracker: Tracker
) -> None:
    feed(sink_of(kind, tmp_path), update(1), update(2))
    feed(sink_of(kind, tmp_path), update(1), update(2), update(3))
    assert tracker.steps == [1, 2, 3]
    assert tracker.inits[0]["name"] == tracker.inits[1]["name"]


def test_steps_that_a_kill_left_untold_are_told_by_the_next_start(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    feed(sink_of(kind, tmp_path), update(1), update(2))
    lines = [{"step": step, "version": step, "loss": step / 8, "kl": None} for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step":')
    feed(sink_of(kind, tmp_path, 5), update(6, loss=0.75))
    assert tracker.rows == [(1, {}), (2, {}), *((step, {"loss": step / 8}) for step in range(3, 7))]


def test_what_the_tracker_knows_counts_more_than_our_file(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step":{step}}}\n' for step in range(1, 6)))
    (tmp_path / f"{kind}.json").write_text('{"id":"x","step":5}')
    tracker.resumed, tracker.offline, tracker.starting_step = True, False, 4
    tracker._next_step = 4  # type: ignore[attr-defined]
    feed(sink_of(kind, tmp_path, 5), update(6))
    assert tracker.steps == [4, 5, 6]


@pytest.mark.parametrize("kind", ["trackio"])
def test_of_a_trackio_that_we_do_not_know_our_own_file_counts(tmp_path: Path, tracker: Tracker) -> None:
    tracker.__version__ = "1.0.0"
    tracker._next_step = 4  # type: ignore[attr-defined]
    (tmp_path / "trackio.json").write_text('{"id":"x","step":5}')
    feed(sink_of("trackio", tmp_path, 5), update(6))
    assert tracker.steps == [6]


@pytest.mark.parametrize("kind", ["wandb"])
@pytest.mark.parametrize(("kept", "told"), [(0, [1, 2, 3, 4, 5, 6]), (3, [4, 5, 6]), (5, [6])])
def test_an_offline_run_is_told_anew_what_a_killed_start_told(
    tmp_path: Path, tracker: Tracker, kept: int, told: list[int]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step":{step}}}\n' for step in range(1, 6)))
    (tmp_path / "wandb.json").write_text(f'{{"id":"x","step":5,"kept":{kept}}}')
    feed(sink_of("wandb", tmp_path, 5), update(6))
    assert tracker.steps == told
    assert json.loads((tmp_path / "wandb.json").read_bytes()) == {"id": "x", "step": 6, "kept": 6, "evaluated": {}}


def test_two_runs_have_two_names(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        feed(sink_of(kind, folder), update(1))
    name = "id" if kind == "wandb" else "name"
    assert tracker.inits[0][name] != tracker.inits[1][name]


def test_a_file_that_a_crash_has_cut_begins_another_run(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    (tmp_path / f"{kind}.json").write_bytes(b'{"id":')
    feed(sink_of(kind, tmp_path, 3), update(4))
    assert tracker.steps == [4]


def test_what_it_does_not_care_for_is_not_told(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    sink = sink_of(kind, tmp_path)
    sink.flush()
    sink.close()
    feed(sink, Incident(actor="scorer", kind="odd", message="late"), closed(1))
    assert tracker.rows == []


@pytest.mark.anyio
@pytest.mark.parametrize("at", ["init", "log", "finish"])
async def test_one_that_fails_costs_nobody_else_anything(tmp_path: Path, kind: str, tracker: Tracker, at: str) -> None:
    tracker.fails = {at}
    sinks = Sinks([sink_of(kind, tmp_path), JsonlSink(tmp_path / "metrics.jsonl")], timeout_s=PATIENCE_S)
    sinks.open()
    for step in range(1, 6):
        sinks.write(update(step))
    [incident] = await sinks.close()
    assert incident.message == f"the sink {kind} is switched off: RuntimeError: no such host"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.anyio
async def test_one_that_hangs_costs_nobody_else_anything(tmp_path: Path, kind: str, tracker: Tracker) -> None:
    tracker.gate = threading.Event()
    now_s = [0.0]
    sinks = Sinks(
        [sink_of(kind, tmp_path), JsonlSink(tmp_path / "metrics.jsonl")],
        timeout_s=PATIENCE_S,
        clock=lambda: now_s[0],
    )
    sinks.open()
    for step in range(1, 6):
        sinks.write(update(step))
    sinks.settle(5)
    assert await sinks.settled(5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    now_s[0] += PATIENCE_S + 1.0
    [incident] = sinks.news()
    assert incident.message.startswith(f"the sink {kind} is switched off: it has not come back for 61 s")
    tracker.gate.set()
    assert await sinks.close() == ()


def test_evaluations_are_told_once_and_where_steps_cannot_be_told_late_with_the_next_one(
    tmp_path: Path, kind: str, tracker: Tracker
) -> None:
    messages = evaluated(0, 0.25), update(1), evaluated(1, 0.5), evaluated(1, 0.75, "math"), update(2), evaluated(2)
    feed(sink_of(kind, tmp_path), *messages)
    figures = {"eval/held_out/avg@1": 0.5, "eval/math/avg@1": 0.75}
    told = [(step, {name: row[name] for name in row if name in figures}) for step, row in tracker.rows]
    if kind == "trackio":
        assert told[2:] == [(1, {name: value}) for name, value in figures.items()] + [(2, {}), (2, told[-1][1])]
        assert told[:2] == [(0, {"eval/held_out/avg@1": 0.25}), (1, {})]
    else:
        assert told == [(1, {"eval/held_out/avg@1": 0.25}), (2, figures)]
        assert [row["eval/version"] for _, row in tracker.rows] == [0, 1]
        assert tracker.summary["eval/version"] == 2
    feed(sink_of(kind, tmp_path, 2), evaluated(2), *(update(step) for step in range(3, 10)), evaluated(9, 1.0))
    late = [(step, row["eval/held_out/avg@1"]) for step, row in tracker.rows if "eval/held_out/avg@1" in row][-1]
    assert late == ((9, 1.0) if kind == "trackio" else (10, 1.0))
    assert sum("eval/held_out/avg@1" in row for _, row in tracker.rows) == (4 if kind == "trackio" else 3)


def test_evaluations_that_a_kill_left_untold_are_told_by_the_next_start(
    tmp_path: Path, kind: str, tracker: Tracker
) -> None:
    feed(sink_of(kind, tmp_path), update(1), evaluated(1, 0.25), update(2))
    write_evaluations(tmp_path, [evaluated(1, 0.25), evaluated(2, 0.5), evaluated(3, 0.75)])
    feed(sink_of(kind, tmp_path, 2), update(3))
    told = [row["eval/held_out/avg@1"] for _, row in tracker.rows if "eval/held_out/avg@1" in row]
    assert told == [0.25, 0.5], "that of version 3 is made again"
