"""Every formula of ours that TRL 1.16 has too, against figures that TRL computed: one test a case or section.

Reads `tests/data/trl/public.*`, or the folder named by TROUPE_TRL_VECTORS: one `*.json` + `*.safetensors` pair of the
same layout, of any name, shapes and number of cases. A folder that cannot be used, a section that is missing and a
section without cases fail; nothing is skipped. The order of prompts (`repeat_sampler`) is our own.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support import trl
from tests.support.fakes import make_prompt, make_rollout
from tests.support.trl import number
from troupe.actors.learner.batch import assemble
from troupe.grpo import (
    LearnerConfig,
    LossConfig,
    Normalizer,
    compute_advantages,
    entropy_control,
    entropy_from_logits,
    grpo_loss,
    reward_statistics,
    selective_log_softmax,
    sync_reference,
)
from troupe.grpo.comparisons import (
    entropy_threshold,
    high_entropy_mask,
    importance_ratio,
    masked_difference,
    reference_kl,
    sampler_correction,
)
from troupe.grpo.loss import EntropyControl, has_entropy_bonus, loss_and_tallies, sampler_tallies
from troupe.grpo.tallies import averages, merge
from troupe.messages import RolloutGroup, ScoredGroup
from troupe.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

Case = dict[str, Any]
Tensors = dict[str, mx.array]

TOLERANCE = 1e-5
BF16 = 2.0**-7
"""A unit in the last place of a bfloat16, relative to the number."""
DEFAULT_MAX_COMPLETION_LENGTH = 256
"""TRL's."""


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


def section(*path: str) -> Any:
    """A part of the file that must be there and hold something."""
    part: Any = VECTORS
    for name in path:
        part = part[name]
    assert part, f"the section {'/'.join(path)} is empty"
    return part


def tensors(prefix: str) -> Tensors:
    """The tensors directly under a prefix, by their last names."""
    found = {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if "/" not in name}


def ids(cases: list[Case], *names: str) -> list[str]:
    return [f"{i}-" + "-".join(str(case.get(name, "")) for name in names) for i, case in enumerate(cases)]


def assert_close(actual: Any, expected: Any, scale: float = 1.0, tolerance: float = TOLERANCE) -> None:
    trl.assert_close(actual, expected, tolerance, scale)


def assert_gradient(actual: mx.array, expected: Any, batch: str) -> None:
    """Element by element; in a batch of extreme ratios relative to the largest element."""
    wanted = np.array(expected)
    assert_close(np.array(actual), wanted, scale=np.abs(wanted).max() if batch == "extreme" else 1.0)


def assert_metrics(actual: dict[str, mx.array], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name].item(), number(value))


# ---- the loss


def loss_config(fields: Case) -> LossConfig:
    names = set(LossConfig.__struct_fields__)
    return LossConfig(**{name: value for name, value in fields.items() if name in names})


def trl_normalizer(
    config: LossConfig, mask: mx.array, entropies: mx.array, max_completion_length: int, inputs: Case
) -> Normalizer:
    names = ("gradient_accumulation_steps", "steps_per_generation", "mode")
    return trl.normalizer_of_a_micro_batch(
        config,
        mask,
        entropies,
        num_items_in_batch=inputs.get("num_items_in_batch", math.nan),
        max_completion_length=max_completion_length,
        **{name: inputs[name] for name in names},
    )


def accumulation_steps(inputs: Case) -> int:
    steps: int = inputs["gradient_accumulation_steps"]
    return steps if inputs["mode"] == "train" else 1


def run_loss(fields: Case, prefix: str, inputs: Case) -> tuple[Any, Any, Any, Any]:
    """Loss, gradients with respect to log-probs and entropies, metrics."""
    tensor = tensors(prefix)
    config = loss_config(fields)
    mask = tensor["completion_mask"]
    if inputs["has_tool_mask"]:
        mask = mask * tensor["tool_mask"]
    if inputs["all_masked"]:
        mask = mx.zeros_like(mask)
    which = inputs["has_importance_sampling_ratio"]
    longest = fields.get("max_completion_length", DEFAULT_MAX_COMPLETION_LENGTH)
    normalizer = trl_normalizer(config, mask, tensor["entropies"], longest, inputs)

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
    return value, grads[0], grads[1], as_trl_logs(metrics, config, inputs)


