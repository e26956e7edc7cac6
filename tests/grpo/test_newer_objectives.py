"""RLOO, DPPO, M2PO, Clip-Cov and KL-Cov against the formulas of their papers, token by token in float64.

Gradients are compared with finite differences. And what is chosen of a batch, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.grpo.test_step import bigram_weights, check_close, random_batch, train
from tests.support.fakes import same_bits
from troupe.grpo.choices import Places, by_clip_cov, by_kl_cov, by_second_moment, chosen_tokens, draws
from troupe.grpo.config import LearnerConfig, LossConfig, LossType
from troupe.grpo.loss import grpo_loss

B, T = 6, 9
Array = np.ndarray
Chosen = set[tuple[int, int]]


class Given:
    """Random rows of several lengths, float64, with ratios far from 1."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.new = -rng.exponential(1.0, (B, T)) - 0.02
        self.old = np.minimum(self.new + rng.normal(0, 0.3, (B, T)), -0.01)
        self.sampling = np.minimum(self.new + rng.normal(0, 0.5, (B, T)), -0.01)
        self.advantages = rng.normal(0, 1.5, B)
        self.mask = np.arange(T) < np.array([9, 4, 1, 0, 7, 8])[:, None]
        self.tokens = [(i, t) for i in range(B) for t in range(T) if self.mask[i, t]]

    def covariances(self, new: Array) -> dict[tuple[int, int], float]:
        mean_a = np.mean([self.advantages[i] for i, _ in self.tokens])
        mean_l = np.mean([new[place] for place in self.tokens])
        return {(i, t): (self.advantages[i] - mean_a) * (new[i, t] - mean_l) for i, t in self.tokens}


def ppo(r: float, A: float, config: LossConfig) -> float:
    return -min(r * A, min(max(r, 1 - config.epsilon), 1 + config.epsilon) * A)


def rloo(x: Given, new: Array, chosen: Chosen, config: LossConfig) -> float:
    rows = [math.exp(sum(new[i, t] - x.old[i, t] for t in range(T) if x.mask[i, t])) for i in range(B)]
    return float(sum(ppo(r, A, config) for r, A in zip(rows, x.advantages, strict=True)) / B)


def dppo(x: Given, new: Array, chosen: Chosen, config: LossConfig) -> float:
    total = 0.0
    for i, t in x.tokens:
        A, pi, mu = x.advantages[i], math.exp(new[i, t]), math.exp(x.sampling[i, t])
        at_first = math.exp(x.new[i, t]) - mu  # what is left out has no gradient
        if not ((A > 0 and at_first > config.dppo_mask_high) or (A < 0 and at_first < -config.dppo_mask_low)):
            total -= pi / mu * A
        total += config.dppo_kl_tau * math.log(pi / mu) ** 2
    return total / len(x.tokens)


def m2po(x: Given, new: Array, chosen: Chosen, config: LossConfig) -> float:
    rest = [place for place in x.tokens if place not in chosen]
    return float(sum(-math.exp(new[i, t] - x.sampling[i, t]) * x.advantages[i] for i, t in rest) / len(x.tokens))


def clip_cov(x: Given, new: Array, chosen: Chosen, config: LossConfig) -> float:
    rest = [place for place in x.tokens if place not in chosen]
    losses = [ppo(math.exp(new[i, t] - x.old[i, t]), x.advantages[i], config) for i, t in rest]
    return float(sum(losses) / len(x.tokens))


def kl_cov(x: Given, new: Array, chosen: Chosen, config: LossConfig) -> float:
    total = sum(-math.exp(new[i, t] - x.old[i, t]) * x.advantages[i] for i, t in x.tokens)
    total += sum(config.ppo_kl_coef * abs(new[place] - x.old[place]) for place in chosen)
    return float(total / len(x.tokens))


def none_chosen(x: Given, config: LossConfig) -> Chosen:
    return set()


def chosen_by_second_moment(x: Given, config: LossConfig) -> Chosen:
    moved = {(i, t): x.new[i, t] - x.sampling[i, t] for i, t in x.tokens}
    rest = sorted((p for p in moved if moved[p] * x.advantages[p[0]] > 0), key=lambda p: moved[p] ** 2)
    dropped = set()
    while rest and np.mean([moved[p] ** 2 for p in rest]) > config.m2_threshold:
        dropped.add(rest.pop())
    assert dropped
    assert rest
    return dropped


def chosen_by_clip_cov(x: Given, config: LossConfig) -> Chosen:
    cov = x.covariances(x.new)
    among = []
    for i, t in x.tokens:
        r, A = math.exp(x.new[i, t] - x.old[i, t]), x.advantages[i]
        is_clipped = min(max(r, 0.8), 1.2) * A < r * A
        if not is_clipped and config.clip_cov_lb < cov[i, t] < config.clip_cov_ub:
            among.append((i, t))
    count = max(int(config.clip_cov_ratio * len(x.tokens)), 1)
    assert 0 < count < len(among)
    drawn = np.array(draws(range(B), T))
    return set(sorted(among, key=lambda place: drawn[place])[:count])


