"""How the loss is put together, what its entropy bonus weighs, and log-probs against numpy in float64.

TRL's figures are in test_trl_vectors.py.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from troupe.grpo.choices import Places, chosen_tokens
from troupe.grpo.comparisons import entropy_threshold, high_entropy_mask, upper_epsilon
from troupe.grpo.config import BY_TOKENS, Level, LossConfig, LossType
from troupe.grpo.loss import (
    EntropyControl,
    batch_normalizer,
    entropy_control,
    entropy_from_logits,
    grpo_loss,
    loss_and_tallies,
    selective_log_softmax,
)
from troupe.grpo.objectives import OBJECTIVES
from troupe.grpo.tallies import averages, merge

B, T = 6, 7


def arrays(seed: int = 4) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    new = -rng.random((B, T)) * 3
    lengths = np.array([7, 1, 4, 0, 6, 3])
    fields = {
        "per_token_logps": new,
        "old_per_token_logps": new + 0.3 * rng.normal(size=(B, T)),
        "ref_per_token_logps": new + 0.3 * rng.normal(size=(B, T)),
        "entropies": rng.random((B, T)),
        "sampling_per_token_logps": new + 0.3 * rng.normal(size=(B, T)),
        "importance_sampling_ratio": np.exp(0.2 * rng.normal(size=(B, T)) * (np.arange(T) < lengths[:, None])),
        "advantages": rng.normal(size=B),
        "completion_mask": np.arange(T) < lengths[:, None],
    }
    return {name: mx.array(value.astype(np.float32)) for name, value in fields.items()}


CONFIGS = [
    LossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.04, entropy_coef=0.01)
    for loss_type in get_args(LossType)
    for level in ("token", "sequence")
    if level == "token" or loss_type not in BY_TOKENS
]


def chosen_of(fields: dict[str, mx.array], config: LossConfig) -> mx.array | None:
    """The tokens that the loss type chooses of all rows together."""
    choice = OBJECTIVES[config.loss_type].choice
    if choice is None:
        return None
    names = ("per_token_logps", "old_per_token_logps", "sampling_per_token_logps", "advantages", "completion_mask")
    (chosen,) = chosen_tokens(choice, [Places.of(*(fields[name] for name in names))], config)
    assert 0 < float(mx.sum(chosen)) < B * T / 2
    return chosen


ENTROPY_SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_entropy_quantile": 0.4},
    {"entropy_coef": 0.1},
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.1},
    {"use_adaptive_entropy": True, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.01},
]
KL_SETTINGS: list[dict[str, Any]] = [{}, {"beta": 0.04}, {"beta": 0.04, "use_bias_correction_kl": False}]


@pytest.mark.parametrize("entropy", ENTROPY_SETTINGS, ids=["", "quantile", "bonus", "both", "adaptive"])
@pytest.mark.parametrize("kl", KL_SETTINGS, ids=["", "kl", "kl-plain"])
@pytest.mark.parametrize(
    ("loss_type", "level"), [(config.loss_type, config.importance_sampling_level) for config in CONFIGS]
)
def test_the_parts_of_a_batch_add_up_to_its_loss_gradient_and_metrics(
    loss_type: LossType, level: Level, kl: dict[str, Any], entropy: dict[str, Any]
) -> None:
    some: dict[str, Any] = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.2}
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, **kl, **entropy, **some)
    whole = arrays()
    chosen = chosen_of(whole, config)
    mask, threshold, kept = whole["completion_mask"], None, None
    if config.top_entropy_quantile < 1.0:
        threshold = entropy_threshold(whole["entropies"], mask, config.top_entropy_quantile)
        kept = mx.sum(high_entropy_mask(whole["entropies"], mask, threshold))
    shared = {
        "normalizer": batch_normalizer(
            config, rows=B, tokens=mx.sum(mask), entropy_tokens=kept, max_completion_length=9
        ),
        "entropy_threshold": threshold,
    }

    def loss(
        log_probs: mx.array, entropies: mx.array, rows: slice, given: dict[str, Any]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        part: dict[str, Any] = {name: value[rows] for name, value in whole.items()}
        part |= {"per_token_logps": log_probs[rows], "entropies": entropies[rows]}
        if given and chosen is not None:
            part["chosen"] = chosen[rows]
        return loss_and_tallies(config=config, max_completion_length=9, entropy_coef=0.3, **given, **part)

    value_and_grad = mx.value_and_grad(loss, argnums=(0, 1))
    arguments = whole["per_token_logps"], whole["entropies"]
    (value, tallies), grads = value_and_grad(*arguments, slice(None), {})
    parts = [value_and_grad(*arguments, rows, shared) for rows in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6))]
    np.testing.assert_allclose(sum(part.item() for (part, _), _ in parts), value.item(), rtol=1e-5, atol=1e-6)
    for i, grad in enumerate(grads):
        total, scale = sum(np.array(part[i]) for _, part in parts), max(1e-30, float(mx.max(mx.abs(grad))))
        np.testing.assert_allclose(total / scale, np.array(grad) / scale, atol=1e-6)
    metrics = averages(tallies)
    for name, merged in averages(merge([part for (_, part), _ in parts])).items():
        assert merged.item() == pytest.approx(metrics[name].item(), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.importance_sampling_level}")
def test_what_stands_on_padding_changes_nothing(config: LossConfig) -> None:
    fields = arrays()
    padding = fields["completion_mask"] == 0
    garbage = dict(fields)
    for name in ("per_token_logps", "old_per_token_logps", "ref_per_token_logps"):
        garbage[name] = mx.where(padding, fields[name] * -1e4, fields[name])
    garbage["entropies"] = mx.where(padding, math.nan, fields["entropies"])
    results = [
        mx.value_and_grad(
            lambda lp, f=f: grpo_loss(config=config, max_completion_length=9, **(f | {"per_token_logps": lp}))
        )(f["per_token_logps"])
        for f in (fields, garbage)
    ]
    ((loss_a, metrics_a), grad_a), ((loss_b, metrics_b), grad_b) = results
    assert loss_a.item() == loss_b.item()
    np.testing.assert_array_equal(np.array(grad_a), np.array(grad_b))
    for name, value in metrics_a.items():
        np.testing.assert_array_equal(np.array(value), np.array(metrics_b[name]))


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    fields = arrays()
    config = LossConfig(loss_type="dapo")

    def loss(log_probs: mx.array) -> mx.array:
        return grpo_loss(log_probs, None, fields["advantages"], fields["completion_mask"], config)[0]

    mask, advantages = np.array(fields["completion_mask"]), np.array(fields["advantages"])
    grad = mx.grad(loss)(fields["per_token_logps"])
    np.testing.assert_allclose(np.array(grad), -advantages[:, None] * mask / mask.sum(), rtol=1e-6)


def test_the_entropy_bonus_takes_the_coefficient_in_force() -> None:
    fields: dict[str, Any] = dict(arrays())
    config = LossConfig(entropy_coef=0.5)
    mask = np.array(fields["completion_mask"])
    entropy = (np.array(fields["entropies"]) * mask).sum() / mask.sum()
    plain = grpo_loss(config=LossConfig(), **fields)[0].item()
    for coef, given in ((0.5, None), (0.2, 0.2), (-0.2, mx.array(-0.2)), (0.0, 0.0)):
        loss, metrics = grpo_loss(config=config, entropy_coef=given, **fields)
        assert loss.item() == pytest.approx(plain - coef * entropy, abs=1e-6)
        assert metrics["policy_loss"].item() == pytest.approx(plain, abs=1e-7)


def test_metrics_carry_no_gradient_and_stay_out_without_their_inputs() -> None:
    fields = arrays()
    _, metrics = grpo_loss(
        fields["per_token_logps"],
        fields["old_per_token_logps"],
        fields["advantages"],
        fields["completion_mask"],
        LossConfig(),
    )
    assert sorted(metrics) == [f"clip_ratio/{name}" for name in ("high_max", "high_mean", "low_mean", "low_min")] + [
        "clip_ratio/region_mean"
    ]
    config = LossConfig(beta=0.1)
    rest: dict[str, Any] = {name: value for name, value in fields.items() if name != "per_token_logps"}
    grad = mx.grad(lambda lp: grpo_loss(lp, config=config, **rest)[1]["kl"])(fields["per_token_logps"])
    assert mx.max(mx.abs(grad)).item() == 0.0


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"per_token_logps": mx.zeros(3)}, LossConfig(), r"per_token_logps has the shape \(3,\)"),
        ({"completion_mask": mx.zeros((B, 1))}, LossConfig(), r"completion_mask has the shape \(6, 1\)"),
        ({"advantages": mx.zeros((B, 1))}, LossConfig(), r"advantages has the shape \(6, 1\)"),
        ({"ref_per_token_logps": None}, LossConfig(beta=0.1), "beta is 0.1"),
        ({"entropies": None}, LossConfig(entropy_coef=0.1), "need entropies"),
        ({}, LossConfig(loss_type="dr_grpo"), "max_completion_length"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], config: LossConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss(config=config, **(arrays() | changes))


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "ppo"},
        {"epsilon": -0.1},
        {"delta": 0},
        {"top_entropy_quantile": 1.5},
        {"epsilon_low": 0.1},
        {"entropy_coef_min": 0.2, "entropy_coef_max": 0.1},
    ],
)
def test_the_configuration_has_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, LossConfig)


def test_defaults_are_trls() -> None:
    config = LossConfig()
    assert (config.loss_type, config.importance_sampling_level) == ("dapo", "token")
    assert (config.epsilon, upper_epsilon(config), config.delta, config.beta) == (0.2, 0.2, None, 0.0)
    assert config.use_bias_correction_kl is True
    assert (config.use_adaptive_entropy, config.entropy_coef, config.entropy_coef_delta) == (False, 0.0, 0.005)
    assert (config.entropy_target, config.entropy_coef_min, config.entropy_coef_max) == (0.2, 0.0, 1.0)
    assert upper_epsilon(LossConfig(epsilon_high=0.28)) == 0.28


ON = LossConfig(
    use_adaptive_entropy=True,
    entropy_coef=0.02,
    entropy_coef_delta=0.01,
    entropy_target=1.0,
    entropy_coef_min=0.015,
    entropy_coef_max=0.035,
)


@pytest.mark.parametrize(
    ("coef", "entropy", "expected"),
    [(0.02, 0.9, 0.03), (0.02, 1.0, 0.03), (0.03, 0.9, 0.035), (0.03, 1.1, 0.02), (0.02, 1.1, 0.015)],
)
def test_the_coefficient_rises_at_or_below_the_target_and_falls_above(
    coef: float, entropy: float, expected: float
) -> None:
    control = EntropyControl(coef, 0.0).after_update(entropy, ON)
    assert control.coef == pytest.approx(expected)
    assert control.last_entropy == entropy


def test_the_bonus_counts_only_after_an_entropy_at_or_below_the_target() -> None:
    control = entropy_control({}, ON)
    assert control == EntropyControl(0.02, math.inf)
    assert control.in_force(ON) == 0.0
    low, high = control.after_update(0.5, ON), control.after_update(1.5, ON)
    assert low.in_force(ON) == pytest.approx(0.03)
    assert high.in_force(ON) == 0.0
    assert high.coef == 0.015


def test_the_state_of_the_optimizer_keeps_it() -> None:
    control = EntropyControl(0.25, 0.5)
    state = control.as_state(ON)
    assert {name: (array.dtype, array.shape) for name, array in state.items()} == {
        "entropy_coef": (mx.float32, ()),
        "last_entropy": (mx.float32, ()),
    }
    assert entropy_control({"step": mx.array(3.0)} | state, ON) == control


def test_a_fixed_coefficient_stays() -> None:
    config = LossConfig(entropy_coef=0.1)
    control = entropy_control({"entropy_coef": mx.array(0.7), "last_entropy": mx.array(0.0)}, config)
    assert control.in_force(config) == 0.1
    assert control.after_update(5.0, config) == control
    assert control.as_state(config) == {}


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, 11)) * 3
    ids = rng.integers(0, 11, size=shape)
    expected = log_softmax(logits)
    chosen = selective_log_softmax(mx.array(logits.astype(np.float32)), mx.array(ids))
    assert chosen.shape == shape
    np.testing.assert_allclose(np.array(chosen), np.take_along_axis(expected, ids[..., None], -1)[..., 0], atol=2e-6)
    entropy = entropy_from_logits(mx.array(logits.astype(np.float32)))
    np.testing.assert_allclose(np.array(entropy), -(np.exp(expected) * expected).sum(-1), atol=2e-6)


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits = mx.array([[1.0, 2.0, 3.0]], dtype=mx.bfloat16)
    chosen = selective_log_softmax(logits, mx.array([2]))
    assert chosen.dtype == entropy_from_logits(logits).dtype == mx.float32
    assert chosen.item() == pytest.approx(3 - math.log(math.exp(1) + math.exp(2) + math.exp(3)), abs=1e-6)


def test_an_excluded_token_adds_nothing_to_the_entropy() -> None:
    logits = mx.array([0.0, -math.inf, 0.0])
    assert entropy_from_logits(logits).item() == pytest.approx(math.log(2.0))


def test_large_logits_do_not_overflow() -> None:
    logits = mx.array([1e4, 1e4 - 1.0, -1e4])
    p = 1 / (1 + math.exp(-1.0))
    assert selective_log_softmax(logits, mx.array(0)).item() == pytest.approx(math.log(p), abs=1e-3)
    assert entropy_from_logits(logits).item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-3)
