"""Whole runs and what is in their store: everything once, over resumes, failing disks and checkpoints."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import often_equal, tiny_config, weigh_ids
from tests.support.runs import completions, lines
from tests.support.stored import rows
from troupe import RunConfig, Supervisor
from troupe.actors import checkpointer
from troupe.checkpoint import save_checkpoint
from troupe.records.sinks.jsonl import JsonlSink
from troupe.records.store.format import StepRows
from troupe.records.store.write import StoreWriter
from troupe.run.result import RunResult

pytestmark = pytest.mark.anyio
WITH_STORE = {"metrics__sinks": ["jsonl", "sqlite"]}


async def run_to(config: RunConfig, reward: Any = weigh_ids, *, resume: bool = False, drain_at: int = 0) -> RunResult:
    async with Supervisor(config, [reward], resume=resume) as run:
        async for update in run.updates():
            if update.step == drain_at:
                run.drain()
    return run.result


async def test_the_store_of_a_run_has_all_that_happened(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=2, metrics__store_log_probs=True, **WITH_STORE)
    result = await run_to(config)
    folder = Path(result.folder)
    found = completions(folder)
    assert [(c.step, c.gid, c.sample) for c in found] == [
        (gid // 2 + 1, gid, sample) for gid in range(8) for sample in range(3)
    ]
    assert all(c.scores == {"weigh_ids": sum(c.token_ids) % 13 / 13} for c in found)
    assert all(c.reward == c.scores["weigh_ids"] for c in found)
    assert all(c.log_probs is not None and len(c.log_probs) == len(c.token_ids) for c in found)
    assert all(c.columns is not None and c.columns["answer"] == str(c.row) for c in found)
    steps = rows(folder / "run.sqlite", "SELECT step, version, metrics FROM steps ORDER BY step")
    for line, (step, version, metrics) in zip(lines(folder), steps, strict=True):
        assert line == {"step": step, "version": version} | json.loads(metrics)
    assert rows(folder / "run.sqlite", "SELECT version FROM checkpoints ORDER BY version") == [2, 4]
    assert (result.incidents, result.switched_off_sinks) == ({}, {})


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_over_resumes_everything_stands_once(tmp_path: Path, ragged_model: Path, max_staleness: int) -> None:
    settings: dict[str, Any] = {
        **WITH_STORE,
        "checkpoint__every": 1,
        "schedule__max_staleness": max_staleness,
        "learner__dynamic_sampling": True,
    }
    whole = tiny_config(ragged_model, tmp_path / "whole", **settings)
    parts = tiny_config(ragged_model, tmp_path / "parts", **settings)
    await run_to(whole, often_equal)
    for stop_at in (1, 3, 0):
        result = await run_to(parts, often_equal, resume=stop_at != 1, drain_at=stop_at)
    assert result.complete
    assert completions(tmp_path / "parts" / "run") == completions(tmp_path / "whole" / "run")
    path = tmp_path / "parts" / "run" / "run.sqlite"
    assert rows(path, "SELECT step FROM steps ORDER BY step") == [1, 2, 3, 4]
    assert rows(path, "SELECT count(*) FROM starts") == [3]


async def test_rows_past_the_checkpoint_are_made_anew(tmp_path: Path, ragged_model: Path) -> None:
    """As after a kill: the store is three steps ahead of the newest checkpoint."""
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=1, **WITH_STORE)
    folder = Path((await run_to(config)).folder)
    before = completions(folder)
    for step in (2, 3, 4):
        (folder / "checkpoints" / f"step-{step:08}" / "MANIFEST.json").unlink()
    await run_to(config, resume=True)
    assert completions(folder) == before
    assert rows(folder / "run.sqlite", "SELECT start, step FROM steps ORDER BY step") == [
        (1, 1),
        (2, 2),
        (2, 3),
        (2, 4),
    ]


async def test_a_store_that_fails_for_a_while_is_whole_in_the_end(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_step, failures = StoreWriter.add_step, [OSError(28, "No space left on device")] * 5

    def fails_five_times(self: StoreWriter, step: StepRows) -> None:
        if step.step[0] >= 2 and failures:
            raise failures.pop()
        add_step(self, step)

    monkeypatch.setattr(StoreWriter, "add_step", fails_five_times)
    config = tiny_config(ragged_model, tmp_path, checkpoint__every=1, **WITH_STORE)
    result = await run_to(config)
    assert result.complete
    assert result.switched_off_sinks == {}
    assert result.incidents == {"sink_failing": 1, "sink_back": 1}
    path = Path(result.folder) / "run.sqlite"
    assert rows(path, "SELECT step, count(*) FROM completions GROUP BY step") == [(s, 6) for s in (1, 2, 3, 4)]


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_steps_are_on_the_disk_before_a_checkpoint_of_them(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    flush, seen = JsonlSink.flush, []
    late = threading.Event()

    def late_flush(self: JsonlSink) -> None:
        late.wait(0.05)  # never set: a slow disk
        flush(self)

    def watched(folder: Path, *args: Any, **settings: Any) -> int:
        run = folder.parent.parent
        steps = rows(run / "run.sqlite", "SELECT max(step) FROM steps")
        [settled] = rows(run / "run.sqlite", "SELECT settled FROM starts")
        seen.append((int(folder.name.rpartition("-")[2]), steps[0], settled, len(lines(run))))
        return save_checkpoint(folder, *args, **settings)

    monkeypatch.setattr(JsonlSink, "flush", late_flush)
    monkeypatch.setattr(checkpointer, "save_checkpoint", watched)
    every = 100 if is_stopped else 1
    async with Supervisor(tiny_config(ragged_model, tmp_path, checkpoint__every=every, **WITH_STORE), [weigh_ids]) as r:
        async for update in r.updates():
            if is_stopped and update.step == 2:
                r.stop()
    versions = [version for version, *_ in seen]
    assert (len(versions) == 1 and versions[0] >= 2) if is_stopped else versions == [1, 2, 3, 4]
    assert all(min(told) >= version for version, *told in seen)


async def test_the_store_lists_the_checkpoints_that_are_there_after_a_stop_and_a_resume(
    tmp_path: Path, tiny_model: Path
) -> None:
    """A stop writes its checkpoint when nobody listens any more, and what is pruned then is told to nobody either."""
    settings = {"checkpoint__every": 1, "checkpoint__keep": 1, "checkpoint__keep_best": False, "learner__max_steps": 6}
    config = tiny_config(tiny_model, tmp_path, metrics__sinks=["sqlite"], **settings)
    async with Supervisor(config, [weigh_ids]) as run:
        async for update in run.updates():
            if update.step == 3:
                run.stop()
    stopped = run.result.steps
    async with Supervisor(config, [weigh_ids], resume=True) as run:
        await run.wait()
    told = rows(
        tmp_path / "run" / "run.sqlite", "SELECT version, bytes, removed_at IS NULL FROM checkpoints ORDER BY 1"
    )
    assert {version for version, _, _ in told} >= {stopped, 6}
    assert [version for version, _, stands in told if stands] == [6]
    assert all(size > 0 for _, size, _ in told)