def chosen_by_kl_cov(x: Given, config: LossConfig) -> Chosen:
    cov = x.covariances(x.new)
    return set(sorted(cov, key=lambda place: -cov[place])[: max(int(config.kl_cov_ratio * len(cov)), 1)])


CASES: list[tuple[LossType, dict[str, Any], Callable[..., float], Callable[[Given, LossConfig], Chosen]]] = [
    ("rloo", {}, rloo, none_chosen),
    ("dppo", {"dppo_mask_high": 0.1, "dppo_mask_low": 0.05, "dppo_kl_tau": 0.3}, dppo, none_chosen),
    ("dppo", {}, dppo, none_chosen),
    ("m2po", {}, m2po, chosen_by_second_moment),
    ("m2po", {"m2_threshold": 0.1}, m2po, chosen_by_second_moment),
    ("clip_cov", {"clip_cov_lb": 0.1, "clip_cov_ratio": 0.1}, clip_cov, chosen_by_clip_cov),
    ("clip_cov", {"clip_cov_lb": -9.0}, clip_cov, chosen_by_clip_cov),
    ("kl_cov", {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}, kl_cov, chosen_by_kl_cov),
    ("kl_cov", {}, kl_cov, chosen_by_kl_cov),
]


def named(value: object) -> str:
    return str(getattr(value, "__name__", value))[:30]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("loss_type", "settings", "formula", "choose"), CASES, ids=named)
def test_losses_and_gradients_are_those_of_the_formulas(
    loss_type: LossType,
    settings: dict[str, Any],
    formula: Callable[..., float],
    choose: Callable[..., Chosen],
    seed: int,
) -> None:
    config, x = LossConfig(loss_type=loss_type, **settings), Given(seed)
    chosen = choose(x, config)

    def loss(new: mx.array) -> mx.array:
        old, A, mask = (mx.array(values.astype(np.float32)) for values in (x.old, x.advantages, x.mask))
        sampling = mx.array(x.sampling, mx.float32)
        return grpo_loss(new, old, A, mask, config, sampling_per_token_logps=sampling)[0]

    value, grad = mx.value_and_grad(loss)(mx.array(x.new, mx.float32))
    assert value.item() == pytest.approx(formula(x, x.new, chosen, config), rel=1e-5, abs=1e-5)
    expected, h = np.zeros((B, T)), 1e-6
    for place in x.tokens:
        above, below = x.new.copy(), x.new.copy()
        above[place] += h
        below[place] -= h
        expected[place] = (formula(x, above, chosen, config) - formula(x, below, chosen, config)) / (2 * h)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(np.array(grad), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def places(log_probs: list[float], sampling: list[float], advantages: list[float]) -> Places:
    new, mu, A = (mx.array([row]) for row in (log_probs, sampling, advantages))
    return Places.of(new, new, mu, A, mx.ones((1, len(log_probs))))


def test_m2po_by_hand() -> None:
    # squares 0.01, 0.04 and 0.25 of those that moved with their advantages; the last two moved against them
    x = places([-1.0, -1.0, -1.0, -1.0, -1.0], [-1.1, -0.8, -1.5, -0.1, -2.0], [1.0, -1.0, 1.0, 1.0, -1.0])
    for threshold, dropped in ((0.11, []), (0.0999, [2]), (0.026, [2]), (0.024, [1, 2]), (0.009, [0, 1, 2])):
        chosen = by_second_moment(Places.joined([x]), LossConfig(m2_threshold=threshold))
        assert np.flatnonzero(np.array(chosen)).tolist() == dropped


def test_covariances_by_hand_and_equal_ones_by_their_place() -> None:
    # means −2 and 0: covariances 1, 0, −1, 1, −1
    x = places([-1.0, -2.0, -3.0, -3.0, -1.0], [-1.0] * 5, [1.0, 0.0, 1.0, -1.0, -1.0])
    x = Places.joined([x])
    assert by_kl_cov(x, LossConfig(kl_cov_ratio=0.0002)).tolist() == [1, 0, 0, 0, 0]
    assert by_kl_cov(x, LossConfig(kl_cov_ratio=0.6)).tolist() == [1, 1, 0, 1, 0]
    taken = np.zeros(5)
    for seed in range(40):
        drawn = draws([5], 5, seed=seed).reshape(-1)
        chosen = by_clip_cov(x._replace(draws=drawn), LossConfig(clip_cov_lb=0.5))
        taken += np.array(chosen)
    assert taken[0] + taken[3] == 40
    assert 8 < taken[0] < 32
    assert not np.array(by_clip_cov(x, LossConfig(clip_cov_lb=1.0))).any()


def test_nothing_is_chosen_of_nothing() -> None:
    nothing = places([-1.0, -2.0], [-1.0, -2.0], [1.0, -1.0])._replace(mask=mx.zeros((1, 2)))
    for choice in (by_clip_cov, by_kl_cov, by_second_moment):
        (chosen,) = chosen_tokens(choice, [nothing], LossConfig(clip_cov_lb=-9.0))
        assert chosen.tolist() == [[0, 0]]


SOME: dict[str, Any] = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.05, "kl_cov_ratio": 0.2, "m2_threshold": 0.02}


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov", "m2po"])
def test_what_is_chosen_in_each_pass_does_not_depend_on_the_cut(loss_type: LossType) -> None:
    config = LearnerConfig(loss_type=loss_type, num_iterations=3, ppo_kl_coef=5.0, **SOME)
    whole = train(config, lr=0.02)
    for n in (2, 8):
        cut = train(LearnerConfig(**{**as_dict(config), "gradient_accumulation_steps": n}), lr=0.02)
        check_close(cut.weights, whole.weights)
        assert cut.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    plain = train(LearnerConfig(loss_type="dapo", num_iterations=3), lr=0.02)
    assert not same_bits(plain.weights, whole.weights)


