"""Whole training runs of TRL 1.16's GRPOTrainer on small Qwen3 models, replayed with our pure functions.

Every micro-batch that TRL trained on is stored with what TRL made of it. TRL has several optimizer steps a generation
batch and shuffles its rows, so the replay is a loop of its own over log-probs, loss, clipping and AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from tests.support.trl import assert_close, normalizer_of_a_micro_batch, number
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import (
    Batch,
    LearnerConfig,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    grpo_loss,
    learning_rate,
    make_batch,
    sync_reference,
)
from troupe.policy import load_policy

DATA = Path(__file__).parents[1] / "data"
RUNS = json.loads((DATA / "trl" / "qwen3_train.json").read_text())["runs"]
TOLERANCE = 1e-4
OF_WEIGHTS = 1e-5
"""They move by some 1e-3 in a run."""

Run = dict[str, Any]
Weights = dict[str, mx.array]


class Micro(NamedTuple):
    """One stored micro-batch: what TRL's loss was given."""

    batch: Batch
    num_items_in_batch: float
    old: np.ndarray | None
    ref: np.ndarray | None


def learner_config(run: Run) -> LearnerConfig:
    """TRL's settings under our names, with its own default of `steps_per_generation` left out."""
    fields, optimizer = run["config"], run["optimizer"]
    known = {name: value for name, value in fields.items() if name in LearnerConfig.__struct_fields__}
    return LearnerConfig(
        **known
        | {
            "lr": run["learning_rate"],
            "lr_scheduler": optimizer["lr_scheduler_type"].removeprefix("SchedulerType.").lower(),
            "warmup_steps": optimizer["warmup_steps"],
            "adam_beta1": optimizer["beta1"],
            "adam_beta2": optimizer["beta2"],
            "adam_epsilon": optimizer["eps"],
            "weight_decay": optimizer["weight_decay"],
            "max_grad_norm": optimizer["max_grad_norm"],
        }
    )


def micro_batches(run: Run) -> Iterator[Micro]:
    stored = mx.load(str(DATA / "trl" / "qwen3_train.safetensors"))
    assert isinstance(stored, dict)
    for i in range(len(run["micro_steps"])):
        prefix = f"{run['name']}/{i}/"
        x = {name.removeprefix(prefix): np.array(value) for name, value in stored.items() if name.startswith(prefix)}
        mask = x["completion_mask"]
        # a row that is left out of the loss still has its ids, of unknown length
        lengths = np.where(mask.any(axis=1), mask.sum(axis=1), mask.shape[1])
        completions = [row[:n].tolist() for row, n in zip(x["completion_ids"], lengths, strict=True)]
        batch = make_batch(
            [ids[kept > 0].tolist() for ids, kept in zip(x["prompt_ids"], x["prompt_mask"], strict=True)],
            completions,
            [[0.0] * len(ids) for ids in completions],
            mx.array(x["advantages"]),
            pad_id=0,
        )
        T = max(lengths)
        assert not mask[:, T:].any()
        yield Micro(
            batch=replace(batch, completion_mask=mx.array(mask[:, :T].astype(np.float32))),
            num_items_in_batch=float(x["num_items_in_batch"]),
            old=x["old_per_token_logps"][:, :T] if "old_per_token_logps" in x else None,
            ref=x["ref_per_token_logps"][:, :T] if "ref_per_token_logps" in x else None,
        )


def l2(weight: mx.array) -> float:
    return float(np.linalg.norm(np.array(weight, dtype=np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_a_run_of_trl_replayed_micro_batch_by_micro_batch(run: Run) -> None:
    config = learner_config(run)
    log_probs_of = CompletionLogProbs(
        (policy := load_policy(DATA / "qwen3" / run["model"])).config, run["config"]["temperature"]
    )
    weights: Weights = dict(policy.weights)
    state, reference = adamw_init(weights), weights
    accumulation = config.gradient_accumulation_steps or 1
    steps_per_generation = run["config"].get("steps_per_generation", accumulation)
    generation_weights, generation_reference = weights, reference
    total: Weights = {}
    losses: list[float] = []
    for i, (micro, stored) in enumerate(zip(micro_batches(run), run["micro_steps"], strict=True)):
        if i % (steps_per_generation * config.num_iterations) == 0:
            generation_weights, generation_reference = weights, reference
        mask = micro.batch.completion_mask
        there = np.array(mask) > 0
        old = ref = None
        if micro.old is not None:
            old, _ = log_probs_of(generation_weights, micro.batch)
            assert_close(np.array(old)[there], micro.old[there], TOLERANCE)
        if micro.ref is not None:
            ref, _ = log_probs_of(generation_reference, micro.batch)
            assert_close(np.array(ref)[there], micro.ref[there], TOLERANCE)

        def loss(w: Weights, micro: Micro, old: mx.array | None, ref: mx.array | None) -> tuple[mx.array, Weights]:
            log_probs, entropies = log_probs_of(w, micro.batch)
            normalizer = normalizer_of_a_micro_batch(
                config,
                micro.batch.completion_mask,
                entropies,
                num_items_in_batch=micro.num_items_in_batch,
                max_completion_length=run["max_completion_length"],
                gradient_accumulation_steps=accumulation,
                steps_per_generation=steps_per_generation,
            )
            return grpo_loss(
                log_probs,
                old,
                micro.batch.advantages,
                micro.batch.completion_mask,
                config,
                ref_per_token_logps=ref,
                entropies=entropies,
                normalizer=normalizer,
            )

        (value, metrics), grads = mx.value_and_grad(loss)(weights, micro, old, ref)
        assert_close(value.item(), number(stored["loss"]), TOLERANCE)
        assert set(metrics) == set(stored["metrics"])
        for name, metric in metrics.items():
            assert_close(metric.item(), number(stored["metrics"][name]), TOLERANCE)
        losses.append(float(value))
        total = {name: total[name] + grad for name, grad in grads.items()} if total else dict(grads)
        mx.eval(total)
        if (i + 1) % accumulation:
            continue

        step = i // accumulation
        logged = run["log_history"][step]
        clipped, norm = clip_by_global_norm(total, config.max_grad_norm)
        rate = learning_rate(step, run["max_steps"], config)
        weights, state = adamw_update(
            weights,
            clipped,
            state,
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        mx.eval(weights, state)
        if config.sync_ref_model and (step + 1) % config.ref_model_sync_steps == 0:
            reference = sync_reference(reference, weights, config.ref_model_mixup_alpha)
            mx.eval(reference)
        assert_close(sum(losses), logged["loss"], TOLERANCE)
        assert_close(float(norm), logged["grad_norm"], TOLERANCE)
        assert rate == pytest.approx(logged["learning_rate"], rel=1e-9, abs=1e-15)
        for name, expected in run["param_l2_after_step"][str(step + 1)].items():
            assert_close(l2(weights[name]), expected, OF_WEIGHTS)
        total, losses = {}, []
    assert_the_final_weights_are_theirs(run, weights)


def assert_the_final_weights_are_theirs(run: Run, weights: Weights) -> None:
    assert set(weights) == set(run["final_params"])
    for name, expected in run["final_params"].items():
        assert_close(l2(weights[name]), expected["l2"], OF_WEIGHTS)
        assert_close(np.array(weights[name]).reshape(-1)[:4], expected["first4"], OF_WEIGHTS)
    stored = mx.load(str(DATA / "trl" / "qwen3_train.safetensors"))
    assert isinstance(stored, dict)
    prefix = f"{run['name']}/final/"
    whole = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    assert whole
    for name, weight in whole.items():
        assert_close(np.array(weights[name]), np.array(weight), OF_WEIGHTS)
