"""Values that came out wrong: scores that a fault took, spreads under the wrong name, groups of one."""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.cases.cases import copy_case, expected_of
from tests.support.fakes import make_scored, tiny_config
from tests.support.runs import call, done, refused
from troupe.actors.learner.gathering import is_usable
from troupe.actors.learner.scores import (
    advantages_of,
    group_statistics,
    has_signal,
    spread_statistics,
    weighted_rewards,
)
from troupe.checkpoint.read import read_unfinished
from troupe.checkpoint.write import encode_unfinished
from troupe.errors import RewardError
from troupe.grpo import LearnerConfig
from troupe.messages import Unfinished
from troupe.records.sinks.display_lines import shown_metrics
from troupe.rewards import RewardActor, RewardManager, RewardSample, RewardsConfig, batch_reward, load_reward

pytestmark = pytest.mark.anyio

PARTIAL = "partial-score-counts-as-zero"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line and "reward" in line]


def run_case(folder: Path, *options: str) -> Path:
    """`troupe train` on a case's prompts with the demo's policy → the run's folder."""
    done("train", "-d", folder / "prompts.json", "-o", folder / "o", *options)
    return folder / "o"


def test_a_score_that_a_fault_took_gives_no_advantage(tmp_path: Path) -> None:
    folder = copy_case(PARTIAL, tmp_path)
    rewards = str(folder / "rewards.py")
    options = ["--reward", f"{rewards}:base", "--reward", f"{rewards}:Judge", "--max-steps", "1", "--batch-size", "2"]
    run = run_case(folder, *options, "--set", "generation.max_completion_length=8")
    right = {name: float(text.split(" ")[0]) for name, text in expected_of(PARTIAL).items()}
    with sqlite3.connect(run / "run.sqlite") as store:
        rows = store.execute(
            "SELECT sample, reward, advantage, scores FROM completions ORDER BY gid, sample"
        ).fetchall()
    store.close()
    assert len(rows) == 2 * 8
    for sample, reward, advantage, scores in rows:
        faulted = sample == 2
        assert advantage == right["advantage of sample 2" if faulted else "advantages of the others"]
        assert reward == (None if faulted else 2.0)
        assert json.loads(scores) == {"base": 1.0, "judge": None if faulted else 1.0}
    [metrics] = metrics_of(run)
    assert (metrics["reward"], metrics["reward_std"], metrics["rewards/base/mean"]) == (2.0, 0.0, 1.0)
    assert metrics["frac_reward_zero_std"] == 1.0


class Judge(RewardActor):
    """Of the second completion it says nothing, and that of the third it cannot judge."""

    name, retries = "judge", 0

    def __init__(self, third: Any) -> None:
        self.third = third

    async def score(self, sample: RewardSample) -> float | None:
        if sample.index == 2 and isinstance(self.third, Exception):
            raise self.third
        return [1.0, None, self.third, 3.0][sample.index]  # type: ignore[no-any-return]


