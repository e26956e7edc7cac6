"""Makes test vectors of one step each of TRL 1.16's trainers: `python -m tests.support.make_trl_steps`.

Writes `tests/data/trl/steps.json` and `.safetensors`: what RLOOTrainer, and GRPOTrainer with rewards that are
normalized one by one (GDPO), make of the completions of a tiny model: advantages, loss and gradients. Some scores are
missing. The old log-probs of RLOO are moved, so that its ratios are not 1. Needs the packages `trl` and `datasets`.
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data"
MODEL = "qwen3-tiny-tied"
PROMPTS = ["one", "two plus two", "a"]
G, LENGTH = 4, 8
STEPS: dict[str, dict[str, Any]] = {
    "rloo": {"trainer": "rloo", "beta": 0.0},
    "rloo-normalized": {"trainer": "rloo", "beta": 0.0, "normalize_advantages": True},
    "gdpo": {"trainer": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
}
KEPT = ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.3.input_layernorm.weight")


def by_ids(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Missing for some."""
    return [None if sum(ids) % 7 == 0 else (sum(ids) % 11) / 4 for ids in completion_ids]


def by_first(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Missing for others, now and then with the first."""
    return [None if sum(ids) % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]


def step_of(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One step of a trainer."""
    torch, trl, datasets = import_module("torch"), import_module("trl"), import_module("datasets")
    settings = dict(STEPS[name])
    is_rloo = settings.pop("trainer") == "rloo"
    trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if is_rloo else (trl.GRPOTrainer, trl.GRPOConfig)
    seen: dict[str, Any] = {}

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            seen["completions"] = [list(map(int, row)) for row in ids]
            seen["rewards"] = super()._calculate_rewards(inputs, prompts, completions, ids)
            return seen["rewards"]

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            seen["advantages"] = made["advantages"]
            return made

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            if is_rloo:
                moved = torch.linspace(-0.6, 0.6, len(inputs["old_logps"]))
                inputs = dict(inputs) | {"old_logps": inputs["old_logps"] + moved}
            loss = super()._compute_loss(model, inputs)
            names, weights = zip(*model.named_parameters(), strict=True)
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            seen.update(inputs=inputs, loss=float(loss), grads=dict(zip(names, grads, strict=True)))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        fixed = {"per_device_train_batch_size": len(PROMPTS) * G, "gradient_accumulation_steps": 1, "max_steps": 1}
        args = config(
            output_dir=folder,
            num_generations=G,
            max_completion_length=LENGTH,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=3,
            gradient_checkpointing=False,
            **fixed,
            **settings,
        )
        Watched(
            model=str(DATA / "qwen3" / MODEL),
            reward_funcs=[by_ids, by_first],
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        ).train()
    given = seen["inputs"]
    tensors = {key: given[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    tensors |= {"of_rows": given["advantages"], "advantages": seen["advantages"], "rewards": seen["rewards"]}
    tensors |= {"old_logps": given["old_logps"]} if is_rloo else {}
    tensors |= {f"grad/{kept}": seen["grads"][kept] for kept in KEPT}
    norms = {key: float(torch.linalg.vector_norm(grad.double())) for key, grad in seen["grads"].items()}
    case = {"name": name, "settings": settings, "loss": seen["loss"], "norms": norms}
    return case, {key: value.detach().numpy() for key, value in tensors.items()}


def main() -> None:
    """Write all steps."""
    cases: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for name in STEPS:
        case, found = step_of(name)
        cases.append(case)
        tensors |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in found.items()}
    about = {"model": MODEL, "num_generations": G, "max_completion_length": LENGTH, "steps": cases}
    (DATA / "trl" / "steps.json").write_text(json.dumps(about, indent=1) + "\n")
    import_module("safetensors.numpy").save_file(tensors, DATA / "trl" / "steps.safetensors")


if __name__ == "__main__":
    main()