def as_trl_logs(metrics: Tensors, config: LossConfig, inputs: Case) -> Tensors:
    """TRL logs the policy part of most losses before it divides by the accumulation steps, and a fixed coefficient."""
    if not has_entropy_bonus(config):
        return metrics
    logged = dict(metrics)
    if config.loss_type not in trl.OVER_THE_GENERATION_BATCH:
        logged["policy_loss"] = metrics["policy_loss"] * accumulation_steps(inputs)
    if inputs["mode"] == "train" and not config.use_adaptive_entropy:
        logged["entropy_coef"] = mx.array(config.entropy_coef)
    return logged


INPUTS = section("loss", "input_defaults")


@pytest.mark.parametrize("case", section("loss", "cases"), ids=lambda c: f"{c['id']}-{c['group']}-{c['batch']}")
def test_loss_gradients_and_metrics(case: Case) -> None:
    unknown = set(case["config"]) - set(LossConfig.__struct_fields__) - {"max_completion_length"}
    assert not unknown, f"the case sets {unknown}, which the loss does not know"
    value, grad, entropy_grad, metrics = run_loss(case["config"], f"loss/{case['batch']}/", INPUTS | case["inputs"])
    assert_close(value.item(), number(case["loss"]))
    assert_close(value.item(), number(case["loss_f64"]))
    assert_gradient(grad, TENSORS["loss/grad_per_token_logps"][case["grad_index"]], case["batch"])
    if "entropy_grad_index" in case:
        assert_gradient(entropy_grad, TENSORS["loss/grad_entropies"][case["entropy_grad_index"]], case["batch"])
    else:
        assert not np.array(entropy_grad).any()
    assert_metrics(metrics, case["metrics"])


@pytest.mark.parametrize("case", section("loss_t1"), ids=ids(section("loss_t1"), "loss_type"))
def test_completions_of_one_token(case: Case) -> None:
    longest = VECTORS["meta"]["hyper"]["max_completion_length"]
    fields = {"use_bias_correction_kl": False, "max_completion_length": longest} | case
    value, grad, _, metrics = run_loss(fields, "t1/", INPUTS | {"num_items_in_batch": case["num_items_in_batch"]})
    assert_close(value.item(), case["loss"])
    assert_gradient(grad, case["grad"], "mild")
    assert_metrics(metrics, case["metrics"])


GMPO = section("gmpo", "cases")


@pytest.mark.parametrize("case", GMPO, ids=ids(GMPO, "batch", "beta"))
def test_gmpo(case: Case) -> None:
    value, grad, _, metrics = run_loss(case | {"loss_type": "gmpo"}, f"gmpo/{case['batch']}/", INPUTS)
    assert_close(value.item(), case["loss"])
    assert_gradient(grad, TENSORS["gmpo/grad_per_token_logps"][case["grad_index"]], case["batch"])
    assert_metrics(metrics, case["metrics"])


STEPS = section("accumulated_step", "cases")


@pytest.mark.parametrize("case", STEPS, ids=ids(STEPS, "loss_type"))
def test_accumulated_step_with_trls_normalizers(case: Case) -> None:
    inputs, tensor, config = INPUTS | case, tensors("accum/"), loss_config(case)
    rows = tensor["advantages"].shape[0] // case["num_micro_batches"]
    losses, grads = [], []
    for i in range(case["num_micro_batches"]):
        part = {name: value[i * rows : (i + 1) * rows] for name, value in tensor.items()}

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
    assert_close(np.concatenate(grads), np.array(TENSORS[f"accum/grad/{case['loss_type']}"]))


def test_adaptive_entropy_over_many_micro_batches() -> None:
    fields, steps, tensor = (
        section("adaptive_entropy", "config"),
        section("adaptive_entropy", "steps"),
        tensors("adaptive_entropy/"),
    )
    inputs = INPUTS | {name: value for name, value in fields.items() if name in INPUTS}
    config, mask = loss_config(fields), tensor["completion_mask"]
    control, window = entropy_control({}, config), []
    for step in steps:
        assert_close(control.coef, step["entropy_coef_before"])
        entropies = tensor["entropies"] * step["entropy_scale"]
        value, tallies = loss_and_tallies(
            tensor["per_token_logps"],
            tensor["old_per_token_logps"],
            tensor["advantages"],
            mask,
            config,
            entropies=entropies,
            entropy_coef=control.in_force(config),
            normalizer=trl_normalizer(config, mask, entropies, DEFAULT_MAX_COMPLETION_LENGTH, inputs),
        )
        assert_close(value.item(), step["loss"])
        window.append(tallies)
        metrics = as_trl_logs(averages(tallies), config, inputs)
        del metrics["controlled_entropy"]  # ours
        if step["sync_gradients"]:
            control = control.after_update(float(averages(merge(window))["controlled_entropy"]), config)
            metrics["entropy_coef"] = mx.array(control.coef)
            window = []
        assert_metrics(metrics, step["metrics"])
        assert_close(control.coef, step["entropy_coef_after"])
        assert_close(control.last_entropy, number(step["last_world_entropy"]))
        kept = control.as_state(config)
        assert entropy_control(kept, config) == EntropyControl(*map(float, kept.values()))


