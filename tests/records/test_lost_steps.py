"""Files that are cut or removed between a checkpoint and the resume from it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.fakes import tiny_config, weigh_ids, write_ragged_model
from troupe import RunConfig, RunResult, Supervisor
from troupe.checkpoint import list_checkpoints, read_made
from troupe.records.lost_steps import lost_steps
from troupe.records.sinks.jsonl import JsonlSink

STEPS = 4


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


def config_of(model: Path, inputs: Path, folder: Path, **settings: Any) -> RunConfig:
    given = {"checkpoint__every": 2, "metrics__sinks": ["jsonl", "sqlite"], "learner__lr_scheduler": "constant"}
    return tiny_config(model, inputs, output=str(folder), **given | settings)


async def run_it(config: RunConfig, **settings: Any) -> tuple[RunResult, Supervisor]:
    async with Supervisor(config, [weigh_ids], **settings) as run:
        await run.wait()
    return run.result, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run folder in which everything is told."""
    inputs = tmp_path_factory.mktemp("whole")
    anyio.run(run_it, config_of(ragged_model, inputs, inputs / "run"))
    assert read_made(list_checkpoints(inputs / "run")[0]).lacking == {"jsonl": 0, "sqlite": 0}
    return inputs / "run"


def lines_cut(path: Path) -> None:
    first, second, third, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third + second[:9])


def rows_gone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as store, store:
        store.execute("DELETE FROM steps WHERE step = 3")


HARMS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "lines cut": (lines_cut, "metrics.jsonl", "2, 4"),
    "lines gone": (Path.unlink, "metrics.jsonl", "1-4"),
    "store gone": (Path.unlink, "run.sqlite", "1-4"),
    "store empty": (lambda path: path.write_bytes(b""), "run.sqlite", "1-4"),
    "store cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "run.sqlite", "1-4"),
    "rows gone": (rows_gone, "run.sqlite", "3"),
}


@pytest.mark.parametrize(("harm", "name", "steps"), HARMS.values(), ids=HARMS)
@pytest.mark.anyio
async def test_what_is_lost_is_told_once_and_the_run_goes_on(
    tmp_path: Path, whole: Path, ragged_model: Path, harm: Callable[[Path], object], name: str, steps: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    harm(folder / name)
    allowed = {"resume": True, "allow_changes": ["learner.max_steps"]}
    config = config_of(ragged_model, whole.parent, folder, learner__max_steps=STEPS + 1)
    result, run = await run_it(config, **allowed)
    assert result.complete
    assert result.incidents["steps_lost"] == 1
    assert set(result.incidents) <= {"steps_lost", "store_damaged"}
    [told] = run.lost
    assert told in run.notices
    assert told.startswith(f"{folder / name}: of the 4 steps that are done it lacks {steps}, which it had")
    result, run = await run_it(config_of(ragged_model, whole.parent, folder, learner__max_steps=STEPS + 2), **allowed)
    assert run.lost == ()
    assert not result.incidents


def test_what_lacked_before_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":3}\n{"step":4}\n{"step":9}\n')
    assert lost_steps(tmp_path, 4, {"jsonl": 2}, ["jsonl"]) == []
    assert len(lost_steps(tmp_path, 4, {"jsonl": 1}, ["jsonl"])) == 1
    assert lost_steps(tmp_path, 4, {"jsonl": 1}, ["sqlite"]) == []
    assert lost_steps(tmp_path, 4, {}, ["jsonl", "sqlite"]) == []


def test_a_file_that_cannot_be_read_now_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert lost_steps(tmp_path, 4, {"jsonl": 0}, ["jsonl"]) == []


@pytest.mark.slow
@pytest.mark.anyio
async def test_of_steps_that_a_disk_never_took_it_is_not_said_that_the_file_had_them(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = JsonlSink.flush

    def fails_from_the_second_step_on(self: JsonlSink) -> None:
        if self._newest >= 2:
            raise OSError(5, "Input/output error")
        flush(self)

    settings = {"checkpoint__every": 1, "metrics__sink_timeout_s": 1.0}
    with monkeypatch.context() as patched:
        patched.setattr(JsonlSink, "flush", fails_from_the_second_step_on)
        await run_it(config_of(ragged_model, tmp_path, tmp_path / "run", **settings))
    config = config_of(ragged_model, tmp_path, tmp_path / "run", learner__max_steps=STEPS + 1, **settings)
    _, run = await run_it(config, resume=True, allow_changes=["learner.max_steps"])
    [told] = run.lost
    assert "it lacks 2-4, which it had, or was about to get, when" in told
    assert "or its disk failed then" in told


@pytest.mark.anyio
async def test_a_stopped_run_says_what_its_files_lack_too(tmp_path: Path, ragged_model: Path) -> None:
    config = config_of(ragged_model, tmp_path, tmp_path / "run", learner__max_steps=50)
    async with Supervisor(config, [weigh_ids]) as run:
        async for _ in run.updates():
            run.stop()
    assert read_made(list_checkpoints(tmp_path / "run")[0]).lacking == {"jsonl": 0, "sqlite": 0}
