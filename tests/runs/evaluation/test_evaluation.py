"""Whole runs that evaluate while they train."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

import troupe
from tests.support.fakes import delayed, often_equal, same_bits, tiny_config, weigh_ids
from tests.support.runs import STORED, in_store, policy_of, train
from tests.support.trace_events import read_trace
from troupe import Supervisor
from troupe.checkpoint import list_checkpoints
from troupe.errors import ConfigError
from troupe.records.evaluations import read_evaluations
from troupe.records.held_out import held_out_of
from troupe.records.store.read import open_store
from troupe.run.prepare import prepare

SETS = {"num_samples": 2, "temperature": 1.0}


def evaluated(folder: Path, every: int = 1, **settings: Any) -> dict[str, Any]:
    """Settings of a run that looks at two sets."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"held {i}", "answer": str(i % 3)} for i in range(5)]
    (folder / "held-out.json").write_text(json.dumps(rows))
    path = str(folder / "held-out.json")
    sets = [{"name": "sampled", "path": path, "limit": 3, **SETS}]
    return {"data__eval_path": path, "evaluation__every": every, "evaluation__sets": sets, **settings}


def figures(run: Path | str) -> dict[tuple[int, str], Mapping[str, float]]:
    """By version and set."""
    return {(each.version, each.name): each.metrics for each in read_evaluations(Path(run))}


def timeless(run: Path | str) -> list[Any]:
    return [(each.version, each.name, each.metrics) for each in read_evaluations(Path(run))]