# ---- advantages


ADVANTAGES = section("advantages", "cases")


def rows_that_trl_rounds(case: Case) -> np.ndarray:
    """Whether TRL may give a row a signal where there is none: all rewards of its group are the same number.

    The float32 mean of equal numbers need not be that number, unless they are a power of two.
    """
    rewards, G = np.array(number(case["rewards_per_func"]), dtype=np.float32), case["num_generations"]
    totals = np.nansum(rewards * np.float32(case["reward_weights"] or 1.0), axis=1)
    columns = [np.where(np.isnan(rewards).all(axis=1), np.nan, totals)]
    separately = case["multi_objective_aggregation"] == "normalize_then_sum"
    if separately:
        columns += rewards.T.tolist()
    groups = np.array(columns).reshape(len(columns), -1, G)
    there = ~np.isnan(groups)
    equal = np.where(there, groups, -np.inf).max(axis=2) == np.where(there, groups, np.inf).min(axis=2)
    count = there.sum(axis=2)
    rounded = np.any(equal & (count & (count - 1) != 0), axis=0)
    return np.repeat(rounded.any() | rounded if separately else rounded, G)


@pytest.mark.parametrize("case", ADVANTAGES, ids=[case["name"] for case in ADVANTAGES])
def test_advantages_and_reward_statistics(case: Case) -> None:
    rewards = mx.array(number(case["rewards_per_func"]))
    choices = {"weights": case["reward_weights"], "multi_objective_aggregation": case["multi_objective_aggregation"]}
    advantages = np.array(compute_advantages(rewards, case["num_generations"], case["scale_rewards"], **choices))
    rounded, expected = rows_that_trl_rounds(case), np.array(number(case["advantages"]))
    assert_close(advantages[~rounded], expected[~rounded])
    if case["multi_objective_aggregation"] == "sum_then_normalize":
        assert not advantages[rounded].any()
    else:  # one group's rounding moves the mean of the batch
        assert_close(advantages, expected, tolerance=1e-2 if rounded.any() else TOLERANCE)
    statistics = reward_statistics(rewards, case["num_generations"], case["scale_rewards"], **choices)
    for name, value in statistics.items():
        logged = number(case["metrics"][name])
        if name == "frac_reward_zero_std" and rounded.any():
            assert value >= logged
        else:
            assert_close(value, logged)


@pytest.mark.parametrize("case", ADVANTAGES, ids=[case["name"] for case in ADVANTAGES])
def test_masks_and_metrics_of_completions(case: Case) -> None:
    ended = (case["eos_token_id"], case["pad_token_id"])
    rollouts = [
        make_rollout(row, reason="stop" if row and row[-1] in ended else "length") for row in case["completion_ids"]
    ]
    G, scores = case["num_generations"], number(case["rewards_per_func"])
    table = [tuple(None if math.isnan(score) else score for score in row) for row in scores]
    training = case["mode"] == "train"  # TRL does not count the tokens of an evaluation
    prompt_tokens = case["metrics"]["num_tokens"] - sum(map(len, case["completion_ids"])) if training else len(rollouts)
    assert prompt_tokens % len(rollouts) == 0
    groups = []
    for place, start in enumerate(range(0, len(rollouts), G)):
        prompt_ids = (7,) * int(prompt_tokens // len(rollouts))
        prompt = msgspec.structs.replace(make_prompt(0, place), prompt_ids=prompt_ids)
        columns = zip(*table[start : start + G], strict=True)
        groups.append(
            ScoredGroup(
                group=RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[start : start + G])),
                scores={f"r{j}": column for j, column in enumerate(columns)},
            )
        )
    config = LearnerConfig(
        scale_rewards=case["scale_rewards"], multi_objective_aggregation=case["multi_objective_aggregation"]
    )
    weights = dict(zip(groups[0].scores, case["reward_weights"] or [1.0] * len(scores[0]), strict=True))
    made = assemble(groups, config, weights=weights, pad_id=case["pad_token_id"])
    batch = made.batch.without_truncated() if case["mask_truncated_completions"] else made.batch
    assert batch.completion_mask.tolist() == case["completion_mask"]
    assert_close(mx.sum(batch.completion_mask).item(), case["num_items_in_batch"])
    assert set(case["metrics"]) <= set(made.metrics)
    for name, value in case["metrics"].items():
        if name.startswith("completions/") or (name == "num_tokens" and training):
            assert_close(made.metrics[name], number(value))


