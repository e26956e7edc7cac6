"""Makes test vectors of Qwen3.5 out of tiny random networks of transformers: `python -m tests.support.make_vectors`.

Writes a folder, its older config.json (here the one for images and text, with `text_config`) and the expected numbers
of each case into `tests/data/adapters/families`, and adds the cases to `families.json`. Needs the `oracle` extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "data" / "adapters"
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3.5: three gated delta nets to a gated attention, a quarter of a head turned; tied", {}),
    "qwen3_5-irregular": (
        "Qwen3.5: layers in another order, biases in attention, half of a head turned, three taps; untied",
        {
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "attention_bias": True,
            "linear_conv_kernel_dim": 3,
            "linear_num_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
}
LENGTHS, NEW_TOKENS = (80, 66, 3), 16
ADVANTAGES = [-1.063, 0.149, 0.293, 1.485]


@contextmanager
def in_float64(torch: Any) -> Iterator[None]:
    """float64 wherever a network insists on float32: where rounding is magnified, as in norms of what is nearly 0, only
    more digits tell who is right."""
    single, float_ = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = single, float_


def make(name: str, about: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Write one case → what `families.json` says of it."""
    torch, transformers = import_module("torch"), import_module("transformers")
    save_file = import_module("safetensors.numpy").save_file
    dice = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tied = "layer_types" not in changes
    config = transformers.Qwen3_5TextConfig(**SIZES | {"tie_word_embeddings": tied, "initializer_range": 0.1} | changes)
    model = transformers.Qwen3_5ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = FOLDER / "families" / name
    model.save_pretrained(folder)
    model = model.double()
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    outer |= {"tie_word_embeddings": tied, "vision_config": {"model_type": "qwen3_5_vision", "depth": 1}}
    (folder / "config.v4.json").write_text(json.dumps(outer, indent=1))
    width, V = max(LENGTHS), SIZES["vocab_size"]
    ids, mask = np.zeros((3, width), np.int32), np.zeros((3, width), np.int32)
    logits, greedy = np.zeros((3, width, V), np.float32), np.zeros((3, NEW_TOKENS), np.int32)
    for i, length in enumerate(LENGTHS):
        row = torch.tensor(dice.integers(3, V, (1, length)))
        ids[i, -length:], mask[i, -length:] = row.numpy()[0], 1
        with torch.no_grad(), in_float64(torch):
            logits[i, -length:] = model(row).logits[0].numpy()
            told = model.generate(row, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        greedy[i] = told[0, length:].numpy()
    prompts = [dice.integers(3, V, 70).tolist()] * 2 + [dice.integers(3, V, 4).tolist()] * 2
    completions = [dice.integers(3, V, n).tolist() for n in (7, 69, 8, 3)]
    log_probs = np.zeros((4, 69), np.float32)
    loss, count = torch.zeros((), dtype=torch.float64), sum(map(len, completions))
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = torch.tensor([prompt + completion])
        with in_float64(torch):
            whole = model(row).logits
        every = torch.log_softmax(whole[0, :-1], -1).gather(-1, row[0, 1:, None])[:, 0]
        own = every[len(prompt) - 1 :]
        log_probs[i, : len(completion)] = own.detach().numpy()
        loss = loss - ADVANTAGES[i] * torch.exp(own - own.detach()).sum() / count
    loss.backward()
    found = {f"grad/{key}": parameter.grad.float().numpy() for key, parameter in model.named_parameters()}
    found |= {"input_ids": ids, "attention_mask": mask, "logits": logits, "greedy": greedy, "log_probs": log_probs}
    save_file(found, FOLDER / "families" / f"{name}.safetensors")
    grpo = {"prompts": prompts, "completions": completions, "advantages": ADVANTAGES, "loss": float(loss.detach())}
    return {
        "feature": about,
        "slack": 3.0,
        "own_slack": 12.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "grpo": grpo,
    }


def main() -> None:
    """All cases."""
    file = FOLDER / "families.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    for seed, (name, (about, changes)) in enumerate(CASES.items()):
        table["models"][name] = make(name, about, changes, seed)
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
