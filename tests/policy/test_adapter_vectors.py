"""What PEFT, transformers and mlx-lm computed for adapters and quantized folders: the same here, and trained alike.

Reads `tests/data/adapters`, or the folder that TROUPE_ADAPTER_VECTORS names, of the same layout: `peft.json`,
`quantized.json` and `mlx.json` list the cases. A case over a network of a family that is not known is skipped by name.
"""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.policy import Policy, load_policy
from troupe.policy.folders import read_model_folder
from troupe.policy.network.forward import hidden_states, project

_SHIPPED = Path(__file__).parents[1] / "data" / "adapters"
FOLDER = Path(os.environ.get("TROUPE_ADAPTER_VECTORS") or _SHIPPED)


def listed(kind: str) -> dict[str, Any]:
    """What a JSON file of the folder says; a folder that lacks it is no folder of vectors."""
    found: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    return found


PEFT, QUANTIZED, MLX = listed("peft"), listed("quantized"), listed("mlx")


def base_of(case: dict[str, Any]) -> Path:
    return FOLDER / str(case["base"])


def logits_of(policy: Policy, row: mx.array) -> np.ndarray:
    return np.array(policy.model(row[None])[0].astype(mx.float32))


def assert_close(ours: np.ndarray, theirs: mx.array | np.ndarray, tolerance: float) -> None:
    expected = np.array(theirs)
    excess = np.abs(ours - expected) / np.maximum(1.0, np.abs(expected))
    assert excess.max() <= tolerance


@pytest.mark.parametrize("name", PEFT["adapters"])
def test_logits_are_peft_s(name: str) -> None:
    case = PEFT["adapters"][name]
    policy = load_policy(base_of(case), "float32", adapter=FOLDER / "peft" / name)
    stored = mx.load(str(FOLDER / "peft" / f"{name}.safetensors"))
    assert isinstance(stored, dict)
    for ids, mask, theirs in zip(stored["input_ids"], stored["attention_mask"], stored["logits"], strict=True):
        length = int(np.array(mask).sum())
        assert_close(logits_of(policy, ids[-length:]), theirs[-length:], 2e-5)


def test_logits_without_an_adapter_are_those_of_the_base() -> None:
    stored = mx.load(str(FOLDER / "base.without_adapter.safetensors"))
    assert isinstance(stored, dict)
    policy = load_policy(FOLDER / "base", "float32")
    for ids, mask, theirs in zip(stored["input_ids"], stored["attention_mask"], stored["logits"], strict=True):
        length = int(np.array(mask).sum())
        assert_close(logits_of(policy, ids[-length:]), theirs[-length:], 2e-5)


@pytest.mark.parametrize("name", PEFT["adapters"])
def test_five_updates_are_those_of_trl_s_loss_and_torch_s_adamw(name: str) -> None:
    case = PEFT["adapters"][name]
    policy = load_policy(base_of(case), "float32", adapter=FOLDER / "peft" / name)
    stored = mx.load(str(FOLDER / "peft" / f"{name}.safetensors"))
    assert isinstance(stored, dict)
    _assert_first_gradient(policy, case, stored)
    weights = dict(policy.weights)
    batch, log_probs = batch_of(case), log_probs_of(policy)
    config = learner_of(case, 5)
    result = train_on_batch(weights, adamw_init(weights), batch, log_probs, config, lr=case["lr"], ref_weights={})
    assert result.updated
    assert result.metrics["loss"] == pytest.approx(np.mean(case["losses"]), abs=2e-6)
    assert result.metrics["grad_norm"] == pytest.approx(np.mean(case["grad_norms"]), rel=2e-5)
    _assert_after(result.weights, stored, "after_5", case["lr"])
    once = train_on_batch(
        weights, adamw_init(weights), batch, log_probs, learner_of(case, 1), lr=case["lr"], ref_weights={}
    )
    assert once.metrics["loss"] == pytest.approx(case["losses"][0], abs=2e-6)
    assert once.metrics["grad_norm"] == pytest.approx(case["grad_norms"][0], rel=2e-5)
    _assert_after(once.weights, stored, "after_1", case["lr"])


