"""TRL's side of `bench_tools.py`: one run of the real GRPOTrainer on the CPU, with a tool that sleeps.

    python benchmarks/vs_tools_theirs.py JOB.json RESULT.json

Runs in an interpreter that has TRL, and needs nothing of ours. The job: `model` (folder), `rows` (objects with
`prompt`, a list of messages), `sleep_s` (of a call), and `settings`, the arguments of GRPOConfig.
The result: `ended_s`, when each step ended, `slept_s`, in all calls after the first step, `calls_a_row` of the last
step, and `versions`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("trl", "torch", "transformers", "accelerate")


def varied_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Differs between completions, so that there is something to learn."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says."""
    # Not imported by name: the type checker of the repository runs without them.
    torch, datasets, transformers, trl = map(importlib.import_module, ("torch", "datasets", "transformers", "trl"))
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.response_template = {}  # whatever is said is taken for a call, see below
    ended_s: list[float] = []
    slept_s: list[float] = []

    async def wait() -> str:
        """Waits."""
        began_s = time.monotonic()
        await asyncio.sleep(job["sleep_s"])
        slept_s.append(time.monotonic() - began_s if ended_s else 0.0)
        return "Go on."

    def parsed(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "wait", "arguments": {}}}
        return {"role": "assistant", "content": tokenizer.decode(ids), "tool_calls": [call]}

    importlib.import_module("trl.trainer.grpo_trainer").parse_response = parsed  # type: ignore[attr-defined]

    class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ended_s.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=job["model"],
            reward_funcs=varied_reward,
            args=trl.GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,  # its default; matrix products of bfloat16 are slow on a CPU, and the other side has none
                gradient_accumulation_steps=1,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **job["settings"],
            ),
            train_dataset=datasets.Dataset.from_list(job["rows"]),
            processing_class=tokenizer,
            tools=[wait],
            callbacks=[Clock()],
        )
        trainer.train()
    told = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    versions = {name: version(name) for name in PACKAGES}
    calls_a_row = round(told[-1]["tools/call_frequency"])
    return {"ended_s": ended_s, "slept_s": sum(slept_s), "calls_a_row": calls_a_row, "versions": versions}


if __name__ == "__main__":
    result = run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