PLACES: dict[str, dict[str, Any]] = {
    "thread": {},
    "ahead": {"schedule__max_staleness": 1},
    "parts": {"schedule__parts": 2},
    "processes": {"schedule__generator": "process", "schedule__generator_processes": 2, "schedule__parts": 2},
    "replaced": {"learner__dynamic_sampling": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_training_has_the_same_bits_with_and_without(place: str, tmp_path: Path, ragged_model: Path) -> None:
    reward = often_equal if place == "replaced" else weigh_ids
    train(ragged_model, tmp_path / "without", reward, **PLACES[place])
    train(ragged_model, tmp_path / "with", reward, **PLACES[place], **evaluated(tmp_path))
    assert same_bits(policy_of(tmp_path / "with" / "run"), policy_of(tmp_path / "without" / "run"))
    assert figures(tmp_path / "with" / "run").keys() == {(v, s) for v in range(5) for s in ("held_out", "sampled")}


def answered(run: Path | str) -> list[Any]:
    """Everything that an evaluation has of each sample."""
    return in_store(Path(run), "SELECT * FROM evaluation_samples ORDER BY version, name, row, sample")


CREWS = {"one": 1, "two": 2}


@pytest.mark.slow
def test_rows_are_answered_alike_whoever_decodes(tmp_path: Path, ragged_model: Path) -> None:
    settings = evaluated(tmp_path, every=2, schedule__parts=2, metrics__sinks=["jsonl", "sqlite", "trace"])
    settings |= {"learner__max_steps": 2, "schedule__blas_threads": 1, "schedule__max_staleness": 1}
    here = train(ragged_model, tmp_path / "here", **settings, schedule__generator="thread").folder
    for name, processes in CREWS.items():
        own = settings | {"schedule__generator": "process", "schedule__generator_processes": processes}
        run = Path(train(ragged_model, tmp_path / name, **own).folder)
        assert (timeless(run), answered(run)) == (timeless(here), answered(here))
        assert same_bits(policy_of(run), policy_of(here))
        trace = read_trace(json.loads((run / "trace.json").read_text()))
        at_work = {trace.track_of(each) for each in trace.slices if each.name == "evaluate"}
        assert at_work
        assert not any(track.startswith("evaluator") for track in at_work), "a process of the generator did it"


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_process_that_is_killed_amid_an_evaluation_changes_nothing(tmp_path: Path, ragged_model: Path) -> None:
    settings = evaluated(tmp_path, every=0, learner__max_steps=2, schedule__blas_threads=1)
    settings["evaluation__sets"] = [{**settings["evaluation__sets"][0], "limit": 5, "num_samples": 60}]
    here = STORED | settings | {"schedule__generator": "thread"}
    async with Supervisor(tiny_config(ragged_model, tmp_path / "whole", **here), [weigh_ids]) as run:
        await run.wait()
    expected = run.result.folder
    there = STORED | settings | {"schedule__generator": "process"}
    async with Supervisor(tiny_config(ragged_model, tmp_path / "own", **there), [weigh_ids]) as run:
        generator: Any = run._pipeline.actors[1]
        with anyio.fail_after(60):
            while not any(name.startswith("e.") for each in generator.members() for name in each.leases):  # noqa: ASYNC110
                await anyio.sleep(0.001)
        (pid,) = generator.sources[0].pids
        os.kill(pid, signal.SIGKILL)
        await run.wait()
    own = run.result.folder
    assert (timeless(own), answered(own)) == (timeless(expected), answered(expected))
    assert same_bits(policy_of(own), policy_of(expected))
    assert in_store(Path(own), "SELECT kind FROM incidents") == [("process_restarted",)]


def test_each_version_and_set_stands_once_and_costs_what_its_tokens_cost(tmp_path: Path, ragged_model: Path) -> None:
    sinks = ["jsonl", "sqlite", "trace"]
    result = train(ragged_model, tmp_path, **evaluated(tmp_path, every=2, metrics__sinks=sinks))
    found = figures(result.folder)
    assert found.keys() == {(v, s) for v in (0, 2, 4) for s in ("held_out", "sampled")}
    assert found[0, "sampled"].keys() >= {"eval/sampled/avg@2", "eval/sampled/pass@2", "eval/sampled/weigh_ids"}
    assert result.rewards_before["weigh_ids"] == found[0, "held_out"]["eval/held_out/avg@1"]
    assert result.rewards_after["weigh_ids"] == found[4, "held_out"]["eval/held_out/avg@1"]
    stored = in_store(
        result.folder, "SELECT version, name, COUNT(*) FROM evaluation_samples GROUP BY 1, 2 ORDER BY 1, 2"
    )
    trace = read_trace(json.loads((Path(result.folder) / "trace.json").read_text()))

    def seconds(actor: str, name: str) -> float:
        pieces = [each for each in trace.slices if trace.track_of(each).startswith(actor) and each.name == name]
        return sum(each.end - each.start for each in pieces) / 8e6

    assert seconds("generator", "wait for device") <= 0.01 + seconds("evaluator", "generate")
    assert seconds("evaluator", "generate") > 0
    assert sorted(stored) == [(v, s, n) for v in (0, 2, 4) for s, n in (("held_out", 5), ("sampled", 6))]


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_with_that_very_version(tmp_path: Path, ragged_model: Path) -> None:
    def same(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    settings = evaluated(tmp_path, evaluation__patience=2, learner__max_steps=9)
    settings |= {"rewards__functions": [], "schedule__max_staleness": 1}
    result = train(ragged_model, tmp_path, same, **settings)
    assert (result.steps, result.total_steps, result.complete) == (2, 9, True)
    assert "eval/held_out/avg@1 was no better than 0.5 at step 0" in result.stopped_early
    assert (Path(result.folder) / "final" / "model.safetensors").is_file()
    again = train_again(ragged_model, tmp_path, same, settings)
    assert (again.steps, again.stopped_early) == (2, result.stopped_early)
    longer = train_again(ragged_model, tmp_path, same, settings | {"evaluation__patience": 4})
    assert longer.steps == 4
    whole = train(ragged_model, tmp_path / "whole", same, **settings | {"evaluation__patience": 4})
    assert timeless(longer.folder) == timeless(whole.folder)
    assert same_bits(policy_of(longer.folder), policy_of(whole.folder))


def train_again(model: Path, folder: Path, reward: Any, settings: dict[str, Any]) -> Any:
    async def go_on() -> Any:
        async with Supervisor(tiny_config(model, folder, **STORED | settings), [reward], resume=True) as run:
            await run.wait()
        return run.result

    return anyio.run(go_on)


@pytest.mark.slow
def test_a_stop_amid_an_evaluation_loses_none_of_it(tmp_path: Path, ragged_model: Path) -> None:
    """The checkpoint holds the weights of a version that is not done with, though steps were learned since."""
    settings = evaluated(tmp_path, every=2, learner__max_steps=3)
    whole = train(ragged_model, tmp_path / "whole", **settings)

    async def stopped() -> None:
        hanging = anyio.Event()

        async def slow(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
            if "held" in str(prompts[0]):
                await hanging.wait()
            return weigh_ids(completion_ids)

        slow.__name__ = "weigh_ids"
        async with Supervisor(tiny_config(ragged_model, tmp_path, **STORED | settings), [slow]) as run:
            async for update in run.updates():
                if update.step == 1:
                    run.stop()
        assert run.result.steps >= 1
        assert run.result.unevaluated == (0,)

    anyio.run(stopped)
    [newest, *_] = list_checkpoints(tmp_path / "run")
    assert (newest / "behind-00000000.safetensors").is_file()
    train_again(ragged_model, tmp_path, weigh_ids, settings)
    assert timeless(tmp_path / "run") == timeless(whole.folder)
    assert same_bits(policy_of(tmp_path / "run"), policy_of(whole.folder))


@pytest.mark.anyio
async def test_weights_are_let_go_of_when_they_are_evaluated(tmp_path: Path, ragged_model: Path) -> None:
    settings = evaluated(tmp_path, every=0, learner__max_steps=4)
    async with Supervisor(tiny_config(ragged_model, tmp_path, **settings), [weigh_ids]) as run:
        begun = [weakref.ref(array) for array in run._pipeline.learner.weights.values()]
        ledger = run._pipeline.ledgers.evaluations
        async for update in run.updates():
            if update.step == 3:
                with anyio.fail_after(60):
                    while 0 in ledger.pending or any(array() is not None for array in begun):
                        gc.collect()
                        await anyio.sleep(0.01)


@pytest.mark.slow
def test_a_set_that_is_another_under_its_name_is_told_of_and_not_compared(tmp_path: Path, ragged_model: Path) -> None:
    settings = evaluated(tmp_path, learner__max_steps=1)
    train(ragged_model, tmp_path, **settings)
    rows = json.loads((tmp_path / "held-out.json").read_text())
    (tmp_path / "held-out.json").write_text(json.dumps([*rows[:2], {"prompt": "changed", "answer": "1"}, *rows[3:]]))
    settings["evaluation__sets"][0] |= {"limit": 2, "temperature": 0.5}
    config = tiny_config(ragged_model, tmp_path, **STORED | settings | {"learner__max_steps": 2})

    def notices() -> list[str]:
        told = prepare(config, [weigh_ids], resume=True, allow_changes=["learner.max_steps"]).notices
        return [notice for notice in told if "is evaluated otherwise from here" in notice]

    [whole, sampled] = notices()
    assert "the set held_out is evaluated otherwise from here: rows 5 (sum " in whole
    assert "temperature" not in whole
    assert "rows 3 (sum " in sampled
    assert "temperature 1.0 → 0.5; its figures are not compared with those before" in sampled
    troupe.train(config, [weigh_ids], resume=True, allow_changes=["learner.max_steps"])
    with open_store(tmp_path / "run") as store:
        found = held_out_of(store.evaluations())
    assert {name: list(of.changes) for name, of in found.items()} == {"held_out": [2], "sampled": [2]}
    assert notices() == []


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path: Path, ragged_model: Path) -> None:
    settings = evaluated(tmp_path, learner__max_steps=6, checkpoint__every=1, checkpoint__keep=1)
    settings["checkpoint__metric_for_best"] = "eval/sampled/avg@2"
    result = train(ragged_model, tmp_path, **settings)
    values = {
        each.version: each.metrics["eval/sampled/avg@2"]
        for each in read_evaluations(Path(result.folder))
        if each.name == "sampled" and each.version
    }
    best = max(values, key=lambda version: (values[version], version))
    assert {path.name for path in list_checkpoints(Path(result.folder))} == {f"step-{best:08d}", "step-00000006"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint__metric_for_best": "eval/sampled/avg@3"}, "did you mean eval/sampled/avg@2"),
        (
            {
                "checkpoint__metric_for_best": "eval/sampled/avg@3",
                "checkpoint__keep_best": False,
                "evaluation__patience": 1,
            },
            "did you mean eval/sampled/avg@2",
        ),
        ({"evaluation__metric": "eval/nobody"}, "evaluation.metric is 'eval/nobody', which no evaluation has"),
        (
            {"checkpoint__metric_for_best": "eval/held_out/avg@1", "evaluation__every": 0},
            "evaluation.every is 0, so that checkpoints are not looked at",
        ),
        ({"evaluation__sets": [{"name": "x", "path": "x.json", "num_samples": 2}]}, "greedy completions of a row"),
        ({"evaluation__sets": [{"name": "held_out", "path": "x.json"}]}, "that of data.eval_path"),
        ({"evaluation__patience": 1, "evaluation__every": 0}, "give evaluation.every"),
    ],
)
def test_what_cannot_be_is_told_before_work_starts(
    settings: dict[str, Any], message: str, tmp_path: Path, ragged_model: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        train(ragged_model, tmp_path, **evaluated(tmp_path) | settings)
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_reward_of_a_set_that_raises_is_missing_and_told(tmp_path: Path, ragged_model: Path) -> None:
    (tmp_path / "own.py").write_text("def own(completions, **_):\n    raise ValueError('no idea')\n")
    settings = evaluated(tmp_path)
    settings["evaluation__sets"][0]["rewards"] = [f"{tmp_path / 'own.py'}:own"]
    result = train(ragged_model, tmp_path, delayed(3), **settings)
    assert result.complete
    found = figures(result.folder)
    assert found[4, "sampled"]["eval/sampled/missing"] == 1.0
    assert "eval/sampled/avg@2" not in found[4, "sampled"]
    assert found[4, "held_out"]["eval/held_out/missing"] == 0.0
    told = in_store(result.folder, "SELECT message FROM incidents WHERE message LIKE 'evaluation of sampled, row 0: %'")
    assert told
