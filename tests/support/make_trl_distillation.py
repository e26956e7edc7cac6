"""Makes test vectors of on-policy distillation out of TRL 1.16: `python -m tests.support.make_trl_distillation`.

Writes `tests/data/trl/distillation.json`: random logits, and what TRL's IWOPDTrainer, without its weights by position
(`iw_opd_gamma` 0), says of the tokens that were sampled: the loss and its gradient by the logits. Needs the package
`trl`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "data" / "trl" / "distillation.json"
B, T, V = 3, 5, 7


def make_case(seed: int, temperature: float) -> dict[str, Any]:
    """Of completions of several lengths, and what TRL says of them."""
    torch, trainer = import_module("torch"), import_module("trl.experimental.iw_opd.iw_opd_trainer").IWOPDTrainer
    dice = np.random.default_rng(seed)
    student, teacher = (dice.normal(0, 1.5, (B, T, V)).astype(np.float32) for _ in range(2))
    tokens = dice.integers(0, V, (B, T))
    mask = np.arange(T) < np.array([T, 2, 4])[:, None]

    def chosen(logits: Any) -> Any:
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        return log_probs.gather(-1, torch.tensor(tokens)[..., None])[..., 0]

    logits = torch.tensor(student, requires_grad=True)
    said = chosen(torch.tensor(teacher)).detach()
    own = SimpleNamespace(
        temperature=temperature,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    labels = torch.where(torch.tensor(mask), torch.tensor(tokens), -100)
    loss_of = next(getattr(trainer, name) for name in dir(trainer) if "iw_opd_loss" in name)
    loss = loss_of(own, logits, torch.tensor(tokens), labels, said)
    loss.backward()
    return {
        "temperature": temperature,
        "logits": student.tolist(),
        "tokens": tokens.tolist(),
        "lengths": mask.sum(axis=1).tolist(),
        "teacher_log_probs": said.tolist(),
        "loss": loss.item(),
        "gradient": logits.grad.tolist(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps([make_case(seed, 1.0 if seed else 0.7) for seed in range(3)]) + "\n", encoding="utf-8")