ASYNC_ADVANTAGES = section("async_grpo", "advantages", "cases")


@pytest.mark.parametrize("case", ASYNC_ADVANTAGES, ids=ids(ASYNC_ADVANTAGES))
def test_asynchronous_advantages_differ_in_the_standard_deviation_alone(case: Case) -> None:
    # TRL's experimental trainer divides by the deviation of the population, ddof 0, plus 1e-8.
    rewards = mx.array(number(case["rewards_per_func"]))
    G = rewards.shape[0]
    statistics = reward_statistics(rewards, G)
    scored = sum(not all(map(math.isnan, row)) for row in number(case["rewards_per_func"]))
    spread = statistics["reward_std"] * math.sqrt((scored - 1) / scored) if scored > 1 else 0.0
    centered = np.array(compute_advantages(rewards, G, "none"), dtype=np.float64)
    assert_close(centered / (spread + 1e-8), number(case["advantages"]))
    for metrics in case["sample_metrics"]:
        assert_close(spread if scored else math.nan, number(metrics["reward_std"]))


ASYNC_LOSSES = section("async_grpo", "loss", "cases")


@pytest.mark.parametrize("case", ASYNC_LOSSES, ids=ids(ASYNC_LOSSES, "epsilon_high", "global_n_tokens"))
def test_asynchronous_loss_is_dapo_over_all_tokens(case: Case) -> None:
    tensor = tensors("async/")
    old, mask = tensor["old_per_token_logps"], tensor["completion_mask"]
    config = LossConfig(loss_type="dapo", epsilon=case["epsilon"], epsilon_high=case["epsilon_high"])
    policy = float(max(case["global_n_tokens"], 1) * case["gradient_accumulation_steps"])

    def loss(log_probs: mx.array) -> tuple[mx.array, Tensors]:
        return grpo_loss(
            log_probs,
            old,
            tensor["advantages"],
            mask,
            config,
            entropies=tensor["entropies"],
            normalizer=Normalizer(policy=policy, entropy=None),
        )

    (value, metrics), grad = mx.value_and_grad(loss)(tensor["per_token_logps"])
    tokens = np.array(mask) > 0
    ratio = importance_ratio(masked_difference(tensor["per_token_logps"], old, mask), mask, "token")
    metrics["ratio"] = mx.array(np.array(ratio)[tokens].mean())
    metrics["kl"] = mx.array(np.array(reference_kl(old, tensor["per_token_logps"], mask))[tokens].mean())
    assert_close(value.item(), case["loss"])
    assert_gradient(mx.array(np.array(grad)[tokens]), case["grad"], "mild")
    assert not np.array(grad)[~tokens].any()
    assert_metrics(metrics, case["metrics"])


# ---- log-probs, entropies, ratios


def padded(rows: list[list[Any]], filling: float) -> mx.array:
    width = max(len(row) for row in rows)
    return mx.array([number(row) + [filling] * (width - len(row)) for row in rows])


CORRECTION = section("vllm_importance_sampling")


@pytest.mark.parametrize(
    "case",
    section("vllm_importance_sampling", "cases"),
    ids=ids(CORRECTION["cases"], "mode", "clip_min", "clip_max", "sampling_logps_has_none"),
)
def test_sampler_correction(case: Case) -> None:
    assert case["error"] is None
    suffix = "_with_none" if case["sampling_logps_has_none"] else ""
    sampling = padded(CORRECTION[f"sampling_per_token_logps{suffix}"], 0.0)
    mask = padded([[1.0] * len(row) for row in CORRECTION["completion_ids"]], 0.0)
    old = TENSORS["vllm_is/old_per_token_logps"]
    ratio = sampler_correction(old, sampling, mask, case["mode"], case["clip_min"], case["clip_max"])
    assert_close(np.array(ratio), number(case["importance_sampling_ratio"]))
    assert_metrics(averages(sampler_tallies(old, sampling, ratio, mask)), case["metrics"])


MASKS = section("high_entropy_mask", "cases")


