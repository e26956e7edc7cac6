"""The timeline of real runs: Perfetto can draw it, every group can be followed, and the metrics say where time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import delayed, ones, tiny_config, weigh_ids
from tests.support.trace_events import Slice, Trace, read_trace
from troupe import Supervisor, train
from troupe.records.sinks import sinks as sink_threads

STATIONS = ["issue", "hand over", "score weigh_ids", "learn", "close: trained"]


def traced(folder: Path, rewards: list[Any], model: Path, **settings: Any) -> tuple[Trace, list[dict[str, Any]]]:
    config = tiny_config(model, folder, **settings)
    train(config, rewards)
    trace = read_trace(json.loads((folder / "run" / "trace.json").read_text()))
    return trace, [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def steps_of(trace: Trace) -> dict[str, list[str]]:
    """Group → the names of the slices that its arrows lead through, in order of time."""
    ways: dict[str, dict[int, Slice]] = {}
    for name, start, end in trace.arrows:
        ways.setdefault(name, {}).update({id(start): start, id(end): end})
    return {name: [piece.name for piece in sorted(way.values(), key=lambda s: s.start)] for name, way in ways.items()}


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_group_can_be_followed_through_the_run(max_staleness: int, tmp_path: Path, tiny_model: Path) -> None:
    trace, lines = traced(tmp_path, [delayed(1)], tiny_model, schedule__max_staleness=max_staleness)
    ways = steps_of(trace)
    assert len(ways) == 8  # 4 steps of 2 groups
    assert all(way == STATIONS for way in ways.values()), ways
    on = {trace.track_of(piece).split()[0] for piece in trace.slices}
    assert on == {"prompter", "generator", "scorer", "learner", "checkpointer", "metrics"}
    names = {piece.name for piece in trace.slices}
    assert names >= {"idle", "wait for policy", "generate", "prefill", "decode", "prepare", "pass", "publish"}
    assert names >= {"checkpoint", "write jsonl", "write trace"}
    for line in lines:
        shares = [value for key, value in line.items() if key.endswith(("/busy", "/idle"))]
        assert len(shares) >= 8
        assert all(0.0 <= value <= 1.0 for value in shares)
        assert line["time/device_s"] > 0.0
        assert line["spans_dropped"] == 0.0
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["time/reward/hidden_s"] + line["time/reward/exposed_s"] for line in lines) > 0.0


def test_groups_scored_at_once_lie_in_lanes_and_two_rewards_part_and_meet(tmp_path: Path, tiny_model: Path) -> None:
    def other(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    trace, _ = traced(tmp_path, [delayed(1), delayed(2, reward=other)], tiny_model)
    ways = steps_of(trace)
    assert all(sorted(way) == sorted([*STATIONS, "score other"]) for way in ways.values()), ways
    for name in ways:
        edges = {(start.name, end.name) for arrow, start, end in trace.arrows if arrow == name}
        assert ("hand over", "score weigh_ids") in edges
        assert ("hand over", "score other") in edges
        assert ("score weigh_ids", "learn") in edges
        assert ("score other", "learn") in edges
    lanes = {trace.track_of(piece) for piece in trace.slices if piece.name.startswith("score")}
    assert len(lanes) >= 2


def test_filtered_groups_are_followed_to_their_end(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"learner__dynamic_sampling": True, "learner__max_resampling_attempts": 1, "learner__max_steps": 1}
    trace, _ = traced(tmp_path, [ones], tiny_model, **settings)
    assert [way[-1] for way in steps_of(trace).values()] == ["close: filtered"] * 4


def test_the_trace_of_a_run_that_fails_is_whole(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, tmp_path)
    calls = []

    def wrong(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(1)
        return weigh_ids(completion_ids) if len(calls) < 5 else [1.0]  # of a wrong length: the run ends

    with pytest.raises(Exception, match="wrong"):
        train(config, [wrong])
    trace = read_trace(json.loads((tmp_path / "run" / "trace.json").read_text()))
    assert "learn" in {piece.name for piece in trace.slices}


@pytest.mark.anyio
async def test_a_sink_that_hangs_does_not_hang_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threading import Event

    from tests.support.fakes import FakeSink
    from troupe.messages import Update
    from troupe.run.ledgers import Factories

    gate = Event()

    class Hanging(FakeSink):
        takes: tuple[type, ...] = (Update,)

        def write(self, message: object) -> None:
            gate.wait(60)

    monkeypatch.setattr(sink_threads, "_AT_ONCE_S", 0.0)
    config = tiny_config(tiny_model, tmp_path, metrics__sink_timeout_s=0.05)
    factories = Factories(sinks=lambda prepared: [Hanging("disk")])
    async with Supervisor(config, [weigh_ids], factories=factories) as run:
        steps = [update.step async for update in run.updates()]
    gate.set()
    assert steps == [1, 2, 3, 4]
    assert run.result.steps == 4
    assert list(run.result.switched_off_sinks) == ["disk"]
    assert run.result.incidents == {"sink_failed": 1}


@pytest.mark.slow
def test_the_generators_process_has_tracks_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    trace, lines = traced(tmp_path, [delayed(1)], tiny_model, schedule__generator="process", schedule__max_staleness=1)
    ways = steps_of(trace)
    assert all(way == STATIONS for way in ways.values()), ways
    [process] = {piece.process for piece in trace.slices if piece.name == "decode"}
    assert process != 1
    assert lines[0]["time/generator/busy"] > 0.0
