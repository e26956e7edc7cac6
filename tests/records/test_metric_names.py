"""What `checkpoint.metric_for_best` may name is known before work, and is what a step really has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import tiny_config
from troupe import train
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.errors import ConfigError
from troupe.records.figures import OF_EVERY_STEP
from troupe.records.metric_names import check_metric, known_metrics
from troupe.rewards import RewardActor, RewardSample
from troupe.run.prepare import prepare


def plain(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def catch_all(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def logging(completions: list[str], log_metric: Any) -> list[float]:
    log_metric("share", 0.5)
    return [float(place) for place in range(len(completions))]


class Judge(RewardActor):
    async def score(self, sample: RewardSample) -> float:
        return 0.0


@pytest.mark.parametrize(
    "learner",
    [
        {"beta": 0.1},
        {"loss_type": "cispo"},
        {"loss_type": "clip_cov", "advantage": "rloo"},
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        {"use_adaptive_entropy": True, "entropy_coef": 0.01},
    ],
    ids=str,
)
def test_the_list_is_what_checkpoints_are_judged_by(tiny_model: Path, tmp_path: Path, learner: dict[str, Any]) -> None:
    settings = {f"learner__{name}": value for name, value in learner.items()}
    config = tiny_config(tiny_model, tmp_path, learner__max_steps=1, **settings)
    train(config, [logging])
    stored = load_checkpoint(list_checkpoints(Path(str(config.output)))[0]).state.metrics
    names = prepare(config, [logging], resume=True).inputs.rewards.names
    assert set(OF_EVERY_STEP) <= set(stored)
    assert set(stored) - {"share"} <= set(known_metrics(names))
    assert check_metric("share", names, [logging]) is not None


@pytest.mark.parametrize("metric", ["reward", "kl", "rewards/plain/mean", "completions/mean_length", "epoch"])
def test_what_is_known_is_taken_silently(metric: str) -> None:
    assert check_metric(metric, ["plain"], [plain]) is None


@pytest.mark.parametrize(
    ("metric", "reward", "message"),
    [
        ("rewrad", catch_all, r"^checkpoint.metric_for_best is 'rewrad', which no step has; did you mean reward"),
        ("rewards/plian/mean", plain, r"did you mean rewards/plain/mean"),
        ("rewards/other/mean", catch_all, r"which no step has; did you mean rewards/plain/mean"),
        ("completions/mean_len", logging, r"did you mean completions/mean_length"),
        ("time/learner/busy", plain, r"which no step has; there are reward, reward_std_within_groups, "),
        ("accuracy", plain, r"which no step has; there are reward, "),
        ("accuracy", Judge(), r"which no step has; there are reward, "),
        ("eval_reward", catch_all, r"did you mean reward"),
    ],
)
def test_what_no_step_has_is_refused_with_the_nearest(metric: str, reward: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metric(metric, ["plain"], [reward])


@pytest.mark.parametrize(("metric", "reward"), [("accuracy", catch_all), ("my_reward", logging), ("share", logging)])
def test_what_a_reward_may_log_is_taken_and_told(metric: str, reward: Any) -> None:
    told = check_metric(metric, ["plain"], [reward])
    assert told is not None
    assert "unless a reward logs it" in told


def test_it_is_refused_before_work_but_not_of_a_run_that_always_had_it(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, learner__max_steps=1, checkpoint__metric_for_best="rewrad")
    with pytest.raises(ConfigError, match="did you mean reward"):
        prepare(config)
    assert not Path(str(config.output)).exists()
    unused = tiny_config(
        tiny_model,
        tmp_path,
        learner__max_steps=1,
        checkpoint__metric_for_best="rewrad",
        checkpoint__keep_best=False,
    )
    train(unused)
    stored = Path(str(unused.output)) / "run.toml"
    stored.write_text(stored.read_text().replace("keep_best = false", "keep_best = true"))  # by an earlier Troupe
    assert any("no checkpoint is the best" in notice for notice in prepare(config, resume=True).notices)