def as_dict(config: LearnerConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_a_choice_at_random_follows_from_seed_pass_and_slot() -> None:
    config = LearnerConfig(loss_type="clip_cov", **SOME)
    first, again, other = (train(config, lr=0.02, seed=seed) for seed in (0, 0, 1))
    assert same_bits(first.weights, again.weights)
    assert not same_bits(first.weights, other.weights)
    rows = draws([7, 9], 4, seed=3)
    assert rows[1:].tolist() == draws([9], 4, seed=3).tolist()
    assert rows[:, :2].tolist() == draws([7, 9], 2, seed=3).tolist()
    later = draws([7, 9], 4, seed=3, pass_number=1)
    assert np.unique(np.array([rows, later])).size == 16


@pytest.mark.parametrize("loss_type", ["dppo", "m2po"])
def test_a_sampler_that_is_not_known_is_the_old_policy(loss_type: LossType) -> None:
    x, config = Given(5), LossConfig(loss_type=loss_type)
    new, old, A = mx.array(x.new, mx.float32), mx.array(x.old, mx.float32), mx.array(x.advantages, mx.float32)
    mask = mx.array(x.mask.astype(np.float32))
    plain = grpo_loss(new, old, A, mask, config)[0].item()
    unknown = mx.full((B, T), math.nan)
    assert grpo_loss(new, old, A, mask, config, sampling_per_token_logps=unknown)[0].item() == plain
    weighed = grpo_loss(new, old, A, mask, config, importance_sampling_ratio=mx.full((B, T), 2.0))
    assert weighed[0].item() == plain  # its ratio has the sampler's part already


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "rloo", "importance_sampling_level": "sequence"}, 'importance_sampling_level is "sequence"'),
        ({"loss_type": "kl_cov", "importance_sampling_level": "sequence"}, 'loss_type "kl_cov" has ratios of its own'),
        ({"clip_cov_lb": 6.0}, "clip_cov_lb is 6.0, above clip_cov_ub = 5.0"),
        ({"loss_type": "rloo", "turn_advantages": "gigpo"}, 'turn_advantages is "gigpo"'),
        ({"advantage": "rloo", "scale_rewards": "group"}, 'scale_rewards is "group", but advantage = "rloo"'),
        ({"advantage": "maxrl", "scale_rewards": "batch"}, 'advantage = "maxrl" goes with "none"'),
        ({"advantage": "grpo_passk", "scale_rewards": "batch"}, 'goes with "group" or "none"'),
        (
            {"advantage": "rloo", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation is .* leave one of the two out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**settings)


def test_rows_of_one_completion_add_up_in_rloo() -> None:
    """A completion that is told in two rows learns, on the policy, what one row of all its tokens would."""
    batch = random_batch(bigram_weights(), rows=4, noise=0.0)
    halves = replace(batch, samples=(0, 1, 1, 2))
    config = LearnerConfig(loss_type="rloo", max_grad_norm=0.0, vllm_importance_sampling_correction=False)
    parts, plain = train(config, batch=halves), train(config, batch=batch)
    # three completions in place of four, and each token counts as before
    scale = 4 / 3
    for name in ("m.table", "m.bias"):
        expected = scale * np.array(plain.optimizer_state[name])
        np.testing.assert_allclose(np.array(parts.optimizer_state[name]), expected, atol=1e-6)
