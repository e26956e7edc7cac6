"""Whole runs of policies that teach themselves: to the bits of a plain loop, from any checkpoint, over kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.adapters import LORA, cut_back, write_base
from tests.support.fakes import delayed, same_bits, tiny_config, weigh_ids
from tests.support.kills import EVERY, STEPS, Trainer, read_store, run_and_kill, write_run
from tests.support.runs import STORED, column, lines, policy_of, timeless
from tests.support.straight import run_straight
from troupe import RunConfig
from troupe.checkpoint import load_checkpoint
from troupe.cli.train import describe_plan
from troupe.run.prepare import prepare
from troupe.runtime import linux_cpu

pytestmark = pytest.mark.no_cover
SLOW = pytest.mark.slow
EMA: dict[str, Any] = {
    "teacher__model_kind": "ema",
    "teacher__update_rate": 0.3,
    "teacher__privileged_context_column": "answer",
}
KEPT: dict[str, Any] = {"schedule__learner_streams": 1, "schedule__max_staleness": 1}


@pytest.fixture(autouse=True)
def as_many_threads_as_the_runs_have() -> Iterator[None]:
    """For the plain loop, whose products are rounded in the same way then."""
    with linux_cpu.blas_limited(1):
        yield


def config_of(model: Path, folder: Path, **settings: Any) -> RunConfig:
    return tiny_config(model, folder, **STORED | KEPT | EMA | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"teacher__model_kind": "base", "learner__beta": 0.1}, marks=SLOW),
        pytest.param({"teacher__model_kind": "live", "teacher__reward_coef": 0.0}, marks=SLOW),
        pytest.param({"teacher__sync_steps": 2, "learner__num_iterations": 3}, marks=SLOW),
        pytest.param({"model__dtype": "bfloat16", "schedule__generator": "process"}, marks=SLOW),
    ],
    ids=["ema", "base", "live", "several updates", "bfloat16 and a process"],
)
def test_the_weights_are_those_of_the_plain_loop(tmp_path: Path, ragged_model: Path, settings: dict[str, Any]) -> None:
    config = config_of(ragged_model, tmp_path, **settings, learner__max_steps=3)
    prepared = prepare(config, [weigh_ids])
    [line] = [line for line in describe_plan(prepared) if line.startswith("teacher: ")]
    assert line.startswith(f'teacher: the policy itself ("{config.teacher.model_kind}"')
    result = troupe.train(config, [delayed(1)])
    assert result.incidents == {}
    assert same_bits(policy_of(result.folder), run_straight(config, weigh_ids).weights)
    assert all(value != 0.0 for value in column(result.folder, "teacher/kl"))
    items = {name for phase in prepared.memory.phases.values() for name in phase}
    assert ("weights as a teacher" in items) == (config.teacher.model_kind == "ema")


@SLOW
@pytest.mark.parametrize("of", ["whole", "adapter", "warmed base", "warmed ema"])
def test_a_run_goes_on_from_any_checkpoint_to_the_same_bits(tmp_path: Path, ragged_model: Path, of: str) -> None:
    model, settings = ragged_model, dict[str, Any]()
    if of == "adapter":
        model, settings = write_base(tmp_path / "base"), dict(LORA)
    if of.startswith("warmed"):
        rows = tmp_path / "given.json"
        rows.write_text(json.dumps([{"prompt": "ab", "completion": "cd"}] * 4), encoding="utf-8")
        settings = {"warm_start__path": str(rows), "warm_start__steps": 2, "warm_start__lr": 1e-2}
        settings["teacher__model_kind"] = of.split()[1]

    def run(folder: Path, *, resume: bool = False) -> Path:
        config = config_of(model, folder, **settings, checkpoint__every=1)
        return Path(troupe.train(config, [delayed(2)], resume=resume).folder)

    whole = run(tmp_path / "first")
    versions = len(lines(whole))
    for version in range(1, versions):
        rest = run(cut_back(whole, version, tmp_path / str(version)), resume=True)
        assert same_bits(policy_of(rest), policy_of(whole))
        assert [timeless(line) for line in lines(rest)] == [timeless(line) for line in lines(whole)[version:]]
        newest = load_checkpoint(whole / "checkpoints" / f"step-{version:08d}")
        assert newest.average is not None
        assert newest.average.keys() == newest.weights.keys()


@SLOW
def test_free_runs_learn_from_it_too(tmp_path: Path, ragged_model: Path) -> None:
    config = config_of(ragged_model, tmp_path, schedule__mode="free", learner__dynamic_sampling=True)
    result = troupe.train(config, [weigh_ids])
    assert result.incidents == {}
    assert all(value != 0.0 for value in column(result.folder, "teacher/kl"))


OF_SUMS: dict[str, Any] = EMA | KEPT | {"schedule__generator": "thread", "learner__lr": 1e-3}


@SLOW
@pytest.mark.alone
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    config, whole = write_run(tmp_path, **OF_SUMS), tmp_path / "whole"
    assert Trainer(config, whole).wait() == 0, (tmp_path / "log.txt").read_text()[-4000:]
    out = tmp_path / "out"
    assert run_and_kill(config, out, kills=STEPS // EVERY // 2, seed=5)
    assert same_bits(policy_of(out), policy_of(whole))
    assert [timeless(line) for line in lines(out)] == [timeless(line) for line in lines(whole)]
    assert read_store(out) == read_store(whole)


@SLOW
@pytest.mark.alone
def test_two_ranks_make_the_run_of_one(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        settings = OF_SUMS | {"learner__lanes": 2, "learner__max_steps": 5, "schedule__learner_ranks": ranks}
        config, out = write_run(tmp_path / str(ranks), **settings), tmp_path / str(ranks) / "out"
        assert Trainer(config, out).wait() == 0, (config.parent / "log.txt").read_text()[-4000:]
        found.append(out)
    assert same_bits(policy_of(found[0]), policy_of(found[1]))
    assert [timeless(line) for line in lines(found[0])] == [timeless(line) for line in lines(found[1])]