@pytest.mark.parametrize("case", MASKS, ids=ids(MASKS, "threshold"))
def test_high_entropy_mask(case: Case) -> None:
    entropies, mask = TENSORS["entropy_mask/entropies"], TENSORS["entropy_mask/mask"].astype(mx.float32)
    threshold = entropy_threshold(entropies, mask, 1.0 - case["threshold"])
    assert high_entropy_mask(entropies, mask, threshold).tolist() == case["mask"]


@pytest.mark.parametrize("temperature", [None, *section("logprobs", "temperatures")])
def test_logprobs_and_entropies(temperature: float | None) -> None:
    suffix = "" if temperature is None else f"_T{temperature}"
    logits = TENSORS["logprobs/logits"] / (temperature or 1.0)
    log_probs = selective_log_softmax(logits, TENSORS["logprobs/index"])
    assert_close(np.array(log_probs), np.array(TENSORS[f"logprobs/selective_log_softmax{suffix}"]))
    assert_close(np.array(entropy_from_logits(logits)), np.array(TENSORS[f"logprobs/entropy_from_logits{suffix}"]))


def test_logprobs_of_several_ids_a_position() -> None:
    log_probs = selective_log_softmax(TENSORS["logprobs/logits"], TENSORS["logprobs/index_k"])
    assert_close(np.array(log_probs), np.array(TENSORS["logprobs/selective_log_softmax_k"]))


def test_logprobs_of_bfloat16_logits_are_those_of_trl_before_it_rounds_them() -> None:
    logits, index = TENSORS["logprobs/logits"].astype(mx.bfloat16), TENSORS["logprobs/index"]
    log_probs, entropies = selective_log_softmax(logits, index), entropy_from_logits(logits)
    assert log_probs.dtype == entropies.dtype == mx.float32
    exact = np.array(logits.astype(mx.float32), dtype=np.float64)
    exact = exact - np.log(np.sum(np.exp(exact), axis=-1, keepdims=True))
    assert_close(np.array(log_probs), np.take_along_axis(exact, np.array(index)[..., None], axis=-1)[..., 0])
    assert_close(np.array(entropies), -np.sum(np.exp(exact) * exact, axis=-1))
    assert_close(np.array(log_probs), np.array(TENSORS["logprobs/selective_log_softmax_bf16"]), tolerance=BF16)
    # TRL takes exponentials and products in bfloat16 too
    assert_close(np.array(entropies), np.array(TENSORS["logprobs/entropy_from_logits_bf16"]), tolerance=2 * BF16)


def test_gradients_of_logprobs_and_entropies() -> None:
    logits, index, cotangent = (TENSORS[f"logprobs/{name}"] for name in ("logits", "index", "cotangent"))
    grad = mx.grad(lambda x: mx.sum(selective_log_softmax(x, index) * cotangent))(logits)
    assert_close(np.array(grad), np.array(TENSORS["logprobs/grad_selective_log_softmax"]))
    grad = mx.grad(lambda x: mx.sum(entropy_from_logits(x) * cotangent))(logits)
    assert_close(np.array(grad), np.array(TENSORS["logprobs/grad_entropy"]))


# ---- the reference policy and the rewards


def test_reference_follows_the_policy() -> None:
    case = section("ref_sync")
    reference, policy = mx.array(number(case["ref_before"])), mx.array(number(case["policy"]))
    synced = sync_reference({"w": reference}, {"w": policy}, case["alpha"])
    assert_close(np.array(synced["w"]), case["ref_after"])


def test_soft_overlong_punishment() -> None:
    case = section("builtin_rewards", "soft_overlong_punishment")
    reward = get_soft_overlong_punishment(case["max_completion_len"], case["soft_punish_cache"])
    assert_close(reward(completion_ids=[[1] * length for length in case["lengths"]]), case["rewards"])


REPETITION = section("builtin_rewards", "repetition_penalty")


@pytest.mark.parametrize("case", REPETITION, ids=ids(REPETITION, "ngram_size", "max_penalty"))
def test_repetition_penalty(case: Case) -> None:
    reward = get_repetition_penalty_reward(case["ngram_size"], case["max_penalty"])
    assert_close(reward(completion_ids=case["completion_ids"]), case["rewards"])


def test_think_format() -> None:
    case = section("builtin_rewards", "think_format")
    assert think_format_reward(case["texts"]) == case["rewards"]
    assert think_format_reward([[{"role": "assistant", "content": text}] for text in case["texts"]]) == case["rewards"]