def base(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize("third", [ValueError("no judge"), math.nan, math.inf, 1e30])
async def test_what_a_reward_says_nothing_about_is_no_fault(third: Any) -> None:
    async with RewardManager([base, Judge(third)]) as manager:
        found = await manager.compute_rewards(["p"] * 4, ["a", "b", "c", "d"])
    assert found.scores == {"base": (1.0,) * 4, "judge": (1.0, None, None, 3.0)}
    assert found.rewards == (2.0, 1.0, None, 4.0)
    assert found.faulted == (2,)


async def test_a_function_that_fails_takes_all_and_its_none_takes_nothing() -> None:
    def fails(completions: list[str]) -> list[float]:
        raise ValueError

    def silent(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    config = RewardsConfig(retries=0)
    failed = await RewardManager([base, fails], config=config).compute_rewards(["p"] * 2, ["a", "b"])
    assert (failed.rewards, failed.faulted) == ((None, None), (0, 1))
    quiet = await RewardManager([base, silent], config=config).compute_rewards(["p"] * 2, ["a", "b"])
    assert (quiet.rewards, quiet.faulted) == ((1.0, 1.0), ())


async def test_of_a_call_for_a_whole_step_each_group_has_its_own_faults() -> None:
    @batch_reward
    def odd(completions: list[str], **_: Any) -> list[float | None]:
        return [None, 1.0, math.nan, 1.0, math.nan, 0.0]

    groups = [make_scored(0, place).group for place in range(2)]
    found = await RewardManager([odd]).score_groups(groups)
    assert [scores.faulted for scores in found] == [(2,), (1,)]


async def test_samples_that_kill_a_process_are_faults_and_their_neighbours_are_not() -> None:
    acts = load_reward("tests.rewards.process_rewards:acts")
    config = RewardsConfig(run=("process", "auto"), processes=1, retries=0)
    async with RewardManager([acts, base], config=config) as manager:
        found = await manager.compute_rewards(["p"] * 3, ["1", "exit", "2"])
    assert found.faulted == (1,)
    assert found.rewards[1] is None
    assert None not in (found.rewards[0], found.rewards[2])


SCORES = {"a": (1.0, 2.0, 9.0, 4.0), "b": (0.0, None, None, 1.0)}
WEIGHTS = {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_others_are_compared_without_it(scale: Any, aggregation: Any) -> None:
    config = LearnerConfig(scale_rewards=scale, multi_objective_aggregation=aggregation)
    bare = make_scored(0, 0, (0.0,) * 4)
    group = msgspec.structs.replace(bare, scores=SCORES, faulted=(2,))
    unseen = {name: (*scores[:2], None, scores[3]) for name, scores in SCORES.items()}
    right = advantages_of([msgspec.structs.replace(bare, scores=unseen)], config, WEIGHTS).tolist()
    assert advantages_of([group], config, WEIGHTS).tolist() == right
    assert right[2] == 0.0  # type: ignore[index]
    assert any(right)  # type: ignore[arg-type]
    assert weighted_rewards(group, WEIGHTS) == (1.0, 2.0, None, 6.0)
    found = group_statistics([group], config, WEIGHTS)
    assert found["reward"] == pytest.approx(3.0)
    assert found["rewards/a/mean"] == pytest.approx(4.0), "a score that is there is one of its function"
    alone = msgspec.structs.replace(bare, scores={"a": (1.0, 1.0, 9.0, 1.0)}, faulted=(2,))
    assert not has_signal(alone, config, {"a": 1.0})
    assert spread_statistics([alone], config, {"a": 1.0})["frac_reward_zero_std"] == 1.0


def test_it_does_not_count_among_those_that_have_a_score() -> None:
    group = msgspec.structs.replace(make_scored(0, 0, (1.0, 2.0, None)), faulted=(1,))
    assert is_usable(group, 1)
    assert not is_usable(group, 2)


def test_what_a_fault_took_is_known_after_a_resume(tmp_path: Path) -> None:
    group = msgspec.structs.replace(make_scored(0, 0, (1.0, 2.0, 3.0)), faulted=(1,))
    file = tmp_path / "unfinished.msgpack"
    file.write_bytes(encode_unfinished(Unfinished(scored=(group,), collected=(group,))))
    loaded = read_unfinished(file)
    assert [kept.faulted for kept in (*loaded.scored, *loaded.collected)] == [(1,), (1,)]
    raw = msgspec.msgpack.decode(file.read_bytes())
    del raw["scored"][0]["faulted"]  # as the version before wrote it
    file.write_bytes(msgspec.msgpack.encode(raw))
    assert read_unfinished(file).scored[0].faulted == ()


RESULTS: list[tuple[Any, Any]] = [
    ([1, 2.5], (1.0, 2.5)),
    ((True, None), (1.0, None)),
    ([mx.array(0.5), mx.array([2.0])], (0.5, 2.0)),
    (mx.array([0.5, 1.5]) * 2, (1.0, 3.0)),
    (mx.array([[1.0], [2.0]]), (1.0, 2.0)),
    ([1.0], "returned 1 scores for 2 completions"),
    ([1.0, 2.0, 3.0], "returned 3 scores for 2 completions"),
    (1.0, "return a list of 2 numbers or None"),
    (mx.array(1.0), "return a list of 2 numbers or None"),
    (None, "return a list of 2 numbers or None"),
    ("12", "return a list of 2 numbers or None"),
    ({"a": 1.0, "b": 2.0}, "return a list of 2 numbers or None"),
    ({1.0, 2.0}, "return a list of 2 numbers or None"),
    (iter([1.0, 2.0]), "return a list of 2 numbers or None"),
    (["1", "2"], "a score is a number or None"),
    ([[1.0], [2.0]], "a score is a number or None"),
    ([{}, 1.0], "a score is a number or None"),
    ([1j, 1.0], "a score is a number or None"),
    (mx.array([[1.0, 2.0], [3.0, 4.0]]), "a score is a number or None"),
]


@pytest.mark.parametrize(("result", "right"), RESULTS, ids=[str(place) for place in range(len(RESULTS))])
async def test_what_a_reward_returns_is_a_score_for_each_or_refused(result: Any, right: Any) -> None:
    def returns(completions: list[str]) -> Any:
        return result

    returns.quick = True  # type: ignore[attr-defined]
    scored = RewardManager([returns]).compute_rewards(["p"] * 2, ["a", "b"])
    if isinstance(right, tuple):
        assert (await scored).scores == {"returns": right}
    else:
        with pytest.raises(RewardError, match=re.escape(right)):
            await scored


LABEL = "reward-std-label"


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_both_spreads_are_measured_each_under_its_own_name(tmp_path: Path, scale: str) -> None:
    folder = copy_case(LABEL, tmp_path)
    options = ["--reward", f"{folder / 'rewards.py'}:by_prompt", "--batch-size", "4", "--max-steps", "2"]
    run = run_case(
        folder, *options, "--set", "generation.max_completion_length=6", "--set", f"learner.scale_rewards={scale}"
    )
    right = expected_of(LABEL)
    metrics = metrics_of(run)
    assert [step["reward_std_within_groups"] for step in metrics] == [right["mean std within groups"]] * 2
    assert round(metrics[-1]["reward_std"], 3) == right["std over the batch"]
    assert [step["frac_reward_zero_std"] for step in metrics] == [step["advantages/frac_zero"] for step in metrics]
    assert metrics[-1]["frac_reward_zero_std"] == 1.0


def test_no_label_says_of_the_one_what_the_other_is() -> None:
    found = dict(shown_metrics({"reward_std": 0.842, "reward_std_within_groups": 0.0}))
    assert found == {"± within group": "0.000", "± over the batch": "0.842"}
    [(label, value)] = shown_metrics({"reward_std": expected_of(LABEL)["shown as within group"]})
    assert (label, value) == ("± over the batch", "0.842")


ONE = "one-completion-a-group"


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("min_scored", ["1", "2"])
def test_one_completion_a_group_is_refused(tmp_path: Path, scale: str, min_scored: str) -> None:
    folder = copy_case(ONE, tmp_path)
    command = ["train", "-d", f"{folder}/prompts.json", "-o", f"{folder}/o", "--num-generations", "1"]
    command += ["--max-steps", "2", "--reward", f"{folder}/rewards.py:length"]
    result = call(*command, "--set", f"learner.scale_rewards={scale}", "--set", f"rewards.min_scored={min_scored}")
    assert result.exit_code == expected_of(ONE)["exit_code"]
    assert "generation.num_generations is 1, but advantages compare the completions" in result.output
    assert "min_scored" not in result.output
    assert not (folder / "o").exists()


def test_a_resume_with_one_completion_a_group_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, learner__scale_rewards="none", learner__max_steps=1)
    run = troupe.train(config, [base]).folder
    command = ["train", "-o", run, "--resume", "--max-steps", "2", "--num-generations", "1"]
    message = refused(*command, "--allow-change", "generation.num_generations")
    assert "generation.num_generations is 1, but advantages compare the completions" in message


FREE = "free-process-stale"


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_free_run_with_a_process_trains_on_what_is_as_old_as_may_be(tmp_path: Path, staleness: int) -> None:
    command = [sys.executable, "-m", "troupe", "train", "-o", str(tmp_path / "o"), "--max-steps", "30"]
    for setting in ("mode=free", f"max_staleness={staleness}", "generator=process"):
        command += ["--set", f"schedule.{setting}"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ})
    steps = metrics_of(tmp_path / "o")
    right = expected_of(FREE)
    assert len(steps) == 30
    assert sum(step["groups/stale"] for step in steps) == right["stale groups"]
    assert sum(step["groups/trained"] == 0 for step in steps) == right["steps that trained nothing"]
    assert max(step["staleness/max"] for step in steps) <= staleness


def logs_what_it_likes(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    """Lazy arrays, objects that raise, and names of every kind."""

    class Mute:
        def __str__(self) -> str:
            raise SystemExit(3)

    z = mx.arange(len(completions)) / 4
    log_extra("z", list(z - z.mean()))
    log_extra("o", [Mute()] * len(completions))
    log_extra(("a", 1), completions)
    for name in (None, ("a",), 3, "half \ud800", "mean z"):
        log_metric(name, z.mean())
    return [float(len(c)) for c in completions]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["auto", "process"])
def test_what_a_reward_logs_costs_no_checkpoint_and_no_step(tmp_path: Path, tiny_model: Path, run: str) -> None:
    config = tiny_config(
        tiny_model,
        tmp_path,
        checkpoint__every=1,
        schedule__max_staleness=1,
        metrics__sinks=["jsonl", "sqlite"],
        rewards__functions=["tests.cases.test_values:logs_what_it_likes"],
        rewards__run=[run],
        rewards__retries=0,
    )
    result = troupe.train(config)
    assert result.steps == 4
    assert result.closed_groups == {"trained": 8}
    assert set(result.incidents) == {"reward_log"}
    assert len(list(Path(result.folder, "checkpoints").iterdir())) == 4
    with sqlite3.connect(Path(result.folder, "run.sqlite")) as store:
        extras = [json.loads(extra) for (extra,) in store.execute("SELECT extra FROM completions ORDER BY gid, sample")]
    store.close()
    assert extras == [{"z": z, "o": None} for z in (-0.25, 0.0, 0.25)] * 8
    for step in metrics_of(Path(result.folder)):
        assert step["mean z"] == step["half \\ud800"] == 0.25
