"""Runs whose folder, or a file in it, is moved, deleted or exchanged while they run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest

from tests.support.fakes import BATCH_SIZE, same_bits, tiny_config, weigh_ids
from tests.support.runs import in_store, lines
from troupe import RunConfig, RunResult, Supervisor
from troupe.actors.learner.gathering import StepGroups
from troupe.actors.learner.train import BatchTrainer, Learned, LearnerState
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.errors import FolderGoneError, RunError
from troupe.policy import Weights
from troupe.run.folder import is_as_written
from troupe.run.ledgers import Factories

pytestmark = pytest.mark.anyio

STEPS, AT = 5, 2


def config_of(model: Path, folder: Path, **settings: Any) -> RunConfig:
    given = {"learner__max_steps": STEPS, "checkpoint__every": 1, "metrics__sinks": ["jsonl", "sqlite"]}
    return tiny_config(model, folder, **given | settings)


async def run_it(config: RunConfig, harm: Callable[[], object] = lambda: None, **settings: Any) -> RunResult:
    """A run to its end; `harm` is done while the step after `AT` is scored."""
    calls = count()

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if next(calls) == AT * BATCH_SIZE:
            harm()
        return weigh_ids(completion_ids)

    async with Supervisor(config, [score], **settings) as run:
        await run.wait()
    return run.result


def final_of(folder: Path) -> Weights:
    newest = load_checkpoint(list_checkpoints(folder)[0])
    assert newest.state.version == STEPS
    return newest.weights


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def stored_steps_of(folder: Path) -> list[int]:
    return [step for (step,) in in_store(folder, "SELECT step FROM steps ORDER BY step")]


def move(folder: Path) -> Path:
    return folder.rename(folder.parent / "moved")


def move_above(folder: Path) -> Path:
    return folder.parent.rename(folder.parent.with_name("moved")) / folder.name


def move_and_make_anew(folder: Path) -> Path:
    moved = move(folder)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "MANIFEST.json").write_text("{}")
    return moved


def link_elsewhere(folder: Path) -> Path:
    own = folder.resolve()
    (folder.parent / "other").mkdir()
    folder.unlink()
    folder.symlink_to(folder.parent / "other")
    return own


def delete(folder: Path) -> None:
    while folder.exists():  # files come and go in it meanwhile
        shutil.rmtree(folder, ignore_errors=True)


HARMS = (move, move_above, move_and_make_anew, link_elsewhere, delete)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
async def test_a_run_whose_folder_is_taken_away_ends_and_its_own_folder_goes_on(
    tmp_path: Path, ragged_model: Path, harm: Callable[[Path], Path | None]
) -> None:
    folder = tmp_path / "there" / "run"
    folder.parent.mkdir()
    config = config_of(ragged_model, tmp_path / "inputs", output=str(folder))
    if harm is link_elsewhere:
        (tmp_path / "own").mkdir()
        folder.symlink_to(tmp_path / "own")
    own: list[Path | None] = []
    with pytest.raises(FolderGoneError, match="was taken away from under the run"):
        await run_it(config, lambda: own.append(harm(folder)))
    [now] = own
    there = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    made = {"checkpoints", "checkpoints/step-00000001", "checkpoints/step-00000001/MANIFEST.json"}
    assert there == (made if harm is move_and_make_anew else set()), "nothing is written in its place"
    if now is None:
        return
    assert ("folder_gone",) in in_store(now, "SELECT kind FROM incidents")
    assert not {"summary.json", "run.lock", "final"} & {path.name for path in now.iterdir()}
    assert steps_of(now) == stored_steps_of(now)
    resumed = config_of(ragged_model, tmp_path / "inputs", output=str(now))
    result = await run_it(resumed, resume=True)
    assert result.complete
    assert not result.incidents
    assert steps_of(now) == stored_steps_of(now) == list(range(1, STEPS + 1))
    await run_it(config_of(ragged_model, tmp_path / "whole"))
    assert same_bits(final_of(now), final_of(tmp_path / "whole" / "run"))
    known = {Path(name).name for (name,) in in_store(now, "SELECT folder FROM checkpoints WHERE removed_at IS NULL")}
    assert known == {path.name for path in list_checkpoints(now)}, "the store knows them in the new place, too"


async def test_one_that_is_stopped_meanwhile_writes_no_checkpoint_elsewhere(tmp_path: Path, ragged_model: Path) -> None:
    runs: list[Supervisor] = []

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if not (tmp_path / "moved").exists():
            move(tmp_path / "run")
            (tmp_path / "run").mkdir()
            runs[0].stop()
        return weigh_ids(completion_ids)

    async def in_the_loop(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await anyio.lowlevel.checkpoint()
        return score(completion_ids)

    async def stop_it() -> None:
        async with Supervisor(config_of(ragged_model, tmp_path), [in_the_loop]) as run:
            runs.append(run)
            await run.wait()

    with pytest.raises(FolderGoneError):
        await stop_it()
    assert list((tmp_path / "run").iterdir()) == []


async def test_what_fails_because_the_folder_is_gone_is_told_as_that(tmp_path: Path, ragged_model: Path) -> None:
    class Failing(BatchTrainer):
        def train(self, state: LearnerState, step: StepGroups) -> Learned:
            move(tmp_path / "run")
            raise RunError("no room for the weights")

    with pytest.raises(FolderGoneError):
        await run_it(config_of(ragged_model, tmp_path), factories=Factories(trainer=Failing))


async def test_a_store_and_metrics_that_are_deleted_are_begun_anew_and_told(tmp_path: Path, ragged_model: Path) -> None:
    folder = tmp_path / "run"

    def harm() -> None:
        metrics = folder / "metrics.jsonl"  # which another thread writes than the store
        while stored_steps_of(folder) != list(range(1, AT + 1)) or metrics.read_bytes().count(b"\n") < AT:
            pass
        for path in [*folder.glob("run.sqlite*"), folder / "metrics.jsonl", folder / "run.toml"]:
            path.unlink()

    result = await run_it(config_of(ragged_model, tmp_path), harm)
    assert result.complete
    assert result.incidents == {"file_lost": 3}
    assert is_as_written(folder / "run.toml")
    [told] = [
        message for (message,) in in_store(folder, "SELECT message FROM incidents") if "run.sqlite was" in message
    ]
    assert f"{folder / 'run.sqlite'} was removed or exchanged under the run" in told
    assert steps_of(folder) == stored_steps_of(folder) == list(range(AT + 1, STEPS + 1))


async def test_checkpoints_that_are_taken_away_are_told_and_the_next_one_is_there(
    tmp_path: Path, ragged_model: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"

    def harm() -> None:
        while (AT,) not in in_store(tmp_path / "run", "SELECT version FROM checkpoints"):
            pass
        folder.rename(tmp_path / "away")

    result = await run_it(config_of(ragged_model, tmp_path), harm)
    assert result.complete
    assert result.incidents == {"checkpoints_gone": 1}
    assert final_of(tmp_path / "run")
