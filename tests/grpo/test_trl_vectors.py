"""The loss, the advantages and the log-probs against figures that TRL 1.16 computed, one test a case.

Reads `tests/data/trl/public.*`, or the folder named by TROUPE_TRL_VECTORS: one `*.json` + `*.safetensors` pair of
the same layout. A folder that is named and cannot be used fails the tests.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.grpo import (
    LossConfig,
    Normalizer,
    batch_normalizer,
    compute_advantages,
    entropy_from_logits,
    grpo_loss,
    reward_statistics,
    selective_log_softmax,
)
from troupe.grpo.losses import sampler_tallies
from troupe.grpo.metrics import averages
from troupe.grpo.ratios import entropy_threshold, high_entropy_mask, sampler_correction

Case = dict[str, Any]
Tensors = dict[str, mx.array]

TOLERANCE = 1e-5
OVER_THE_GENERATION_BATCH = {"dapo", "cispo", "vespo"}
"""Loss types that TRL divides by the tokens of a whole generation batch."""


def read_vectors() -> tuple[Case, Tensors]:
    folder = os.environ.get("TROUPE_TRL_VECTORS")
    if folder is None:
        path = Path(__file__).parents[1] / "data" / "trl" / "public.json"
    else:
        pairs = [p for p in Path(folder).glob("*.json") if p.with_suffix(".safetensors").exists()]
        pairs = [p for p in pairs if "loss" in json.loads(p.read_text())]
        if len(pairs) != 1:
            raise FileNotFoundError(f"TROUPE_TRL_VECTORS={folder} holds {len(pairs)} pairs of loss vectors, not 1")
        path = pairs[0]
    tensors = mx.load(str(path.with_suffix(".safetensors")))
    assert isinstance(tensors, dict)
    return json.loads(path.read_text()), tensors


VECTORS, TENSORS = read_vectors()


def number(value: Any) -> Any:
    """A JSON figure, whose NaN and infinities are strings and whose missing score is null."""
    if isinstance(value, list):
        return [number(v) for v in value]
    return math.nan if value is None else float(value)


def assert_close(actual: Any, expected: Any, scale: float = 1.0) -> None:
    """|a − b| ≤ tol · max(1, |b|, scale); NaN agrees with NaN."""
    a, b = np.array(actual, dtype=np.float64), np.array(expected, dtype=np.float64)
    assert a.shape == b.shape
    bound = TOLERANCE * np.maximum(np.maximum(1.0, np.abs(b)), scale)
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(a - b) / bound)
    assert np.all(off <= 1.0), f"off by {np.nanmax(off)} tolerances: {a} instead of {b}"


def assert_metrics(actual: dict[str, mx.array], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name].item(), number(value))


def loss_config(fields: Case) -> LossConfig:
    names = set(LossConfig.__struct_fields__)
    chosen = {name: value for name, value in fields.items() if name in names}
    return LossConfig(**chosen)


def trl_normalizer(
    config: LossConfig,
    mask: mx.array,
    entropies: mx.array,
    max_completion_length: int,
    inputs: Case,
) -> Normalizer:
    """What TRL divides the loss of one micro-batch by."""
    training = inputs["mode"] == "train"
    steps = inputs["gradient_accumulation_steps"] if training else 1
    tokens = mx.sum(mask).astype(mx.float32)
    if config.loss_type in OVER_THE_GENERATION_BATCH:
        share = steps / inputs["steps_per_generation"] if training else 1.0
        policy = mx.maximum(mx.array(float(inputs["num_items_in_batch"])), 1.0) * share
    else:
        local = batch_normalizer(config, rows=mask.shape[0], tokens=tokens, max_completion_length=max_completion_length)
        policy = mx.array(local.policy) * steps
    if config.top_entropy_quantile < 1.0:
        threshold = entropy_threshold(entropies, mask, config.top_entropy_quantile)
        tokens = mx.sum(high_entropy_mask(entropies, mask, threshold))
    return Normalizer(policy=policy, entropy=mx.maximum(tokens, 1.0) * steps)


def run_loss(case: Case, prefix: str, inputs: Case, max_completion_length: int) -> tuple[Any, Any, Any, Any]:
    """Loss, gradients with respect to log-probs and entropies, metrics."""
    tensor = {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}
    config = loss_config(case)
    mask = tensor["completion_mask"]
    if inputs["has_tool_mask"]:
        mask = mask * tensor["tool_mask"]
    if inputs["all_masked"]:
        mask = mx.zeros_like(mask)
    which = inputs["has_importance_sampling_ratio"]
    normalizer = trl_normalizer(config, mask, tensor["entropies"], max_completion_length, inputs)

    def loss(log_probs: mx.array, entropies: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        return grpo_loss(
            log_probs,
            tensor["old_per_token_logps"] if inputs["has_old_per_token_logps"] else None,
            tensor[inputs["advantages"]],
            mask,
            config,
            ref_per_token_logps=tensor.get("ref_per_token_logps"),
            entropies=entropies,
            sampling_per_token_logps=(
                tensor["sampling_per_token_logps"] if inputs["has_sampling_per_token_logps"] else None
            ),
            importance_sampling_ratio=None if which is None else tensor[f"is_ratio_{which}"],
            normalizer=normalizer,
        )

    (value, metrics), grads = mx.value_and_grad(loss, argnums=(0, 1))(tensor["per_token_logps"], tensor["entropies"])
    return value, grads[0], grads[1], metrics


def ids(cases: list[Case], *names: str) -> list[str]:
    return [f"{i}-" + "-".join(str(case.get(name, "")) for name in names) for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", VECTORS["loss"]["cases"], ids=lambda c: f"{c['id']}-{c['group']}-{c['batch']}")
def test_loss_gradients_and_metrics(case: Case) -> None:
    inputs = VECTORS["loss"]["input_defaults"] | case["inputs"]
    value, grad, entropy_grad, metrics = run_loss(
        case["config"], f"loss/{case['batch']}/", inputs, case["config"]["max_completion_length"]
    )
    expected = TENSORS["loss/grad_per_token_logps"][case["grad_index"]]
    assert_close(value.item(), number(case["loss"]))
    assert_close(value.item(), number(case["loss_f64"]))
    assert_close(np.array(grad), np.array(expected), scale=np.abs(np.array(expected)).max())
    if "entropy_grad_index" in case:
        assert_close(np.array(entropy_grad), np.array(TENSORS["loss/grad_entropies"][case["entropy_grad_index"]]))
        if case["config"]["loss_type"] not in OVER_THE_GENERATION_BATCH:
            # TRL logs this one part before it divides by the accumulation steps.
            metrics["policy_loss"] = metrics["policy_loss"] * inputs["gradient_accumulation_steps"]
        metrics["entropy_coef"] = mx.array(case["config"]["entropy_coef"])
    assert_metrics(metrics, case["metrics"])


@pytest.mark.parametrize("case", VECTORS["loss_t1"], ids=ids(VECTORS["loss_t1"], "loss_type"))
def test_completions_of_one_token(case: Case) -> None:
    inputs = VECTORS["loss"]["input_defaults"] | {"num_items_in_batch": case["num_items_in_batch"]}
    fields = {"use_bias_correction_kl": False} | case
    value, grad, _, metrics = run_loss(fields, "t1/", inputs, VECTORS["meta"]["hyper"]["max_completion_length"])
    assert_close(value.item(), case["loss"])
    assert_close(np.array(grad), case["grad"])
    assert_metrics(metrics, case["metrics"])


GMPO = VECTORS["gmpo"]["cases"]


@pytest.mark.parametrize("case", GMPO, ids=ids(GMPO, "batch", "beta"))
def test_gmpo(case: Case) -> None:
    inputs = VECTORS["loss"]["input_defaults"] | {"num_items_in_batch": 1}
    value, grad, _, metrics = run_loss(case | {"loss_type": "gmpo"}, f"gmpo/{case['batch']}/", inputs, 16)
    expected = TENSORS["gmpo/grad_per_token_logps"][case["grad_index"]]
    assert_close(value.item(), case["loss"])
    assert_close(np.array(grad), np.array(expected), scale=np.abs(np.array(expected)).max())
    assert_metrics(metrics, case["metrics"])


STEPS = VECTORS["accumulated_step"]["cases"]


@pytest.mark.parametrize("case", STEPS, ids=ids(STEPS, "loss_type"))
def test_accumulated_step_with_trls_normalizers(case: Case) -> None:
    inputs = VECTORS["loss"]["input_defaults"] | case
    tensor = {name.removeprefix("accum/"): value for name, value in TENSORS.items() if name.startswith("accum/")}
    config = loss_config(case)
    rows = tensor["advantages"].shape[0] // case["num_micro_batches"]
    losses, grads = [], []
    for i in range(case["num_micro_batches"]):
        part = {name: value[i * rows : (i + 1) * rows] for name, value in tensor.items() if "/" not in name}

        def loss(log_probs: mx.array, part: Tensors) -> mx.array:
            return grpo_loss(
                log_probs,
                part["old_per_token_logps"],
                part["advantages"],
                part["completion_mask"],
                config,
                ref_per_token_logps=part["ref_per_token_logps"],
                normalizer=trl_normalizer(
                    config, part["completion_mask"], part["entropies"], case["max_completion_length"], inputs
                ),
            )[0]

        value, grad = mx.value_and_grad(loss)(part["per_token_logps"], part)
        losses.append(value.item())
        grads.append(np.array(grad))
    assert_close(losses, case["micro_losses"])
    assert_close(sum(losses), case["step_loss"])
    assert_close(np.concatenate(grads), np.array(tensor[f"grad/{case['loss_type']}"]))


ADVANTAGES = VECTORS["advantages"]["cases"]


@pytest.mark.parametrize("case", ADVANTAGES, ids=[case["name"] for case in ADVANTAGES])
def test_advantages_and_reward_statistics(case: Case) -> None:
    rewards = mx.array(number(case["rewards_per_func"]))
    choices = {"weights": case["reward_weights"], "multi_objective_aggregation": case["multi_objective_aggregation"]}
    advantages = compute_advantages(rewards, case["num_generations"], case["scale_rewards"], **choices)
    assert_close(np.array(advantages), number(case["advantages"]))
    statistics = reward_statistics(rewards, case["num_generations"], case["scale_rewards"], **choices)
    for name, value in statistics.items():
        assert_close(value, number(case["metrics"][name]))


def padded(rows: list[list[Any]], filling: float) -> mx.array:
    width = max(len(row) for row in rows)
    return mx.array([number(row) + [filling] * (width - len(row)) for row in rows])


CORRECTION = VECTORS["vllm_importance_sampling"]


@pytest.mark.parametrize(
    "case", CORRECTION["cases"], ids=ids(CORRECTION["cases"], "mode", "clip_min", "clip_max", "sampling_logps_has_none")
)
def test_sampler_correction(case: Case) -> None:
    suffix = "_with_none" if case["sampling_logps_has_none"] else ""
    sampling = padded(CORRECTION[f"sampling_per_token_logps{suffix}"], 0.0)
    mask = padded([[1.0] * len(row) for row in CORRECTION["completion_ids"]], 0.0)
    old = TENSORS["vllm_is/old_per_token_logps"]
    ratio = sampler_correction(old, sampling, mask, case["mode"], case["clip_min"], case["clip_max"])
    assert_close(np.array(ratio), number(case["importance_sampling_ratio"]))
    assert_metrics(averages(sampler_tallies(old, sampling, ratio, mask)), case["metrics"])


MASKS = VECTORS["high_entropy_mask"]["cases"]


@pytest.mark.parametrize("case", MASKS, ids=ids(MASKS, "threshold"))
def test_high_entropy_mask(case: Case) -> None:
    entropies, mask = TENSORS["entropy_mask/entropies"], TENSORS["entropy_mask/mask"].astype(mx.float32)
    threshold = entropy_threshold(entropies, mask, 1.0 - case["threshold"])
    assert high_entropy_mask(entropies, mask, threshold).tolist() == case["mask"]


TEMPERATURES = [1.0, *VECTORS["logprobs"]["temperatures"]]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_and_entropies(temperature: float) -> None:
    suffix = "" if temperature == 1.0 else f"_T{temperature}"
    logits = TENSORS["logprobs/logits"] / temperature
    log_probs = selective_log_softmax(logits, TENSORS["logprobs/index"])
    assert_close(np.array(log_probs), np.array(TENSORS[f"logprobs/selective_log_softmax{suffix}"]))
    assert_close(np.array(entropy_from_logits(logits)), np.array(TENSORS[f"logprobs/entropy_from_logits{suffix}"]))


def test_logprobs_of_several_ids_a_position() -> None:
    log_probs = selective_log_softmax(TENSORS["logprobs/logits"], TENSORS["logprobs/index_k"])
    assert_close(np.array(log_probs), np.array(TENSORS["logprobs/selective_log_softmax_k"]))


def test_gradients_of_logprobs_and_entropies() -> None:
    logits, index, cotangent = (TENSORS[f"logprobs/{name}"] for name in ("logits", "index", "cotangent"))
    grad = mx.grad(lambda x: mx.sum(selective_log_softmax(x, index) * cotangent))(logits)
    assert_close(np.array(grad), np.array(TENSORS["logprobs/grad_selective_log_softmax"]))
    grad = mx.grad(lambda x: mx.sum(entropy_from_logits(x) * cotangent))(logits)
    assert_close(np.array(grad), np.array(TENSORS["logprobs/grad_entropy"]))
