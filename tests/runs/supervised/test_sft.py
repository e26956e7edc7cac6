"""Runs that learn what rows say: all their steps, or those before the first that is sampled."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import pytest

import troupe
from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.kills import STEPS, P, Trainer, read_store, run_and_kill, write_run
from tests.support.runs import (
    STORED,
    column,
    completions,
    done,
    incidents,
    lines,
    policy_of,
    refused,
    timeless,
    write_jsonl,
)
from troupe import RunConfig, Supervisor
from troupe.cli.demo import DEMO_CONFIG
from troupe.errors import DatasetError
from troupe.policy import load_policy
from troupe.run.memory import peak_bytes
from troupe.run.prepare import prepare

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]


def sft_config(model: Path, folder: Path, **settings: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"task": "sft", "data__path": str(write_jsonl(folder / "rows.jsonl", ROWS))}
    return tiny_config(model, folder, **STORED | rows | settings)


def warm_config(model: Path, folder: Path, **settings: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    path = str(write_jsonl(folder / "warm.jsonl", ROWS))
    warm: dict[str, Any] = {"warm_start__path": path, "warm_start__steps": 3, "warm_start__lr": 1e-3}
    return tiny_config(model, folder, **STORED | warm | {"checkpoint__every": 1} | settings)


async def cut_after(config: RunConfig, steps: int) -> None:
    """Begin a run, and stop it at the end of a step."""
    async with Supervisor(config, [weigh_ids] if config.task == "grpo" else []) as run:
        async for update in run.updates():
            if update.step == steps:
                run.stop()
                break


def test_rows_are_learned_and_told_of(tmp_path: Path, tiny_model: Path) -> None:
    config = sft_config(tiny_model, tmp_path, learner__max_steps=30, learner__batch_size=4, learner__lr=3e-3)
    result = troupe.train(config)
    assert (result.steps, result.closed_groups) == (30, {"trained": 120})
    losses = column(result.folder, "loss")
    assert losses[-1] < losses[0] / 2
    first = lines(result.folder)[0]
    assert "reward" not in first
    assert (first["epoch"], first["staleness"], first["learning_rate"]) == (0.25, 0.0, 3e-3)
    stored = completions(result.folder)
    assert {(each.prompt, each.text) for each in stored} == {(row["prompt"], row["completion"]) for row in ROWS}
    assert {(each.reward, each.advantage, each.finish_reason) for each in stored} == {(None, None, "stop")}
    assert incidents(result.folder) == []
    for told in (done("status", result.folder), done("inspect", result.folder), done("report", result.folder)):
        assert "nan" not in told


def test_a_run_that_is_resumed_has_the_same_bits(tmp_path: Path, tiny_model: Path) -> None:
    settings: dict[str, Any] = {"learner__lanes": 2, "checkpoint__every": 2, "learner__gradient_accumulation_steps": 2}
    whole = troupe.train(sft_config(tiny_model, tmp_path / "whole", **settings))
    again = sft_config(tiny_model, tmp_path / "again", **settings)
    anyio.run(cut_after, again, 2)
    assert troupe.train(again, resume=True).steps == 4
    assert same_bits(policy_of(tmp_path / "again" / "run"), policy_of(whole.folder))
    assert list(map(timeless, lines(tmp_path / "again" / "run"))) == list(map(timeless, lines(whole.folder)))


def test_held_out_rows_are_measured_with_the_same_bits_after_a_resume(tmp_path: Path, tiny_model: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": f"{a}-1=", "completion": str(a)} for a in range(5)])
    settings: dict[str, Any] = {
        "sft__eval_dataset": str(held_out),
        "sft__eval_steps": 3,
        "checkpoint__every": 1,
        "learner__max_steps": 8,
        "learner__lr": 1e-3,
    }
    plain = troupe.train(sft_config(tiny_model, tmp_path / "plain", learner__max_steps=8, learner__lr=1e-3))
    whole = troupe.train(sft_config(tiny_model, tmp_path / "whole", **settings))
    assert same_bits(policy_of(whole.folder), policy_of(plain.folder))
    told = {at: line["eval_loss"] for at, line in enumerate(lines(whole.folder), 1) if "eval_loss" in line}
    assert list(told) == [3, 6, 8]
    again = sft_config(tiny_model, tmp_path / "again", **settings)
    anyio.run(cut_after, again, 5)
    assert troupe.train(again, resume=True).steps == 8
    assert list(map(timeless, lines(tmp_path / "again" / "run"))) == list(map(timeless, lines(whole.folder)))
    best = min(told, key=lambda step: told[step])
    status = done("status", whole.folder)
    assert f"loss {told[8]:.4f} at step 8, best {told[best]:.4f} at step {best}" in status
    held_out.write_text('{"prompt": "1"}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r'held_out\.jsonl:1: .*has no "completion"'):
        prepare(sft_config(tiny_model, tmp_path / "wrong", **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "more"), [(2, {}), (4, {}), (2, {"curriculum__enabled": True, "curriculum__window": 1})]
)
def test_a_warm_start_is_resumed_amid_either_kind_of_step(
    tmp_path: Path, ragged_model: Path, at: int, more: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"schedule__max_staleness": 1, "learner__beta": 0.1, **more}
    whole = troupe.train(warm_config(ragged_model, tmp_path / "whole", **settings), [weigh_ids])
    assert whole.steps == whole.total_steps == 7
    rewards = [line.get("reward") for line in lines(whole.folder)]
    assert rewards[:3] == [None] * 3
    assert None not in rewards[3:]
    again = warm_config(ragged_model, tmp_path / "again", **settings)
    anyio.run(cut_after, again, at)
    assert troupe.train(again, [weigh_ids], resume=True).steps == 7
    assert same_bits(policy_of(tmp_path / "again" / "run"), policy_of(whole.folder))


@pytest.mark.slow
def test_sampling_begins_as_a_run_of_its_own_would(tmp_path: Path, ragged_model: Path) -> None:
    """Prompts, learning rates and reference are those of a second run from the policy of a first."""
    settings: dict[str, Any] = {"learner__beta": 0.1, "learner__warmup_steps": 2}
    warm = troupe.train(warm_config(ragged_model, tmp_path / "warm", **settings), [weigh_ids])
    first = sft_config(
        ragged_model, tmp_path / "first", learner__max_steps=3, learner__lr=1e-3, learner__lr_scheduler="linear"
    )
    begun = troupe.train(first)
    second = troupe.train(
        tiny_config(Path(begun.folder) / "final", tmp_path / "second", **STORED | settings), [weigh_ids]
    )
    sampled = lines(warm.folder)[3:]
    for name in ("learning_rate", "epoch"):
        assert [line[name] for line in sampled] == column(second.folder, name)
    assert sampled[0]["kl"] == 0.0
    rows = {
        folder: [[each.row for each in completions(folder, step=step + more)] for step in (1, 4)]
        for folder, more in ((warm.folder, 3), (second.folder, 0))
    }
    assert rows[warm.folder] == rows[second.folder]


def test_the_command_says_what_is_missing(desk: Path) -> None:
    assert "there is nothing to learn from" in refused("sft", "-m", "m")
    assert 'has no "completion"' in refused("sft", "-m", "m", "-d", "p.json")
    write_jsonl(desk / "rows.jsonl", ROWS)
    (desk / "x.py").write_text('def f(a: int) -> int:\n    """F.\n\n    Args:\n        a: A.\n    """\n    return a\n')
    assert "environment or a tool" in refused(
        "sft", "-m", "m", "-d", "rows.jsonl", "--set", "environment.tools=['x.py:f']"
    )
    write_jsonl(
        desk / "long.jsonl",
        [*ROWS, {"prompt": "0123456789" * 3, "completion": "2"}, {"prompt": "1", "completion": "9876543210"}],
    )
    plan = done("sft", "-m", "m", "-d", "long.jsonl", "--max-length", "8", "--dry-run")
    assert "17 rows to learn from" in plan
    assert "1 of 17 rows are longer than sft.max_length" in plan
    assert "1 rows are left out" in plan
    plan = done("sft", "-m", "m", "-d", "rows.jsonl", "--eval-dataset", "rows.jsonl", "--eval-steps", "5", "--dry-run")
    assert "the loss of 16 rows is measured" in plan
    assert "16 of 16 held-out rows (sft.eval_dataset) are learned, too" in plan
    assert "held-out rows" in plan.partition("memory at the most")[2].partition("\n")[0]
    assert "sft.eval_dataset names no held-out rows" in refused(
        "sft", "-m", "m", "-d", "rows.jsonl", "--eval-steps", "5"
    )
    assert "no step is supervised" in refused("train", "-m", "m", "--set", "sft.eval_dataset='rows.jsonl'")
    plan = done("sft", "-m", "m", "-d", "rows.jsonl", "--dry-run")
    assert "16 rows to learn from" in plan
    assert "rewards" not in plan.partition("task =")[0]


def test_the_best_completions_of_a_run_are_learned(tmp_path: Path, ragged_model: Path) -> None:
    """Rejection sampling in two commands."""
    run = Path(troupe.train(tiny_config(ragged_model, tmp_path, **STORED), [weigh_ids]).folder)
    good = tmp_path / "good.jsonl"
    rewards = sorted(each.reward for each in completions(run) if each.reward is not None)
    least = rewards[len(rewards) // 2]
    done("inspect", run, "--min-reward", str(least), "--export", good)
    kept = [json.loads(line) for line in good.read_text().splitlines()]
    assert kept
    assert all(row["reward"] >= least for row in kept)
    good.write_text("".join(json.dumps(row) + "\n" for row in kept if row["completion"].strip()))
    done("sft", "-m", run, "-d", good, "-o", tmp_path / "sft", "--max-steps", "2")
    assert not same_bits(load_policy(run / "final").weights, policy_of(tmp_path / "sft"))


@pytest.mark.slow
def test_a_free_run_begins_with_its_supervised_steps(tmp_path: Path, ragged_model: Path) -> None:
    config = warm_config(ragged_model, tmp_path, schedule__mode="free", schedule__max_staleness=1)
    anyio.run(cut_after, config, 2)
    assert troupe.train(config, [weigh_ids], resume=True).steps == 7
    told = lines(tmp_path / "run")
    assert [("reward" in line, line["groups/trained"]) for line in told] == [(False, 2)] * 3 + [(True, 2)] * 4
    assert len({each.gid for each in completions(tmp_path / "run")}) == 14


@pytest.mark.slow
@pytest.mark.alone
def test_processes_and_ranks_change_no_bit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "warm.jsonl", ROWS)
    settings: dict[str, Any] = {
        "warm_start__path": "warm.jsonl",
        "warm_start__steps": 3,
        "sft__eval_dataset": "warm.jsonl",
        "sft__eval_steps": 2,
        "learner__max_steps": 2,
        "learner__lanes": 2,
        "schedule__parts": 1,
        "schedule__learner_streams": 1,
    }
    alone = write_run(tmp_path, **settings, schedule__generator="thread")
    assert Trainer(alone, tmp_path / "alone").wait() == 0
    others = write_run(tmp_path, **settings, schedule__generator="process", schedule__learner_ranks=2)
    assert Trainer(others, tmp_path / "others").wait() == 0
    assert same_bits(policy_of(tmp_path / "others"), policy_of(tmp_path / "alone"))
    for figure in ("eval_loss", "eval_mean_token_accuracy", "mean_token_accuracy"):
        alone_and_others = [[line.get(figure) for line in lines(tmp_path / name)] for name in ("alone", "others")]
        assert alone_and_others[0] == alone_and_others[1]
        assert alone_and_others[0][1:3] != [None, None]


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_warm_start_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    demo = json.loads((DEMO_CONFIG.parent / "arithmetic.json").read_text())[:40]
    write_jsonl(tmp_path / "warm.jsonl", [{"prompt": row["prompt"], "completion": row["answer"]} for row in demo[:30]])
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": row["prompt"], "completion": row["answer"]} for row in demo])
    settings: dict[str, Any] = {
        "warm_start__path": "warm.jsonl",
        "sft__eval_dataset": "held_out.jsonl",
        "sft__eval_steps": 5,
        "warm_start__steps": STEPS // 2,
        "learner__max_steps": STEPS // 2,
        "schedule__max_staleness": 1,
        "schedule__generator": "thread",
    }
    config = write_run(tmp_path, **settings)
    assert Trainer(config, tmp_path / "whole").wait() == 0
    assert run_and_kill(config, tmp_path / "out", kills=2, seed=1) == 2
    assert same_bits(policy_of(tmp_path / "out"), policy_of(tmp_path / "whole"))
    assert read_store(tmp_path / "out") == read_store(tmp_path / "whole")
    assert len(read_store(tmp_path / "out")["groups"]) == STEPS * P
    measured = [line.get("eval_loss") for line in lines(tmp_path / "out")]
    assert [step for step, loss in enumerate(measured, 1) if loss is not None] == [5, 10, STEPS // 2]
    assert measured == [line.get("eval_loss") for line in lines(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [0, 400])
def test_memory_stays_below_what_was_planned(tmp_path: Path, mlx_waits: None, held_out: int) -> None:
    """Rows of full length."""
    row = {"prompt": "1" * 30, "completion": "2" * 33}
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 8)
    sft = {"eval_dataset": str(write_jsonl(tmp_path / "held_out.jsonl", [row] * held_out))} if held_out else {}
    config = troupe.load_config(
        None,
        [
            {
                "task": "sft",
                "output": str(tmp_path / "run"),
                "model": {"path": str(DEMO_CONFIG.parent / "policy")},
                "data": {"path": str(path)},
                "sft": sft,
                "learner": {"batch_size": 8, "max_steps": 4},
                "metrics": {"sinks": ["jsonl"]},
                "schedule": {"blas_threads": 1, "learner_streams": 1},
            }
        ],
    )
    planned = peak_bytes(prepare(config).memory.phases)
    gc.collect()
    of_others = mx.get_active_memory()  # of tests before this one in the process
    result = troupe.train(config)
    measured = max(column(result.folder, "peak_memory_gb")) * 1e9 - of_others
    assert planned / 4 < measured <= planned
