"""Makes test vectors of the loss of episodes out of TRL 1.16: `python -m tests.support.make_trl_vectors`.

Writes `tests/data/trl/episodes.json` and `.safetensors`: random batches in which tokens of tools stand amid those that
were sampled (TRL's `tool_mask`), and what TRL's own loss says of them. Needs the package `trl`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "data" / "trl"
B, T, LIMIT = 6, 11, 12
SETTINGS: list[dict[str, Any]] = [
    {"loss_type": loss_type, **more}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    for more in (
        {"importance_sampling_level": "token", "beta": 0.0},
        {"importance_sampling_level": "sequence", "beta": 0.04},
        {"importance_sampling_level": "token", "beta": 0.04, "top_entropy_quantile": 0.6, "entropy_coef": 0.01},
        {"importance_sampling_level": "token", "beta": 0.0, "off_policy_mask_threshold": 0.05},
    )
]
DEFAULTS: dict[str, Any] = {
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "off_policy_mask_threshold": None,
}


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Episodes of several turns: a row of one turn, one cut by the limit, one that ends with a tool's words."""
    dice = np.random.default_rng(seed)
    lengths = dice.integers(4, T + 1, B)
    lengths[0] = T
    padding = (np.arange(T) < lengths[:, None]).astype(np.float32)
    tools = np.ones((B, T), np.float32)
    for row in range(1, B):
        start = int(dice.integers(1, lengths[row] - 1))
        tools[row, start : start + int(dice.integers(1, 4))] = 0.0
    tools[2, lengths[2] - 2 :] = 0.0
    logps = -dice.exponential(1.0, (B, T)).astype(np.float32)
    return {
        "completion_mask": padding,
        "tool_mask": tools,
        "logps": logps,
        "old": (logps + dice.normal(0, 0.3, (B, T))).astype(np.float32),
        "ref": (logps + dice.normal(0, 0.3, (B, T))).astype(np.float32),
        "entropies": dice.exponential(1.0, (B, T)).astype(np.float32),
        "advantages": dice.normal(0, 1, B).astype(np.float32),
    }


def trl_loss(batch: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss, and its gradients by log-probs and entropies."""
    torch, trainer = import_module("torch"), import_module("trl.trainer.grpo_trainer").GRPOTrainer
    x = {name: torch.tensor(values) for name, values in batch.items()}
    logps, entropies = x["logps"].requires_grad_(), x["entropies"].requires_grad_()
    s = DEFAULTS | settings
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda v: v, gather_for_metrics=lambda v: v, reduce=lambda v, reduction: v
    )
    accelerator.sync_gradients, accelerator.device = True, "cpu"
    accelerator.pad_across_processes = lambda v, **how: v
    args = SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1)
    args.sapo_temperature_pos, args.sapo_temperature_neg = 1.0, 1.05
    args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg = 2.0, 3.0, 3.0, 2.0
    own = SimpleNamespace(
        **{name: s[name] for name in ("loss_type", "importance_sampling_level", "beta", "entropy_coef")},
        top_entropy_quantile=s["top_entropy_quantile"],
        off_policy_mask_threshold=s["off_policy_mask_threshold"],
        epsilon_low=s["epsilon"],
        epsilon_high=s["epsilon_high"],
        accelerator=accelerator,
        args=args,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        use_vllm=False,
        use_adaptive_entropy=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=s["entropy_coef"] != 0.0,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
    )
    own.get_high_entropy_mask = lambda *given: trainer.get_high_entropy_mask(own, *given)
    mask = x["completion_mask"] * x["tool_mask"]
    inputs = {
        "prompt_ids": torch.ones(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.ones(B, T, dtype=torch.long),
        "completion_mask": x["completion_mask"],
        "tool_mask": x["tool_mask"],
        "advantages": x["advantages"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(own, None, inputs)
    loss.backward()
    grads = [np.zeros((B, T), np.float32) if v.grad is None else v.grad.numpy() for v in (logps, entropies)]
    return loss.item(), grads[0], grads[1]


def main() -> None:
    """Write all cases."""
    save_file = import_module("safetensors.numpy").save_file
    cases: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for number, settings in enumerate(SETTINGS):
        batch = make_batch(1000 + number)
        loss, by_logps, by_entropies = trl_loss(batch, settings)
        cases.append({"settings": DEFAULTS | settings, "loss": loss})
        found = batch | {"grad/logps": by_logps, "grad/entropies": by_entropies}
        tensors |= {f"{number}/{name}": values for name, values in found.items()}
    text = json.dumps({"max_completion_length": LIMIT, "episodes": cases}, indent=1)
    (FOLDER / "episodes.json").write_text(text + "\n")
    save_file(tensors, FOLDER / "episodes.safetensors")


if __name__ == "__main__":
    main()
