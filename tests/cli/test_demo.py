"""The demo that ships: whole, small, honest, and neither too good nor too bad at the start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anyio
import pytest

import troupe
import troupe.cli.demo
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import Policy, generate_batch, load_policy, parameter_count
from troupe.run.config import load_config
from troupe.run.evaluate import Evaluation, evaluate_folder

DEMO = Path(troupe.cli.demo.__file__).parent
MEGABYTE = 10**6


def rows(name: str) -> list[dict[str, str]]:
    loaded: list[dict[str, str]] = json.loads((DEMO / name).read_text(encoding="utf-8"))
    return loaded


def operands(row: dict[str, str]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"])
    assert match is not None, row
    return int(match[1]), int(match[2])


def carries(row: dict[str, str]) -> bool:
    """Whether some column of the sum exceeds 9."""
    a, b = operands(row)
    return a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(DEMO / "policy")


def test_the_folder_is_whole_and_small() -> None:
    policy_files = {path.name: path.stat().st_size for path in (DEMO / "policy").iterdir()}
    assert policy_files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(policy_files.values()) <= 3 * MEGABYTE
    assert sum(path.stat().st_size for path in DEMO.glob("*.json")) < 0.4 * MEGABYTE


def test_every_answer_is_right() -> None:
    for row in rows("arithmetic.json") + rows("arithmetic-held-out.json"):
        assert row.keys() == {"prompt", "answer"}
        assert row["answer"] == str(sum(operands(row)))


def test_held_out_sums_are_never_trained_on_in_either_order() -> None:
    trained, held_out = rows("arithmetic.json"), rows("arithmetic-held-out.json")
    assert len(held_out) >= 200
    unordered = [frozenset(operands(row)) for row in held_out]
    assert len(set(unordered)) == len(held_out)
    assert not {frozenset(operands(row)) for row in trained} & set(unordered)
    assert len({row["prompt"] for row in trained}) == len(trained)


def test_the_tokenizer_gives_bytes_and_back(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    assert tokenizer.encode("27+58=") == list(b"27+58=")
    for text in ("27+58=85", "né 日本 🙂\n\t x", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("85<|endoftext|>") == [*b"85", 256]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (256, 256, 257)
    assert policy.eos_ids == {256}


def test_the_policy_loads(policy: Policy) -> None:
    assert policy.config.vocab_size == 257
    assert policy.dtype == "float32"
    assert sum(weight.size for weight in policy.weights.values()) == parameter_count(policy.config) == 357_312


def test_the_policy_starts_with_much_to_learn() -> None:
    async def examine() -> Evaluation:
        return await evaluate_folder(DEMO / "policy", DEMO / "arithmetic-held-out.json", max_completion_length=8)

    result = anyio.run(examine)
    assert result.accuracy is not None
    assert 0.2 <= result.accuracy <= 0.5
    held_out = rows("arithmetic-held-out.json")
    right = [text == row["answer"] for text, row in zip(result.completions, held_out, strict=True)]
    without_carry = [ok for ok, row in zip(right, held_out, strict=True) if not carries(row)]
    assert sum(without_carry) >= 0.9 * len(without_carry)


def test_its_samples_hold_what_it_can_learn_from(policy: Policy) -> None:
    hard = [row for row in rows("arithmetic-held-out.json") if carries(row)][:100]
    texts = generate_batch(policy, [row["prompt"] for row in hard], 8, seed=1).texts
    solved = [texts[8 * i : 8 * i + 8].count(row["answer"]) for i, row in enumerate(hard)]
    assert 0.2 <= sum(solved) / (8 * len(hard)) <= 0.5
    assert sum(n > 0 for n in solved) >= 0.85 * len(hard)


def test_demo_toml_names_what_ships() -> None:
    config = load_config(DEMO_CONFIG)
    assert config.model.path == str(DEMO / "policy")
    assert config.data.path == str(DEMO / "arithmetic.json")
    assert config.data.eval_path == str(DEMO / "arithmetic-held-out.json")
    assert config.rewards.functions == ("exact_answer",)
    assert config.schedule.max_staleness == 0
    longest = max(len(row["answer"]) + 1 for row in rows("arithmetic.json"))
    assert config.generation.max_completion_length >= longest


@pytest.mark.slow
def test_the_demo_teaches_to_carry(tmp_path: Path) -> None:
    output = {"output": str(tmp_path / "run"), "metrics": {"sinks": ["jsonl"]}}
    result = troupe.train(load_config(DEMO_CONFIG, [output]))
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None
    assert 0.2 <= result.accuracy_before <= 0.5
    assert result.accuracy_after >= 0.9
    assert result.findings == (), "nothing is wrong with it"
