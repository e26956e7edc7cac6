"""TRL's side of `bench_vs_trl.py` and `bench_vs_step.py`: one run of the real GRPOTrainer on the CPU.

    python benchmarks/vs_trl_theirs.py JOB.json RESULT.json

Runs in an interpreter that has TRL, and needs nothing of ours. The job: `model` (folder), `rows` (objects with
`prompt`, `answer` and `prompt_ids`, in the order of training), `threads` (null: as many as it takes), `reward`
("exact_answer" or "varied"), and `settings`, the arguments of GRPOConfig.
The result: `origin_s`, when the first step began, `ended_s`, when each step ended (both on the monotonic clock, which
all processes of a machine share), `metrics` of each step, `versions` and `device`.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("trl", "torch", "transformers", "accelerate")


def exact_answer_reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Troupe's built-in `exact_answer`, for texts."""
    return [
        float(completion.strip() == expected.strip()) for completion, expected in zip(completions, answer, strict=True)
    ]


def varied_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Differs between completions, so that there is something to learn."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


REWARDS = {"exact_answer": exact_answer_reward, "varied": varied_reward}


def check_tokenizer(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Both sides must see the same ids; ValueError names the first prompt that TRL would see otherwise."""
    for row in rows:
        if (ids := tokenizer(row["prompt"])["input_ids"]) != row["prompt_ids"]:
            raise ValueError(f"prompt {row['prompt']!r} is {ids} here and {row['prompt_ids']} for Troupe")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says."""
    # Not imported by name: the type checker of the repository runs without them.
    torch, datasets, transformers, trl = map(importlib.import_module, ("torch", "datasets", "transformers", "trl"))
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    reward_of: Any = REWARDS[job["reward"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    check_tokenizer(tokenizer, job["rows"])
    began_s: list[float] = []
    ended_s: list[float] = []
    served: list[str] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            began_s.append(time.monotonic())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ended_s.append(time.monotonic())

    def reward(prompts: list[str], **columns: Any) -> list[float]:
        served.extend(prompts[:: job["settings"]["num_generations"]])
        found: list[float] = reward_of(**columns)
        return found

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=job["model"],
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,  # its default; matrix products of bfloat16 are slow on a CPU, and the other side has none
                shuffle_dataset=False,
                gradient_accumulation_steps=1,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **job["settings"],
            ),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": row["prompt"], "answer": row["answer"]} for row in job["rows"]]
            ),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if served != [row["prompt"] for row in job["rows"]]:
        raise ValueError("TRL trained on other prompts, or in another order, than it was given")
    metrics = [entry for entry in trainer.state.log_history if "reward" in entry]
    versions = {name: version(name) for name in PACKAGES}
    return {"origin_s": began_s[0], "ended_s": ended_s, "metrics": metrics, "versions": versions, "device": "cpu"}


if __name__ == "__main__":
    result = run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
