"""Makes test vectors of TRL 1.16's SFTTrainer: `python -m tests.support.make_trl_sft`.

Writes `tests/data/trl/sft.json`: what it makes of rows with the policy of the demo: ids and labels, the loss, the
entropy and the token accuracy of a batch, also of one that is split in two, and its gradients: the norm of each, and
some of one of them. Needs the packages `trl` and `datasets`.
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from troupe.cli.demo import DEMO_CONFIG

DATA = Path(__file__).parents[1] / "data"
TEMPLATE = (
    "{%- for m in messages %}{{ '<' + m.role + '>' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|endoftext|>' }}{% endgeneration %}"
    "{%- else %}{{ m.content }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = [
    {"prompt": "one and ", "completion": "two"},
    {"prompt": "a", "completion": "bcd efg hi jkl"},
    {"prompt": "two plus two is ", "completion": "4, and more"},
    {"prompt": "x", "completion": "y"},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two three"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "four"},
        ]
    },
    {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]},
]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "completions": (TEXTS, {}),
    "completions-in-two": (TEXTS, {"gradient_accumulation_steps": 2}),
    "texts": (TEXTS, {"completion_only_loss": False}),
    "cut": (TEXTS, {"max_length": 12}),
    "chats": (CHATS, {"assistant_only_loss": True}),
}
KEPT = "model.layers.0.self_attn.k_proj.weight"


def case_of(name: str) -> dict[str, Any]:
    """One optimizer step of the trainer."""
    torch, trl, datasets = import_module("torch"), import_module("trl"), import_module("datasets")
    rows, settings = CASES[name]
    seen: dict[str, Any] = {"ids": [], "labels": [], "loss": 0.0}
    parts = settings.get("gradient_accumulation_steps", 1)

    class Watched(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
                seen["ids"].append(ids)
                seen["labels"].append(labels)
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen["loss"] += float(loss)
            for figure in ("mean_token_accuracy", "entropy"):
                seen[figure] = [*seen.get(figure, []), self._metrics["train"][figure][-1]]
            seen["grads"] = {key: weight.grad.clone() for key, weight in model.named_parameters()}
            return loss

    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows) // parts,
            max_steps=1,
            max_grad_norm=1e9,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            eos_token="<|endoftext|>",
            chat_template_path=None,
            **settings,
        )
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(str(DEMO_CONFIG.parent / "policy"))
        tokenizer.chat_template = TEMPLATE
        Watched(
            model=str(DEMO_CONFIG.parent / "policy"),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()
    grads = seen.pop("grads")
    norms = {key: float(torch.linalg.vector_norm(grad.double())) for key, grad in grads.items()}
    return {"name": name, "rows": rows, "settings": settings, **seen, "norms": norms, "grad": grads[KEPT][:2].tolist()}


def main() -> None:
    """Write all cases."""
    about = {"template": TEMPLATE, "kept": KEPT, "cases": [case_of(name) for name in CASES]}
    (DATA / "trl" / "sft.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
