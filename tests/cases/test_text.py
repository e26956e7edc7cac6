"""Tokens, chat templates and prompts: the cases of `tests/data/cases` that are about text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cases.cases import CASES, copy_case, expected_of
from tests.policy.tokenizer_vectors import DATA, qwen_rank_file
from tests.support.runs import call
from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import PromptDataset
from troupe.policy import Tokenizer
from troupe.run.config import load_config


@pytest.mark.parametrize("case", ["tokens_decoder_only", "tokens_special_flag"])
def test_tokens_of_the_config_beside_tokenizer_json(case: str) -> None:
    expected = expected_of(case)
    tokenizer = Tokenizer.from_pretrained(CASES / case / "model")
    assert tokenizer.encode(expected["text"]) == expected["ids"]
    assert tokenizer.decode(expected["ids"]) == expected["decoded_without_special"]


def test_nfc_newer_marks(tmp_path: Path) -> None:
    shutil.copy(qwen_rank_file(), tmp_path / "qwen.tiktoken")
    shutil.copy(DATA / "tokenizer_config.json", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    rows: list[dict[str, Any]] = expected_of("nfc_newer_marks")["rows"]
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]


def first_prompt(folder: Path, *settings: str) -> str:
    """The first row of a case as its model reads it."""
    data = load_config(None, settings).data
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    rows = PromptDataset.load(folder / "prompts.jsonl", data)
    [ids] = tokenize_prompts(rows, tokenizer, data, max_tokens=500)
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_continue_final_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of("continue_final_message")
    folder = copy_case("continue_final_message", tmp_path)
    assert first_prompt(folder, *expected["set"]) == expected["text"]
    assert first_prompt(folder, expected["set"][0]) == expected["text"]
    monkeypatch.chdir(folder)
    both = [setting.replace("add_generation_prompt=false", "add_generation_prompt=true") for setting in expected["set"]]
    argv = [part for setting in both for part in ("--set", setting)]
    result = call("train", "-m", "model", "-d", "prompts.jsonl", "--reward", "length", "--dry-run", "-o", "out", *argv)
    assert result.exit_code == 2
    assert "prompts.jsonl:1" in result.stderr
    assert "continue_final_message and add_generation_prompt exclude each other" in result.stderr
    assert not (folder / "out").exists()


def test_reasoning_field(tmp_path: Path) -> None:
    folder = copy_case("reasoning_field", tmp_path)
    expected = expected_of("reasoning_field")["text"]
    assert first_prompt(folder) == expected
    prompts = folder / "prompts.jsonl"
    for name in ("thinking", "reasoning_content"):
        prompts.write_text(
            (CASES / "reasoning_field" / "prompts.jsonl").read_text().replace('"reasoning"', f'"{name}"')
        )
        assert first_prompt(folder) == expected


def test_think_prefilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of("think_prefilled")
    monkeypatch.chdir(copy_case("think_prefilled", tmp_path))
    result = call(*expected["argv"][1:])
    assert json.loads(result.stdout)["rewards"] == {"think_format_reward": expected["think_format_reward"]}
    argv = ("train", "-m", "model", "-d", "chats.jsonl", "--reward", "think_format", "--dry-run", "-o", "out")
    assert "the prompts open <think> themselves, and think_format counts that" in call(*argv).output


def test_ids_beyond_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_of("ids_beyond_embedding")
    folder = copy_case("ids_beyond_embedding", tmp_path)
    monkeypatch.chdir(folder)
    row = (folder / "prompts.jsonl").read_text().splitlines()[1]
    (folder / "fine.jsonl").write_text('{"prompt": "hello", "answer": "x"}\n')
    (folder / "held.jsonl").write_text(f'{{"prompt": "hello", "answer": "x"}}\n{row}\n')
    fine = [argument if argument != "prompts.jsonl" else "fine.jsonl" for argument in expected["argv"][1:]]
    for argv, names in (
        (expected["argv"][1:], expected["message_names"]),
        ([*fine, "--set", "data.eval_path=held.jsonl"], ["held.jsonl:2", "265"]),
        (["eval", "-m", "model", "-d", "held.jsonl"], ["held.jsonl:2", "265"]),
        (["generate", "-m", "model", "-p", json.loads(row)["prompt"]], ["265"]),
    ):
        result = call(*argv)
        assert result.exit_code == expected["exit"], result.output
        assert all(name in result.stderr for name in names), result.stderr
    assert not (folder / "out").exists()
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": [258, 265]}')
    for argv in (fine, ["eval", "-m", "model", "-d", "fine.jsonl"], ["generate", "-m", "model", "-p", "hello"]):
        result = call(*argv)
        assert (result.exit_code, "eos_token_id names 265" in result.stderr) == (2, True), result.output
