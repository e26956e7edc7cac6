"""What a run leaves behind is a model for others: mlx-lm generates from it, transformers gives the same greedy tokens.

Marked slow, and skipped where the `oracle` extra is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import troupe
from tests.support.extras import extra
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import GenerationConfig, RolloutEngine, RolloutRequest, complete_texts, load_policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SUMS = ("12+34=", "7+85=", "99+1=", "40+40=")
FOLDERS = ("final", "checkpoints/step-00000001", "checkpoints/step-00000002")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the demo, two steps long, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("run") / "out"
    settings = ["learner.max_steps=2", "checkpoint.every=1", "metrics.sinks=[]", f"output={out}"]
    assert troupe.train(troupe.load_config(DEMO_CONFIG, settings)).complete
    return out


def greedy_ids(folder: Path, prompt: str, count: int) -> list[int]:
    """What we continue a text with, the stop token included."""
    policy = load_policy(folder)
    config = GenerationConfig(num_generations=1, temperature=0.0, max_completion_length=count)
    engine = RolloutEngine(policy.config, config, stop_ids=policy.eos_ids, tokenizer=policy.tokenizer)
    engine.load(policy.weights, 0)
    return list(engine.stream(RolloutRequest(prompt_ids=tuple(policy.tokenizer.encode(prompt)), key=(0, 0))))


@pytest.mark.parametrize("folder", FOLDERS)
def test_transformers_generates_our_greedy_tokens(run: Path, folder: str) -> None:
    transformers = extra("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / folder)
    for prompt in SUMS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        ours = greedy_ids(run / folder, prompt, 8)
        assert len(ours) > 1
        assert ids[inputs["input_ids"].shape[1] :] == ours, prompt


@pytest.mark.parametrize("folder", FOLDERS[:2])
def test_mlx_lm_generate_serves_the_folder_and_says_what_we_say(run: Path, folder: str) -> None:
    extra("mlx_lm")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(run / folder), "--prompt", SUMS[0]]
    command += ["--temp", "0", "--max-tokens", "8", "--ignore-chat-template"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    _, said, figures = done.stdout.split("==========")
    config = GenerationConfig(num_generations=1, temperature=0.0, max_completion_length=8)
    [[ours]] = complete_texts(load_policy(run / folder), [SUMS[0]], config, 0)
    assert ours.text.strip()
    assert said.strip() == ours.text.strip()
    assert f"Prompt: {ours.prompt_tokens} tokens" in figures