def _assert_first_gradient(policy: Policy, case: dict[str, Any], stored: dict[str, mx.array]) -> None:
    theirs = {ours_for(name.removeprefix("grad/")): x for name, x in stored.items() if name.startswith("grad/")}
    grads: dict[str, mx.array] = {}
    old, ref, batch = stored["old_log_probs"], stored["ref_log_probs"], batch_of(case)
    log_probs = log_probs_of(policy)
    assert_close(np.array(log_probs(policy.weights, batch)[0]), old, 5e-6)
    assert_close(np.array(log_probs({}, batch)[0]), ref, 5e-6)

    def loss(ours: mx.array, entropies: mx.array) -> tuple[mx.array, tuple[()]]:
        ratio, apart, advantages = mx.exp(ours - old), ref - ours, batch.advantages[:, None]
        least = mx.minimum(ratio * advantages, mx.clip(ratio, 0.8, 1.2) * advantages)
        each = -least + PEFT["beta"] * (mx.exp(apart) - apart - 1) * ratio
        return (each * batch.completion_mask).sum() / batch.completion_mask.sum(), ()

    for _, portion in log_probs.gradients(policy.weights, batch, loss):
        mx.eval(portion)
        grads |= portion
    assert grads.keys() == theirs.keys() == policy.weights.keys()
    largest = max(float(mx.max(mx.abs(x))) for x in theirs.values())
    for name, x in theirs.items():
        assert float(mx.max(mx.abs(grads[name] - x))) <= 1e-5 * largest


def _assert_after(weights: dict[str, mx.array], stored: dict[str, mx.array], when: str, lr: float) -> None:
    theirs = {ours_for(name.removeprefix(f"{when}/")): x for name, x in stored.items() if name.startswith(f"{when}/")}
    assert weights.keys() == theirs.keys()
    apart = np.concatenate([np.abs(np.array(weights[name]) - np.array(x)).ravel() for name, x in theirs.items()])
    assert apart.mean() <= 1e-3 * lr
    assert apart.max() <= 0.3 * lr


def ours_for(name: str) -> str:
    """PEFT's name of a tensor → ours."""
    bare = name.removeprefix("base_model.model.").replace(".default.", ".")
    return bare if bare.endswith(".weight") else f"{bare}.weight"


def batch_of(case: dict[str, Any]) -> Any:
    grpo = case["grpo"]
    zeros = [[0.0] * len(row) for row in grpo["completions"]]
    return make_batch(grpo["prompts"], grpo["completions"], zeros, grpo["advantages"], pad_id=0)


def log_probs_of(policy: Policy) -> CompletionLogProbs:
    return CompletionLogProbs(policy.config, 1.0, entropy_gradient=False, base=policy.base)


def learner_of(case: dict[str, Any], num_iterations: int) -> LearnerConfig:
    return LearnerConfig(
        loss_type="dapo",
        beta=PEFT["beta"],
        epsilon=PEFT["epsilon"],
        num_iterations=num_iterations,
        vllm_importance_sampling_correction=False,
        lr_scheduler="constant",
        weight_decay=case["weight_decay"],
        max_grad_norm=case["max_grad_norm"],
    )


@pytest.mark.parametrize("name", QUANTIZED["models"])
def test_quantized_folders_give_mlx_lm_s_logits(name: str) -> None:
    stored = mx.load(str(FOLDER / "quantized.safetensors"))
    assert isinstance(stored, dict)
    config, weights = read_model_folder(FOLDER / "quantized" / name, "float32")
    theirs = stored.get(f"float32/{name}", stored[f"logits/{name}"])
    for place, row in enumerate(QUANTIZED["rows"]):
        ours = project(config, weights, hidden_states(config, weights, mx.array([row])))[0]
        assert_close(np.array(ours), theirs[place, : len(row)], 3e-5)


@pytest.mark.parametrize("name", MLX["adapters"])
def test_adapters_of_mlx_lm_give_its_logits(name: str) -> None:
    case = MLX["adapters"][name]
    stored = mx.load(str(FOLDER / "mlx.safetensors"))
    assert isinstance(stored, dict)
    policy = load_policy(base_of(case), "float32", adapter=FOLDER / "mlx" / name)
    for place, row in enumerate(MLX["rows"]):
        assert_close(logits_of(policy, mx.array(row)), stored[f"logits/{name}"][place, : len(row)], 3e-5)


@pytest.mark.parametrize("name", [name for name in MLX["adapters"] if (FOLDER / "mlx" / f"{name}.fused").is_dir()])
def test_folders_that_mlx_lm_fused_give_its_logits(name: str) -> None:
    stored = mx.load(str(FOLDER / "mlx.safetensors"))
    assert isinstance(stored, dict)
    policy = load_policy(FOLDER / "mlx" / f"{name}.fused", "float32")
    for place, row in enumerate(MLX["rows"]):
        assert_close(logits_of(policy, mx.array(row)), stored[f"logits/{name}.fused"][place, : len(row)], 3e-5)
