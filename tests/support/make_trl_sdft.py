"""Makes test vectors of self-distillation out of TRL 1.16: `python -m tests.support.make_trl_sdft`.

Writes `tests/data/trl/sdft.json`: what TRL's SDFTTrainer makes of random logits where it looks at the sampled tokens
(loss, and its gradient by the logits), of a teacher's weights that follow a policy's, and of prompts with what the
teacher alone sees. Needs the package `trl`.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "data" / "trl" / "sdft.json"
B, T, V = 3, 5, 7
PROMPTS: list[tuple[Any, Any]] = [
    ("What is {1}+1?", "Two, {since} it is."),
    ([{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}], "2"),
    (
        [{"role": "user", "content": "1+1"}],
        [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}],
    ),
    ("12+30", 42),
]


def make_case(seed: int, temperature: float) -> dict[str, Any]:
    """Of completions of several lengths, and what TRL says of them."""
    torch, trainer = import_module("torch"), import_module("trl.experimental.sdft.sdft_trainer")
    dice = np.random.default_rng(seed)
    student, teacher = (dice.normal(0, 1.5, (B, T, V)).astype(np.float32) for _ in range(2))
    tokens = torch.tensor(dice.integers(0, V, (B, T)))
    mask = torch.tensor(np.arange(T) < np.array([T, 2, 4])[:, None]).float()
    logits = torch.tensor(student, requires_grad=True)
    said = torch.tensor(teacher) / temperature
    own = SimpleNamespace(
        args=SimpleNamespace(distillation_mode="sampled_token", distillation_alpha=1.0, distillation_is_clip=None),
        accelerator=SimpleNamespace(gather=lambda value: value),
        _log_self_distillation_metric=lambda mode, value: None,
    )
    both = SimpleNamespace(
        student_logits=logits / temperature, teacher_logits=said, completion_ids=tokens, loss_mask=mask
    )
    model = SimpleNamespace(training=True)
    loss = trainer.SDFTTrainer._compute_self_distillation_loss(own, model, {}, both)
    loss.backward()
    return {
        "temperature": temperature,
        "logits": student.tolist(),
        "tokens": tokens.tolist(),
        "lengths": mask.sum(dim=1).int().tolist(),
        "teacher_log_probs": torch.log_softmax(said, dim=-1).gather(-1, tokens[..., None])[..., 0].tolist(),
        "loss": loss.item(),
        "gradient": logits.grad.tolist(),
    }


def make_average(rate: float, every: int) -> dict[str, Any]:
    """Weights of a policy step by step, and of the teacher that follows them, which begins with the first."""
    torch, sync = import_module("torch"), import_module("trl.experimental.sdft.teacher_sync")
    import_module("accelerate").Accelerator(cpu=True)
    dice = np.random.default_rng(7)
    steps = [dice.normal(0, 1, (2, 3)).astype(np.float32) for _ in range(7)]
    policy, teacher = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
    teacher.weight.data = torch.tensor(steps[0])
    follow = sync.SyncTeacherModelCallback(teacher)
    args, found = SimpleNamespace(teacher_sync_steps=every, teacher_update_rate=rate), []
    for number, weights in enumerate(steps[1:], start=1):
        policy.weight.data = torch.tensor(weights)
        follow.on_step_end(args, SimpleNamespace(global_step=number), None, model=policy)
        found.append(teacher.weight.detach().tolist())
    return {"rate": rate, "every": every, "policy": [one.tolist() for one in steps], "teacher": found}


def make_prompt(prompt: Any, context: Any, template: str) -> dict[str, Any]:
    """What the teacher sees."""
    trainer = import_module("trl.experimental.sdft.sdft_trainer")
    args = SimpleNamespace(teacher_prompt_template=template)
    builder = trainer.DemonstrationTeacherContextBuilder(SimpleNamespace(args=args))
    seen = builder._compose_teacher_prompt(prompt, context)
    return {"prompt": prompt, "context": context, "template": template, "seen": seen}


if __name__ == "__main__":
    default = import_module("trl.experimental.sdft").SDFTConfig.teacher_prompt_template
    made = {
        "losses": [make_case(seed, 1.0 if seed else 0.7) for seed in range(3)],
        "averages": [make_average(0.05, 1), make_average(0.3, 2)],
        "default_template": default,
        "prompts": [make_prompt(*one, t) for one in PROMPTS for t in (default, "{privileged_context}: {prompt}")],
    }
    FILE.write_text(json.dumps(made) + "\n", encoding="utf-8")
