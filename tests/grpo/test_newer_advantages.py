"""RLOO, MaxRL and pass@k against TRL, hand figures and float64; what has no score, and groups without signal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.fakes import make_prompt, make_rollout
from tests.support.trl import assert_close
from troupe.actors.learner.batch import CompletionLogProbs, assemble
from troupe.actors.learner.scores import has_signal, spread_statistics
from troupe.grpo import LearnerConfig, compute_advantages, grpo_loss, make_batch
from troupe.grpo.config import Advantage, ScaleRewards
from troupe.messages import RolloutGroup, ScoredGroup
from troupe.policy import load_policy

DATA = Path(__file__).parents[1] / "data"
STEPS = json.loads((DATA / "trl" / "steps.json").read_text())
NAN = math.nan


def advantages(rewards: Any, advantage: Advantage, G: int, scale: ScaleRewards | None = None, **more: Any) -> Any:
    return compute_advantages(mx.array(rewards), G, scale, advantage=advantage, **more).tolist()


def tensors_of(step: dict[str, Any]) -> dict[str, np.ndarray]:
    stored = mx.load(str(DATA / "trl" / "steps.safetensors"))
    assert isinstance(stored, dict)
    prefix = f"{step['name']}/"
    return {name.removeprefix(prefix): np.array(x) for name, x in stored.items() if name.startswith(prefix)}


def settings_of(step: dict[str, Any]) -> dict[str, Any]:
    settings = dict(step["settings"])
    if not step["name"].startswith("rloo"):
        return {**settings, "loss_type": "dapo"}
    scale = "batch" if settings.pop("normalize_advantages", False) else "none"
    return {**settings, "loss_type": "rloo", "advantage": "rloo", "scale_rewards": scale}


@pytest.mark.parametrize("step", STEPS["steps"], ids=[step["name"] for step in STEPS["steps"]])
def test_a_step_of_trls_trainers(step: dict[str, Any]) -> None:
    """Advantages, loss and gradients of RLOOTrainer, and of GRPOTrainer with GDPO, on a tiny model."""
    x, config = tensors_of(step), LearnerConfig(**settings_of(step))
    made = compute_advantages(
        mx.array(x["rewards"]),
        STEPS["num_generations"],
        config.scale,
        advantage=config.advantage,
        multi_objective_aggregation=config.multi_objective_aggregation,
    )
    assert_close(np.array(made), x["advantages"], 1e-5)
    policy = load_policy(DATA / "qwen3" / STEPS["model"])
    log_probs_of = CompletionLogProbs(policy.config, 1.0)
    completions = [ids[kept > 0].tolist() for ids, kept in zip(x["completion_ids"], x["completion_mask"], strict=True)]
    batch = make_batch(
        [ids[kept > 0].tolist() for ids, kept in zip(x["prompt_ids"], x["prompt_mask"], strict=True)],
        completions,
        [[0.0] * len(ids) for ids in completions],
        mx.array(x["of_rows"]),
        pad_id=0,
    )
    mask = batch.completion_mask

    def loss(weights: dict[str, mx.array]) -> mx.array:
        log_probs, _ = log_probs_of(weights, batch)
        old = mx.stop_gradient(log_probs)
        if "old_logps" in x:  # TRL's are those of whole completions
            ahead = mx.sum(old * mask, axis=1) - mx.array(x["old_logps"])
            old = old - (ahead / mx.sum(mask, axis=1))[:, None] * mask
        return grpo_loss(log_probs, old, batch.advantages, mask, config)[0]

    value, grads = mx.value_and_grad(loss)(dict(policy.weights))
    assert_close(value.item(), step["loss"], 1e-5)
    assert set(step["norms"]) <= set(grads)
    for name, norm in step["norms"].items():
        assert_close(np.linalg.norm(np.array(grads[name], np.float64)), norm, 1e-5)
    for name in (name.removeprefix("grad/") for name in x if name.startswith("grad/")):
        expected = x[f"grad/{name}"]
        assert_close(np.array(grads[name]), expected, 1e-5, scale=np.abs(expected).max())


def test_by_hand() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0], "rloo", 4) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert advantages([1.0, 0.0, 0.0, 0.0], "maxrl", 4) == pytest.approx([3.0, -1.0, -1.0, -1.0], rel=1e-5)
    assert advantages([3.0, 1.0, 2.0, 1.0], "grpo_passk", 4, "none") == [1.0, 0.0, 0.0, 0.0]
    spread = np.std([3.0, 1.0, 2.0, 1.0], ddof=1)
    assert advantages([3.0, 1.0, 2.0, 1.0], "grpo_passk", 4) == pytest.approx([1 / (spread + 1e-6), 0, 0, 0])
    # a lead among large numbers is not rounded away
    assert advantages(mx.array([1e8, 1e8 + 1, 1e8], mx.float64), "grpo_passk", 3, "none") == pytest.approx([0, 1, 0])
    assert advantages(mx.array([1e8, 1e8 + 1, 1e8 + 2], mx.float64), "rloo", 3) == pytest.approx([-1.5, 0, 1.5])


@pytest.mark.parametrize("advantage", ["rloo", "maxrl", "grpo_passk"])
def test_missing_scores_and_rows_left_out_are_compared_with_nothing(advantage: Advantage) -> None:
    whole = advantages([1.0, 0.5, 0.0, 2.0, 1.0, 0.0], advantage, 3)
    assert any(whole[:3])
    assert any(whole[3:])
    with_gaps = advantages([1.0, NAN, 0.5, 0.0, 2.0, 1.0, 9.0, 0.0], advantage, 4, left_out=[6])
    assert with_gaps == [*whole[:1], 0.0, *whole[1:5], 0.0, *whole[5:]]
    # of several functions those count that are there
    table = [[1.0, NAN], [0.0, 0.5], [NAN, 0.0]]
    assert advantages(table, advantage, 3) == advantages([1.0, 0.5, 0.0], advantage, 3)
    for lone in ([NAN, 3.0, NAN], [NAN, NAN, NAN], [2.0, 2.0, 2.0]):
        assert advantages(lone, advantage, 3) == [0.0, 0.0, 0.0]
    assert advantages([3.0], advantage, 1) == [0.0]


@pytest.mark.parametrize("seed", range(5))
def test_against_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    G, table = 5, rng.random((20, 2)) * 3
    table[rng.random((20, 2)) < 0.3] = NAN
    totals = np.where(np.isnan(table).all(1), NAN, np.nansum(table * [1.0, 0.5], axis=1)).reshape(-1, G)
    loo, best, over = np.zeros_like(totals), np.zeros_like(totals), np.zeros_like(totals)
    for g, row in enumerate(totals):
        there = [i for i in range(G) if not np.isnan(row[i])]
        for i in there:
            others = [row[j] for j in there if j != i]
            loo[g, i] = row[i] - np.mean(others) if others else 0.0
            over[g, i] = (row[i] - np.mean(row[there])) / (np.mean(row[there]) + 1e-6)
        if len(there) > 1:
            ranked = sorted(there, key=lambda i: -row[i])
            best[g, ranked[0]] = (row[ranked[0]] - row[ranked[1]]) / (np.std(row[there], ddof=1) + 1e-6)
    expected: dict[Advantage, np.ndarray] = {"rloo": loo, "maxrl": over, "grpo_passk": best}
    for name, values in expected.items():
        np.testing.assert_allclose(advantages(table, name, G, weights=[1.0, 0.5]), values.reshape(-1), atol=2e-5)


def test_maxrl_says_nothing_of_a_group_whose_mean_is_not_above_zero() -> None:
    assert advantages([-1.0, 0.0, -2.0, 1.0, -1.0, 0.0], "maxrl", 3) == [0.0] * 6


def scored(*scores: float | None, faulted: tuple[int, ...] = ()) -> ScoredGroup:
    rollouts = tuple(make_rollout((5, 6)) for _ in scores)
    return ScoredGroup(
        group=RolloutGroup(prompt=make_prompt(0, 0), rollouts=rollouts), scores={"a": scores}, faulted=faulted
    )


@pytest.mark.parametrize(
    ("advantage", "scores", "faulted", "expected"),
    [
        ("rloo", (1.0, 0.0, 0.0), (), True),
        ("rloo", (1.0, 1.0, 1.0), (), False),
        ("rloo", (1.0, None, None), (), False),
        ("rloo", (1.0, 0.0, 0.0), (0,), False),
        ("maxrl", (1.0, 0.0, 0.0), (), True),
        ("maxrl", (0.0, 0.0, 0.0), (), False),
        ("maxrl", (-1.0, -2.0, 0.0), (), False),
        ("grpo_passk", (2.0, 1.0, 1.0), (), True),
        ("grpo_passk", (2.0, 2.0, 1.0), (), False),
        ("grpo_passk", (2.0, 2.0, 1.0), (0,), True),
    ],
)
def test_groups_without_signal(
    advantage: Advantage, scores: tuple[float | None, ...], faulted: tuple[int, ...], expected: bool
) -> None:
    group, config, weights = scored(*scores, faulted=faulted), LearnerConfig(advantage=advantage), {"a": 1.0}
    assert has_signal(group, config, weights) == expected
    assert spread_statistics([group], config, weights)["frac_reward_zero_std"] == float(not expected)
    made = assemble([group], config, weights=weights, pad_id=0)
    assert any(made.advantages[0]) == expected
    assert made.metrics["frac_reward_zero_std"] == float(not expected)


def test_what_divides_goes_with_the_advantage() -> None:
    scales = {name: LearnerConfig(advantage=name).scale for name in ("grpo", "rloo", "maxrl", "grpo_passk")}
    assert scales == {"grpo": "group", "rloo": "none", "maxrl": "none", "grpo_passk": "group"}
    assert LearnerConfig(scale_rewards="batch").scale == "batch"
    with pytest.raises(ValueError, match='scale_rewards is "group", but advantage = "rloo"'):
        advantages([1.0, 0.0], "rloo", 2, "group")
    with pytest.raises(ValueError, match="multi_objective_aggregation"):
        advantages([1.0, 0.0], "maxrl", 2, multi_objective_aggregation="normalize_then_sum")
