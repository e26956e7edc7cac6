"""Schedules: what repeats, how old the weights are that wrote a completion, and that no prompt is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.fakes import delayed, often_equal, same_bits, weigh_ids
from tests.support.runs import column, completions, done, in_store, lines, policy_of, timeless, train


def learned(run: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, without those of clocks."""
    return [timeless(line) for line in lines(run)]


def test_training_twice_with_one_seed_gives_one_policy(desk: Path) -> None:
    flags = ("-m", "m", "-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--max-steps", "3")
    more = ("--lr", "0.01", "--reward", "length", "--reward", "diversity", "--seed", "5")
    for out in ("one", "two"):
        done("train", *flags, *more, "--set", "generation.max_completion_length=12", "-o", out)
    assert (desk / "one/final/model.safetensors").read_bytes() == (desk / "two/final/model.safetensors").read_bytes()
    assert learned("one") == learned("two")
    assert completions("one") == completions("two")


def test_another_seed_writes_something_else(tmp_path: Path, ragged_model: Path) -> None:
    one, two = (completions(train(ragged_model, tmp_path / str(seed), seed=seed).folder) for seed in (0, 1))
    assert {c.text for c in one} != {c.text for c in two}


def test_slow_and_fast_rewards_lead_to_the_same_run(tmp_path: Path, ragged_model: Path) -> None:
    settings = {"schedule__max_staleness": 1, "learner__max_steps": 5}
    fast = train(ragged_model, tmp_path / "fast", weigh_ids, **settings)
    slow = train(ragged_model, tmp_path / "slow", delayed(7, most_s=0.03), **settings)
    assert same_bits(policy_of(fast.folder), policy_of(slow.folder))
    assert learned(fast.folder) == learned(slow.folder)
    assert completions(fast.folder) == completions(slow.folder)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_token_is_of_the_policy_that_the_schedule_says(
    tmp_path: Path, ragged_model: Path, staleness: int
) -> None:
    result = train(ragged_model, tmp_path, schedule__max_staleness=staleness, learner__max_steps=5)
    for c in completions(result.folder):
        assert c.versions == [(max(0, c.slot_step - staleness), len(c.token_ids))]
    assert column(result.folder, "staleness") == [min(step, staleness) for step in range(5)]
    assert column(result.folder, "staleness/max") == column(result.folder, "staleness")


def test_on_policy_learner_and_sampler_agree_on_every_token_and_with_staleness_they_part(
    tmp_path: Path, ragged_model: Path
) -> None:
    name = "sampling/sampling_logp_difference/max"
    on = column(train(ragged_model, tmp_path / "on").folder, name)
    assert max(on) < 1e-4
    off = column(train(ragged_model, tmp_path / "off", schedule__max_staleness=1).folder, name)
    assert off[0] < 1e-4
    assert min(off[1:]) > 1e-3


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_generator_in_a_process_of_its_own_writes_the_same(
    tmp_path: Path, ragged_model: Path, staleness: int
) -> None:
    settings = {"schedule__max_staleness": staleness, "learner__max_steps": 3}
    thread = train(ragged_model, tmp_path / "thread", **settings)
    process = train(ragged_model, tmp_path / "process", schedule__generator="process", **settings)
    assert same_bits(policy_of(thread.folder), policy_of(process.folder))
    assert completions(thread.folder) == completions(process.folder)


@pytest.mark.parametrize("on_stale", ["drop", "requeue", "correct"])
def test_a_free_run_prompts_every_place_and_ends_every_group_once(
    tmp_path: Path, ragged_model: Path, on_stale: str
) -> None:
    settings = {"schedule__mode": "free", "schedule__max_staleness": 1, "schedule__on_stale": on_stale}
    result = train(ragged_model, tmp_path, delayed(3, most_s=0.02), **settings, learner__max_steps=6)
    assert result.complete
    found = in_store(result.folder, "SELECT slot_step, place, attempt, state FROM groups")
    assert {(step, place) for step, place, _, _ in found} == {(step, place) for step in range(6) for place in range(2)}
    assert max(Counter((step, place, attempt) for step, place, attempt, _ in found).values()) == 1
    assert Counter(state for *_, state in found) == Counter(result.closed_groups)
    assert all(value <= 1 for value in column(result.folder, "staleness/max")) or on_stale == "correct"


def test_a_free_run_does_not_wait_for_the_slowest_group(tmp_path: Path, ragged_model: Path) -> None:
    """The first group's score comes when two steps have been made without it; pinned, the run would stand still."""
    seen: list[int] = []
    later = anyio.Event()

    async def first_waits(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        if len(seen) == 1:
            await later.wait()
        elif len(seen) == 7:
            later.set()
        return weigh_ids(completion_ids)

    settings = {"schedule__mode": "free", "schedule__max_staleness": 4, "learner__max_steps": 5}
    result = train(ragged_model, tmp_path, first_waits, **settings)
    assert result.complete
    [(step, slot_step)] = in_store(result.folder, "SELECT step, slot_step FROM groups WHERE gid = 0")
    assert slot_step == 0
    assert step >= 2


@pytest.mark.slow
def test_replacing_groups_without_signal_is_the_same_in_a_process_and_with_delays(
    tmp_path: Path, ragged_model: Path
) -> None:
    settings = {"learner__dynamic_sampling": True, "schedule__max_staleness": 1, "learner__max_steps": 3}
    here = train(ragged_model, tmp_path / "here", often_equal, **settings)
    there = train(
        ragged_model,
        tmp_path / "there",
        delayed(5, most_s=0.02, reward=often_equal),
        schedule__generator="process",
        **settings,
    )
    assert here.closed_groups["filtered"] > 0
    assert here.closed_groups == there.closed_groups
    assert same_bits(policy_of(here.folder), policy_of(there.folder))


def test_what_was_written_does_not_depend_on_how_many_steps_the_run_will_have(
    tmp_path: Path, ragged_model: Path
) -> None:
    settings = {"learner__lr_scheduler": "constant"}
    short = train(ragged_model, tmp_path / "short", learner__max_steps=2, **settings)
    long = train(ragged_model, tmp_path / "long", learner__max_steps=4, **settings)
    assert completions(short.folder) == [c for c in completions(long.folder) if c.step <= 2]
