"""What each learning option does to a run: to its policy, its metrics, and the advantages in its store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from tests.support.fakes import often_equal, ones, same_bits, weigh_ids
from tests.support.runs import column, completions, distance, lines, policy_of, train
from troupe.grpo.config import LossType
from troupe.policy import Weights, load_policy
from troupe.records.store.completions import StoredCompletion

TWICE = {"learner__num_iterations": 2, "learner__max_steps": 2}
"""Enough for ratios other than 1, on which the loss types differ."""


@pytest.fixture(scope="module")
def untrained(ragged_model: Path) -> Weights:
    return load_policy(ragged_model).weights


@pytest.fixture(scope="module")
def by_loss(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> dict[str, Path]:
    """Loss type → a run of it, all else equal."""
    folder = tmp_path_factory.mktemp("losses")
    runs = {}
    for loss_type in get_args(LossType):
        result = train(ragged_model, folder / loss_type, learner__loss_type=loss_type, **TWICE)
        runs[loss_type] = Path(result.folder)
    return runs


OF_ITS_OWN = {"cispo": "cispo_clip_ratio", "vespo": "vespo/phi_seq_mean"}
"""Loss type → the metric that only it has; the others tell of clipping, but for SAPO, which has a soft gate."""


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_every_loss_type_teaches_something_and_tells_of_its_own_clipping(
    by_loss: dict[str, Path], untrained: Weights, loss_type: str
) -> None:
    run = by_loss[loss_type]
    for line in lines(run):
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert ("clip_ratio/region_mean" in line) == (loss_type not in ("cispo", "sapo", "vespo", "kl_cov"))
        assert ("covariance/chosen" in line) == (loss_type in ("clip_cov", "kl_cov"))
        for owner, name in OF_ITS_OWN.items():
            assert (name in line) == (owner == loss_type)
    assert 0 < distance(policy_of(run), untrained) < 10


def test_loss_types_lead_to_different_policies(by_loss: dict[str, Path]) -> None:
    """But for these two, which differ where a batch is spread over several machines."""
    policies = {name: policy_of(run) for name, run in by_loss.items()}
    equal = [(a, b) for a in policies for b in policies if a < b and same_bits(policies[a], policies[b])]
    assert equal == [("bnpo", "dapo")]


def test_all_loss_types_begin_with_the_same_completions(by_loss: dict[str, Path]) -> None:
    first = {tuple(tuple(c.token_ids) for c in completions(run, step=1)) for run in by_loss.values()}
    assert len(first) == 1


def groups(run: str | Path) -> Iterator[list[StoredCompletion]]:
    """The completions of each trained group."""
    by_gid: dict[int, list[StoredCompletion]] = {}
    for c in completions(run, state="trained"):
        by_gid.setdefault(c.gid, []).append(c)
    yield from by_gid.values()


def rewards(group: list[StoredCompletion]) -> np.ndarray:
    return np.array([c.reward for c in group], dtype=np.float64)


def advantages(group: list[StoredCompletion]) -> np.ndarray:
    return np.array([c.advantage for c in group], dtype=np.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_in_the_store_follow_from_the_rewards_in_the_store(
    tmp_path: Path, ragged_model: Path, scale: str
) -> None:
    result = train(ragged_model, tmp_path, learner__scale_rewards=scale)
    batches: dict[int, list[list[StoredCompletion]]] = {}
    for group in groups(result.folder):
        batches.setdefault(group[0].step, []).append(group)
    assert len(batches) == 4
    for batch in batches.values():
        of_batch = np.std(np.concatenate([rewards(group) for group in batch]), ddof=1)
        for group in batch:
            r = rewards(group)
            divisor = {"group": np.std(r, ddof=1) + 1e-4, "batch": of_batch + 1e-4, "none": 1.0}[scale]
            assert advantages(group) == pytest.approx((r - r.mean()) / divisor, abs=1e-4)


@pytest.mark.parametrize("advantage", ["rloo", "maxrl", "grpo_passk"])
def test_other_advantages_in_the_store_follow_from_the_rewards_in_the_store(
    tmp_path: Path, ragged_model: Path, advantage: str
) -> None:
    result = train(ragged_model, tmp_path, learner__advantage=advantage, learner__dynamic_sampling=True)
    found = list(groups(result.folder))
    assert found
    for group in found:
        r = rewards(group)
        first, second = np.sort(r)[[-1, -2]]
        expected = {
            "rloo": (r - r.mean()) * len(r) / (len(r) - 1),
            "maxrl": (r - r.mean()) / (r.mean() + 1e-6),
            "grpo_passk": np.where(r == first, (first - second) / (r.std(ddof=1) + 1e-6), 0.0),
        }[advantage]
        assert advantages(group) == pytest.approx(expected, abs=1e-3)
        assert any(advantages(group))  # those without signal were sampled anew


def test_rewards_normalized_one_by_one_count_alike_however_large_they_are(tmp_path: Path, ragged_model: Path) -> None:
    def huge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1000.0 * (len(ids) % 3) for ids in completion_ids]

    settings = {"learner__multi_objective_aggregation": "normalize_then_sum", "learner__max_steps": 2}
    run = train(ragged_model, tmp_path, weigh_ids, huge, **settings).folder
    for step in (1, 2):
        batch = [group for group in groups(run) if group[0].step == step]
        totals = []
        for group in batch:
            table = np.array([[c.scores["weigh_ids"], c.scores["huge"]] for c in group], dtype=np.float64)
            spread = table.std(axis=0, ddof=1)
            totals.append(((table - table.mean(axis=0)) / (spread + 1e-4)).sum(axis=1))
        flat = np.concatenate(totals)
        expected = (flat - flat.mean()) / (flat.std(ddof=1) + 1e-4)
        assert np.concatenate([advantages(group) for group in batch]) == pytest.approx(expected, abs=2e-3)


def test_a_policy_learns_to_write_what_is_rewarded(tmp_path: Path, tiny_model: Path) -> None:
    def lower(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(97 <= token < 123 for token in ids) / len(ids) for ids in completion_ids]

    settings = {"learner__max_steps": 20, "learner__lr_scheduler": "constant", "generation__num_generations": 8}
    result = train(tiny_model, tmp_path, lower, **settings)
    told = column(result.folder, "reward")
    assert np.mean(told[:3]) < 0.3
    assert np.mean(told[-3:]) > np.mean(told[:3]) + 0.3


def test_without_beta_there_is_no_kl_and_with_it_the_first_step_is_at_the_reference(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    run = train(ragged_model, tmp_path, learner__beta=0.1).folder
    kl = column(run, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert all(value > 1e-4 for value in kl[1:])
    assert "kl" not in lines(plain)[0]
    assert not same_bits(policy_of(run), policy_of(plain))


FOLLOWS = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}


@pytest.mark.parametrize(
    ("option", "values", "others", "metric", "factor"),
    [
        pytest.param(
            *("beta", (10.0, 0.001), {"lr_scheduler": "constant", "max_steps": 8}, "kl", 0.5), marks=pytest.mark.slow
        ),
        pytest.param(
            *("ref_model_mixup_alpha", (0.5, 0.0), {"max_steps": 6, **FOLLOWS}, "kl", 1.0), marks=pytest.mark.slow
        ),
        ("entropy_coef", (-0.5, 0.5), {"lr_scheduler": "constant", "max_steps": 6}, "entropy", 0.98),
    ],
    ids=["a strong beta keeps near", "a reference halfway lies between", "a bonus keeps open"],
)
def test_an_option_moves_what_it_is_for(
    tmp_path: Path,
    ragged_model: Path,
    option: str,
    values: tuple[float, float],
    others: dict[str, Any],
    metric: str,
    factor: float,
) -> None:
    settings = {f"learner__{name}": value for name, value in others.items()}
    less, more = (
        column(train(ragged_model, tmp_path / str(value), **settings, **{f"learner__{option}": value}).folder, metric)
        for value in values
    )
    assert 0 < less[-1] < factor * more[-1]


def test_a_reference_that_follows_every_step_is_the_policy_itself(tmp_path: Path, ragged_model: Path) -> None:
    follow = {f"learner__{name}": value for name, value in FOLLOWS.items()}
    result = train(ragged_model, tmp_path, learner__ref_model_mixup_alpha=1.0, **follow)
    assert column(result.folder, "kl") == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_batch_trained_on_twice_moves_the_policy_further_and_leaves_the_ratio_of_1(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    run = train(ragged_model, tmp_path, learner__num_iterations=2, learner__epsilon=0.001).folder
    once, twice = lines(plain), lines(run)
    assert len(once) == len(twice) == 4
    assert once[0]["clip_ratio/region_mean"] == 0.0, "the policy that learns is the one that wrote"
    assert twice[0]["clip_ratio/region_mean"] > 0.0
    assert completions(plain, step=1) == completions(run, step=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param("gradient_accumulation_steps", 2, marks=pytest.mark.slow),
        ("gradient_accumulation_steps", 6),
        ("gradient_checkpointing", True),
    ],
)
def test_what_saves_memory_does_not_change_what_is_learned(
    tmp_path: Path, ragged_model: Path, plain: Path, untrained: Weights, option: str, value: Any
) -> None:
    run = train(ragged_model, tmp_path, **{f"learner__{option}": value}).folder
    assert distance(policy_of(run), policy_of(plain)) < 1e-3 * distance(policy_of(plain), untrained)
    assert column(run, "loss") == pytest.approx(column(plain, "loss"), abs=1e-5)
    assert [c.token_ids for c in completions(run)] == [c.token_ids for c in completions(plain)]


def test_dynamic_sampling_trains_only_on_groups_that_differ(tmp_path: Path, ragged_model: Path) -> None:
    result = train(ragged_model, tmp_path, often_equal, learner__dynamic_sampling=True, learner__max_steps=5)
    assert result.closed_groups["filtered"] >= 1
    for c in completions(result.folder):
        assert (c.advantage is None) == (c.state == "filtered")
    for group in groups(result.folder):
        assert any(advantages(group) != 0.0)
    told = lines(result.folder)
    assert sum(line["groups/filtered"] for line in told) == result.closed_groups["filtered"]
    assert sum(line["groups/trained"] for line in told) == result.closed_groups["trained"]
    replaced = [c for c in completions(result.folder) if c.attempt > 0]
    assert replaced, "another prompt in the place of one that taught nothing"


def test_completions_that_were_cut_off_can_be_left_out_of_the_loss(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"generation__logit_bias": {256: -100.0}, "learner__max_steps": 2}
    masked = train(tiny_model, tmp_path / "masked", learner__mask_truncated_completions=True, **settings).folder
    assert column(masked, "completions/clipped_ratio") == [1.0, 1.0]
    assert same_bits(policy_of(masked), load_policy(tiny_model).weights), "all were cut off, so nothing is left"
    assert column(masked, "loss") == [0.0, 0.0]
    counted = train(tiny_model, tmp_path / "counted", **settings).folder
    assert not same_bits(policy_of(counted), load_policy(tiny_model).weights)


def test_an_entropy_weight_that_adapts_rises_where_the_entropy_is_too_low(tmp_path: Path, ragged_model: Path) -> None:
    settings = {"learner__use_adaptive_entropy": True, "learner__entropy_coef_delta": 0.01}
    high = train(ragged_model, tmp_path / "high", learner__entropy_target=100.0, **settings).folder
    assert column(high, "entropy_coef") == pytest.approx([0.01, 0.02, 0.03, 0.04])
    low = train(ragged_model, tmp_path / "low", learner__entropy_target=0.0, **settings).folder
    assert column(low, "entropy_coef") == pytest.approx([0.0] * 4)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.0, 0.005, 0.01, 0.01, 0.01, 0.01]),
        ("linear", [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]),
        ("cosine", [0.0, 0.005, 0.01, 0.01 * (1 + math.sqrt(0.5)) / 2, 0.005, 0.01 * (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_scheduled(
    tmp_path: Path, tiny_model: Path, scheduler: str, rates: list[float]
) -> None:
    settings = {"learner__lr_scheduler": scheduler, "learner__warmup_steps": 2, "learner__max_steps": 6}
    result = train(tiny_model, tmp_path, generation__max_completion_length=3, **settings)
    assert column(result.folder, "learning_rate") == pytest.approx(rates)


def test_a_learning_rate_of_0_watches_and_learns_nothing(
    tmp_path: Path, ragged_model: Path, untrained: Weights
) -> None:
    result = train(ragged_model, tmp_path, learner__lr=0.0)
    assert same_bits(policy_of(result.folder), untrained)
    assert all(norm > 0 for norm in column(result.folder, "grad_norm"))


def test_weight_decay_makes_matrices_smaller_and_leaves_norms_alone(
    tmp_path: Path, ragged_model: Path, untrained: Weights
) -> None:
    settings = {"learner__weight_decay": 0.5, "learner__lr": 0.01, "learner__lr_scheduler": "constant"}
    trained = policy_of(train(ragged_model, tmp_path, ones, **settings).folder)
    left = (1 - 0.01 * 0.5) ** 4
    for name, weight in untrained.items():
        expected = weight * left if weight.ndim > 1 else weight
        assert mx.allclose(trained[name], expected, rtol=1e-4, atol=1e-6).item(), name


def test_ratios_of_whole_completions_teach_otherwise_than_those_of_tokens(tmp_path: Path, ragged_model: Path) -> None:
    tokens = train(ragged_model, tmp_path / "token", **TWICE).folder
    whole = train(ragged_model, tmp_path / "sequence", learner__importance_sampling_level="sequence", **TWICE).folder
    assert not same_bits(policy_of(tokens), policy_of(whole))
    assert completions(tokens, step=1) == completions(whole, step=1)


def test_only_the_most_uncertain_tokens_may_count(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    run = train(ragged_model, tmp_path, learner__top_entropy_quantile=0.2).folder
    assert not same_bits(policy_of(run), policy_of(plain))
    assert completions(run, step=1) == completions(plain, step=1)
    assert all(math.isfinite(loss) for loss in column(run, "loss"))


def test_the_gradient_is_told_as_it_was_before_it_was_clipped(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    run = train(ragged_model, tmp_path, learner__max_grad_norm=1e-6).folder
    assert column(run, "grad_norm")[0] == pytest.approx(column(plain, "grad_norm")[0])
    assert column(run, "grad_norm")[0] > 1e-3
