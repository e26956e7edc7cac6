"""One learner batch on a policy small enough to see through: a table of bigram logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support.fakes import same_bits
from troupe.grpo import sync_reference
from troupe.grpo.batch import Batch, make_batch
from troupe.grpo.config import BY_TOKENS, CorrectionMode, LearnerConfig, Level, LossType
from troupe.grpo.log_probs import DifferentiatedByMlx
from troupe.grpo.loss import entropy_from_logits, grpo_loss, selective_log_softmax
from troupe.grpo.optimizer import adamw_init, adamw_update, clip_by_global_norm, join_halves
from troupe.grpo.step import StepResult, train_on_batch

V = 6
Weights = Mapping[str, mx.array]


def bigram(weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
    """Logits of a token from the token before it."""
    before = mx.concatenate([batch.prompt_ids[:, -1:], batch.completion_ids[:, :-1]], axis=1)
    logits = weights["table"][before] + weights["bias"]
    return selective_log_softmax(logits, batch.completion_ids), entropy_from_logits(logits)


def bigram_weights(seed: int = 5) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        "table": mx.array(rng.normal(size=(V, V)).astype(np.float32)),
        "bias": mx.array(rng.normal(size=V).astype(np.float32)),
    }


def random_batch(weights: Weights, seed: int = 6, rows: int = 8, noise: float = 0.3) -> Batch:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, V, size=rng.integers(1, 4)).tolist() for _ in range(rows)]
    completions = [rng.integers(0, V, size=rng.integers(1, 8)).tolist() for _ in range(rows)]
    advantages = rng.normal(size=rows).tolist()
    plain = make_batch(prompts, completions, [[0.0] * len(c) for c in completions], advantages, pad_id=0)
    log_probs = np.array(bigram(weights, plain)[0])
    sampled = [(log_probs[i, : len(c)] + noise * rng.normal(size=len(c))).tolist() for i, c in enumerate(completions)]
    truncated = [i == 2 for i in range(rows)]
    return make_batch(prompts, completions, sampled, advantages, pad_id=0, truncated=truncated)


def train(
    config: LearnerConfig,
    lr: Any = 0.0,
    *,
    batch: Batch | None = None,
    weights: dict[str, mx.array] | None = None,
    log_probs: Any = bigram,
    streams: Sequence[mx.Stream] = (),
    seed: int = 0,
) -> StepResult:
    """A batch from the beginning."""
    weights = bigram_weights() if weights is None else weights
    return train_on_batch(
        weights,
        adamw_init(weights),
        random_batch(bigram_weights()) if batch is None else batch,
        log_probs,
        config,
        lr=lr,
        ref_weights=bigram_weights(7),
        max_completion_length=9,
        streams=streams,
        seed=seed,
    )


def check_close(ours: Weights, theirs: Weights, atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(weight), atol=atol)


def first_moment(result: StepResult) -> np.ndarray:
    """The gradient of the first update, times 1 − β₁."""
    return np.concatenate([np.array(result.optimizer_state[f"m.{name}"]).reshape(-1) for name in ("table", "bias")])


MANY_CHOSEN: dict[str, Any] = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.1, "m2_threshold": 0.02}
"""Of a small batch, too, a part of the tokens is chosen."""
ENTROPY_SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_entropy_quantile": 0.4},
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.1},
    {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 9.0, "off_policy_mask_threshold": 0.05},
]


@pytest.mark.parametrize("entropy", ENTROPY_SETTINGS, ids=["", "quantile", "bonus", "adaptive"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "level", "mode"),
    [(loss_type, "token", "sequence_mask") for loss_type in get_args(LossType)]
    + [(loss_type, "sequence", "token_truncate") for loss_type in get_args(LossType) if loss_type not in BY_TOKENS],
)
def test_micro_batches_change_neither_gradient_nor_metrics(
    loss_type: LossType, level: Level, mode: CorrectionMode, beta: float, entropy: dict[str, Any]
) -> None:
    config = LearnerConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        vllm_importance_sampling_mode=mode,
        beta=beta,
        mask_truncated_completions=True,  # one of the ragged rows is fully masked
        max_grad_norm=0.0,
        **MANY_CHOSEN,
        **entropy,
    )
    whole = train(config)
    assert np.abs(first_moment(whole)).max() > 1e-4
    for n in (3, 8):
        cut = train(msgspec.structs.replace(config, gradient_accumulation_steps=n))
        scale = np.abs(first_moment(whole)).max()
        np.testing.assert_allclose(first_moment(cut) / scale, first_moment(whole) / scale, atol=1e-6)
        assert set(cut.metrics) == set(whole.metrics)
        for name, value in whole.metrics.items():
            assert cut.metrics[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


class BigramWithGradient:
    """`bigram` that gives its gradients itself, in two portions."""

    has_dropout = False

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        return bigram(weights, batch)

    def gradients(
        self, weights: Weights, batch: Batch, loss: Callable[[mx.array, mx.array], tuple[mx.array, Any]]
    ) -> Generator[tuple[Any, dict[str, mx.array]], None, tuple[mx.array, Any]]:
        self.asked += 1
        value, grads = mx.value_and_grad(lambda weights: loss(*bigram(weights, batch)))(weights)
        for _ in range(self.asked % 3):  # micro-batches differ in how many chunks their work has
            yield (value, grads["bias"] * 1.0), {}
        yield (), {"bias": grads["bias"]}
        yield None, {"table": grads["table"]}
        return value


@pytest.mark.parametrize("entropy", ENTROPY_SETTINGS, ids=["", "quantile", "bonus", "adaptive"])
@pytest.mark.parametrize(("iterations", "micros"), [(1, 1), (2, 3)])
def test_log_probs_may_bring_a_gradient_of_their_own(iterations: int, micros: int, entropy: dict[str, Any]) -> None:
    config = LearnerConfig(num_iterations=iterations, gradient_accumulation_steps=micros, beta=0.1, **entropy)
    plain, own = train(config, lr=0.01), BigramWithGradient()
    same = train(config, lr=0.01, log_probs=own)
    assert own.asked == iterations * micros
    assert same.metrics == plain.metrics
    assert same_bits(same.weights, plain.weights)
    assert same_bits(same.optimizer_state, plain.optimizer_state)


class BigramWithDropout:
    """`bigram` whose gradients are of other log-probs in each pass."""

    has_dropout = True

    def __init__(self) -> None:
        self.passes: list[int] = []

    def __call__(self, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        return bigram(weights, batch)

    def gradients(
        self, weights: Weights, batch: Batch, loss: Callable[[mx.array, mx.array], tuple[mx.array, Any]]
    ) -> Generator[tuple[Any, dict[str, mx.array]], None, tuple[mx.array, Any]]:
        self.passes.append(batch.pass_number)
        own = DifferentiatedByMlx(lambda w, b: bigram(dropped(w, b.pass_number), b))
        result: tuple[mx.array, Any] = yield from own.gradients(weights, batch, loss)
        return result


def dropped(weights: Weights, pass_number: int) -> Weights:
    return {**weights, "table": weights["table"] * (0.9 - 0.2 * pass_number)}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("micros", [1, 3])
def test_with_dropout_the_old_log_probs_are_those_of_the_policy_that_sampled(iterations: int, micros: int) -> None:
    config = LearnerConfig(
        loss_type="dapo", num_iterations=iterations, gradient_accumulation_steps=micros, max_grad_norm=0.0
    )
    weights, batch = bigram_weights(), random_batch(bigram_weights())
    old = bigram(weights, batch)[0]
    batch = replace(batch, sampling_log_probs=old)

    def loss(w: dict[str, mx.array], number: int) -> mx.array:
        log_probs = bigram(dropped(w, number), batch)[0]
        return grpo_loss(log_probs, old, batch.advantages, batch.completion_mask, config)[0]

    state = adamw_init(weights)
    for number in range(iterations):
        _, grads = mx.value_and_grad(loss)(weights, number)
        weights, state = adamw_update(weights, grads, state, lr=0.01)
    own = BigramWithDropout()
    result = train_on_batch(bigram_weights(), adamw_init(bigram_weights()), batch, own, config, lr=0.01)
    assert own.passes == [number for number in range(iterations) for _ in range(micros)]
    check_close(result.weights, weights)
    check_close(result.optimizer_state, state)
    assert result.metrics["sampling/sampling_logp_difference/max"] == 0.0, "the correction knows of no dropout"


@pytest.mark.parametrize("streams", [2, 3, 5])
def test_streams_change_no_bit(streams: int) -> None:
    config = LearnerConfig(num_iterations=2, gradient_accumulation_steps=5, beta=0.1)
    beside = [mx.new_stream(mx.default_device()) for _ in range(streams)]
    one, several = (train(config, lr=0.01, log_probs=BigramWithGradient(), streams=given) for given in ([], beside))
    assert several.metrics == one.metrics
    assert same_bits(several.weights, one.weights)
    assert same_bits(several.optimizer_state, one.optimizer_state)


def test_one_batch_is_one_update_of_the_plain_loss() -> None:
    config = LearnerConfig(loss_type="dapo", vllm_importance_sampling_correction=False, max_grad_norm=0.05)
    weights, batch = bigram_weights(), random_batch(bigram_weights())

    def loss(w: dict[str, mx.array]) -> mx.array:
        return grpo_loss(bigram(w, batch)[0], None, batch.advantages, batch.completion_mask, config)[0]

    value, grads = mx.value_and_grad(loss)(weights)
    grads, norm = clip_by_global_norm(grads, 0.05)
    expected, _ = adamw_update(weights, grads, adamw_init(weights), lr=0.1)
    result = train(config, lr=0.1)
    assert result.updated
    assert result.metrics["loss"] == pytest.approx(value.item(), abs=1e-7)
    assert result.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert result.metrics["learning_rate"] == 0.1
    assert result.metrics["nonfinite"] == 0.0
    check_close(result.weights, expected)


def test_two_iterations_are_two_updates_against_the_first_log_probs() -> None:
    config = LearnerConfig(loss_type="grpo", num_iterations=2, beta=0.05, vllm_importance_sampling_correction=False)
    weights, batch = bigram_weights(), random_batch(bigram_weights())
    old, ref = bigram(weights, batch)[0], bigram(bigram_weights(7), batch)[0]
    state, losses = adamw_init(weights), []

    def loss(w: dict[str, mx.array]) -> mx.array:
        return grpo_loss(
            bigram(w, batch)[0], old, batch.advantages, batch.completion_mask, config, ref_per_token_logps=ref
        )[0]

    for rate in (0.1, 0.05):
        value, grads = mx.value_and_grad(loss)(weights)
        grads, _ = clip_by_global_norm(grads, 1.0)
        weights, state = adamw_update(weights, grads, state, lr=rate)
        losses.append(value.item())
    result = train(config, lr=[0.1, 0.05])
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert result.metrics["learning_rate"] == 0.05
    assert result.metrics["clip_ratio/high_max"] > 0.0
    assert result.optimizer_state["step"].item() == 2.0
    check_close(result.weights, weights, atol=2e-6)


ADAPTIVE = LearnerConfig(
    use_adaptive_entropy=True,
    entropy_coef=0.1,
    entropy_coef_delta=0.05,
    entropy_target=9.0,
    entropy_coef_max=0.18,
    vllm_importance_sampling_correction=False,
    max_grad_norm=0.0,
)


def test_the_entropy_controller_starts_without_a_bonus_and_stays_in_the_optimizers_state() -> None:
    # The entropy, below log 6, is under the target, so that the coefficient rises: 0.1, 0.15, 0.18.
    weights, batch = bigram_weights(), random_batch(bigram_weights())
    fixed = msgspec.structs.replace(ADAPTIVE, use_adaptive_entropy=False)
    state, plain = adamw_init(weights), adamw_init(weights)
    for bonus, after in ((0.0, 0.15), (0.15, 0.18), (0.18, 0.18)):
        adaptive = train_on_batch(weights, state, batch, bigram, ADAPTIVE, lr=0.01)
        same = train_on_batch(
            weights, plain, batch, bigram, msgspec.structs.replace(fixed, entropy_coef=bonus), lr=0.01
        )
        assert adaptive.metrics["loss"] == pytest.approx(same.metrics["loss"], abs=1e-6)
        assert adaptive.metrics["entropy_coef"] == pytest.approx(after)
        assert adaptive.metrics["controlled_entropy"] == adaptive.metrics["entropy"]
        state, plain = adaptive.optimizer_state, same.optimizer_state
        assert state["entropy_coef"].item() == pytest.approx(after)
        assert state["last_entropy"].item() == pytest.approx(adaptive.metrics["entropy"])
        check_close(adaptive.weights, same.weights)
        weights = adaptive.weights
    assert "entropy_coef" not in plain


def test_the_entropy_controller_moves_once_an_update_and_measures_the_tokens_it_acts_on() -> None:
    config = msgspec.structs.replace(ADAPTIVE, num_iterations=2, top_entropy_quantile=0.4, entropy_coef_delta=0.01)
    result = train(config, lr=0.01)
    assert result.metrics["entropy_coef"] == pytest.approx(0.12)
    assert result.metrics["controlled_entropy"] > result.metrics["entropy"]
    skipped = train_on_batch(
        bigram_weights() | {"bias": mx.array([math.nan] * V)},
        {"entropy_coef": mx.array(0.125), "last_entropy": mx.array(2.0)} | adamw_init(bigram_weights()),
        random_batch(bigram_weights()),
        bigram,
        config,
        lr=0.01,
    )
    assert not skipped.updated
    assert skipped.metrics["entropy_coef"] == 0.125
    assert (skipped.optimizer_state["entropy_coef"].item(), skipped.optimizer_state["last_entropy"].item()) == (
        0.125,
        2,
    )


def test_a_policy_learns_which_token_is_rewarded() -> None:
    config = LearnerConfig(loss_type="dapo")
    weights = {"table": mx.zeros((V, V)), "bias": mx.zeros(V)}
    state = adamw_init(weights)
    rng = np.random.default_rng(8)
    for _ in range(40):
        p = np.exp(np.array(weights["table"] + weights["bias"], dtype=np.float64))
        p /= p.sum(-1, keepdims=True)
        tokens = [int(rng.choice(V, p=p[1])) for _ in range(16)]
        rewards = np.array([float(token == 3) for token in tokens])
        sampled = [[math.log(p[1, token])] for token in tokens]
        batch = make_batch([[1]] * 16, [[t] for t in tokens], sampled, (rewards - rewards.mean()).tolist(), pad_id=0)
        result = train_on_batch(weights, state, batch, bigram, config, lr=0.1)
        weights, state = result.weights, result.optimizer_state
    assert p[1, 3] > 0.9


def test_the_samplers_correction_weighs_every_token() -> None:
    weights = bigram_weights()
    exact = random_batch(weights, noise=0.0)
    config = LearnerConfig(loss_type="dapo", vllm_importance_sampling_mode="token_truncate", max_grad_norm=0.0)
    shift = math.log(2.0)
    shifted = make_batch([[1]] * 2, [[2], [3]], [[-1.0 - shift], [-1.0 - shift]], exact.advantages[:2], pad_id=0)

    def fixed(w: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        return w["x"] * mx.ones(batch.completion_ids.shape), mx.ones(batch.completion_ids.shape)

    start = {"x": mx.array([[-1.0]])}
    plain = msgspec.structs.replace(config, vllm_importance_sampling_correction=False)
    corrected, uncorrected = (
        train(settings, batch=shifted, weights=start, log_probs=fixed) for settings in (config, plain)
    )
    assert corrected.metrics["loss"] == pytest.approx(2 * uncorrected.metrics["loss"], rel=1e-5)
    assert corrected.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(2.0, rel=1e-5)
    assert corrected.metrics["sampling/sampling_logp_difference/max"] == pytest.approx(shift, rel=1e-5)
    same = train(config, batch=exact)
    assert same.metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_loss_that_is_not_finite_makes_no_update(iterations: int) -> None:
    weights = bigram_weights() | {"bias": mx.array([math.nan] * V)}
    config = LearnerConfig(num_iterations=iterations, gradient_accumulation_steps=2)
    result = train(config, lr=0.1, weights=weights)
    assert not result.updated
    assert result.metrics["nonfinite"] == 1.0
    assert math.isnan(result.metrics["loss"])
    np.testing.assert_array_equal(np.array(result.weights["table"]), np.array(weights["table"]))
    assert result.optimizer_state["step"].item() == 0.0


@pytest.mark.parametrize("rates", [1.5, -1e-9, math.nan, math.inf, [0.1, 2.0]])
def test_learning_rates_outside_0_to_1_are_refused_before_anything_is_done(rates: Any) -> None:
    weights = bigram_weights()
    state = adamw_init(weights)
    config = LearnerConfig(num_iterations=2)
    with pytest.raises(ValueError, match=r"the learning rate is .*; give a number from 0 to 1"):
        train_on_batch(weights, state, random_batch(weights), bigram, config, lr=rates)
    assert same_bits(state, adamw_init(weights))


@pytest.mark.parametrize("scale", [1e30, 1e17])
def test_a_finite_gradient_leaves_finite_weights_at_any_learning_rate(scale: float) -> None:
    # squares of numbers beyond 1.8e19 are infinite in float32, and such gradients count as not finite
    def steep(w: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        log_probs, entropies = bigram(w, batch)
        return log_probs + scale * (log_probs - mx.stop_gradient(log_probs)), entropies

    weights = bigram_weights()
    config = LearnerConfig(max_grad_norm=0.0, vllm_importance_sampling_correction=False)
    result = train(config, lr=1.0, log_probs=steep)
    assert result.updated == (scale < 1e19)
    assert math.isfinite(result.metrics["loss"])
    assert math.isfinite(result.metrics["grad_norm"]) == result.updated
    assert same_bits(result.weights, weights) != result.updated
    for array in (result.weights | result.optimizer_state).values():
        assert mx.all(mx.isfinite(array)).item()


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_state_is_used_up_and_copies_of_it_are_not(spoilt: bool) -> None:
    batch = random_batch(bigram_weights())
    weights = bigram_weights() | ({"bias": mx.array([math.nan] * V)} if spoilt else {})
    kept = {name: np.array(weight) for name, weight in weights.items()}
    state = adamw_init(weights)
    snapshot, before = dict(state), {name: np.array(array) for name, array in state.items()}
    result = train_on_batch(weights, state, batch, bigram, LearnerConfig(num_iterations=2), lr=0.1)
    assert state == {}
    assert result.optimizer_state.keys() == before.keys()
    assert result.optimizer_state["step"].item() == (0.0 if spoilt else 2.0)
    for name, array in snapshot.items():
        np.testing.assert_array_equal(np.array(array), before[name])
    for name, weight in weights.items():
        np.testing.assert_array_equal(np.array(weight), kept[name])
    assert mx.array_equal(result.weights["table"], weights["table"]).item() == spoilt


def test_a_rerun_gives_the_same_bits() -> None:
    config = LearnerConfig(num_iterations=2, gradient_accumulation_steps=3, beta=0.01, top_entropy_quantile=0.5)
    a, b = train(config, lr=0.01), train(config, lr=0.01)
    assert a.metrics == b.metrics
    assert same_bits(a.weights, b.weights)


def test_bfloat16_weights_train() -> None:
    weights = {name: weight.astype(mx.bfloat16) for name, weight in bigram_weights().items()}
    config = LearnerConfig(gradient_accumulation_steps=2)
    result = train(config, lr=0.1, weights=weights)
    assert result.weights["table"].dtype == mx.bfloat16
    assert {name: array.dtype for name, array in result.optimizer_state.items() if "table" in name} == {
        "m.table": mx.float32,
        "v.table": mx.float32,
        "low.table": mx.uint16,
    }
    same = train(config, lr=0.1, weights={name: weight.astype(mx.float32) for name, weight in weights.items()})
    trained = join_halves(result.weights["table"], result.optimizer_state["low.table"])
    np.testing.assert_allclose(np.array(trained), np.array(same.weights["table"]), atol=5e-3)
    assert mx.any(result.weights["bias"] != weights["bias"]).item()


def test_arguments_that_are_missing_are_refused() -> None:
    weights = bigram_weights()
    batch, state = random_batch(weights), adamw_init(weights)
    with pytest.raises(ValueError, match="no ref_weights"):
        train_on_batch(weights, state, batch, bigram, LearnerConfig(beta=0.1), lr=0.1)
    with pytest.raises(ValueError, match="lr has 1 values for num_iterations = 2"):
        train_on_batch(weights, state, batch, bigram, LearnerConfig(num_iterations=2), lr=[0.1])


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": -1.0},
        {"num_iterations": 0},
        {"adam_beta1": 1.0},
        {"epochs": 0},
        {"learning_rate": 1e-6},
        {"sync_ref_model": True},
    ],
)
def test_the_configuration_has_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, LearnerConfig)


def test_the_mixture_by_hand() -> None:
    reference = {"a": mx.array([1.0, 2.0]), "b": mx.array([[4.0]])}
    policy = {"a": mx.array([3.0, -2.0]), "b": mx.array([[0.0]])}
    mixed = sync_reference(reference, policy, 0.25)
    np.testing.assert_allclose(np.array(mixed["a"]), [1.5, 1.0])
    np.testing.assert_allclose(np.array(mixed["b"]), [[3.0]])
    assert reference["a"].tolist() == [1.0, 2.0]


def test_the_ends_are_exact_and_dtypes_stay() -> None:
    reference = {"a": mx.array([0.1, 1e-3], dtype=mx.bfloat16)}
    policy = {"a": mx.array([0.7, -3.0], dtype=mx.bfloat16)}
    for alpha, expected in ((0.0, reference), (1.0, policy)):
        mixed = sync_reference(reference, policy, alpha)
        assert mixed["a"].dtype == mx.bfloat16
        assert mixed["a"].tolist() == expected["a"].tolist()


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not have the same weights \(b is in one alone\)"):
        sync_reference({"a": mx.zeros(1)}, {"a": mx.zeros(1), "b": mx.zeros(1)}, 0.5)
