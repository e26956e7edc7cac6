"""mlx-lm-lora's side of `bench_vs_step.py`: its train_grpo on the job's prompts.

    python benchmarks/vs_step_lora.py JOB.json RESULT.json

Runs in an interpreter that has mlx-lm-lora, and needs nothing of ours. The job is that of `vs_trl_theirs.py`. The
result: `ended_s`, when each step was reported, which is after its weights were computed, and `versions`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Clock:
    """Notes when each step was reported."""

    def __init__(self) -> None:
        self.ended_s: list[float] = []

    def on_train_loss_report(self, _info: dict[str, Any]) -> None:
        """Called by the trainer after the step."""
        self.ended_s.append(time.monotonic())

    def on_val_loss_report(self, _info: dict[str, Any]) -> None:
        """Called by the trainer; there is no validation."""


def varied(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says."""
    with suppress(OSError):  # the library that the other side computes with, loaded before MLX asks for its own
        ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
    # Not imported by name: the type checker of the repository runs without them.
    optimizers = importlib.import_module("mlx.optimizers")
    model, tokenizer = importlib.import_module("mlx_lm").load(job["model"])
    trainer = importlib.import_module("mlx_lm_lora.trainer.grpo_trainer")
    settings, clock = job["settings"], Clock()
    if rank := job.get("lora_rank"):
        model.freeze()
        tuner = importlib.import_module("mlx_lm.tuner.utils")
        tuner.linear_to_lora_layers(model, -1, {"rank": rank, "scale": 2.0, "dropout": 0.0})
    prompts = settings["per_device_train_batch_size"] // settings["num_generations"]

    def reward(prompts: list[str], completions: list[str], answer: list[str], types: Any = None) -> list[float]:
        return varied(completions)

    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.GRPOTrainingArgs(
            batch_size=prompts,
            iters=settings["max_steps"],
            steps_per_report=1,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            max_seq_length=2048,
            grad_checkpoint=settings["gradient_checkpointing"],
            group_size=settings["num_generations"],
            beta=settings["beta"],
            max_completion_length=settings["max_completion_length"],
            temperature=1.0,
            top_p=0.0,
            top_k=0,
            min_p=0.0,
            gradient_accumulation_steps=1,
        )
        rows = [(row["prompt_ids"], [1], row["prompt"], "") for row in job["rows"]]
        trainer.train_grpo(
            model,
            None,
            tokenizer,
            optimizers.AdamW(settings["learning_rate"]),
            rows,
            None,
            reward_funcs=[reward],
            args=arguments,
            training_callback=clock,
            end_answer_token="",  # none ends a completion early
        )
    peak = importlib.import_module("mlx.core").get_peak_memory() / 1e9
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "mlx-lm-lora")}
    return {"ended_s": clock.ended_s, "peak_memory_gb": round(peak, 3), "versions": versions}


if __name__ == "__main__":
    result = run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
