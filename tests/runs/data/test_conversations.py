"""Prompts that are conversations: TRL's rows unchanged, Hugging Face's ids, and what rewards get to see of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import troupe
from tests.policy.tokenizer_vectors import DATA, qwen_rank_file, read_vectors
from tests.support.fakes import tiny_config
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.actors.schedule import describe_prompts, tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset
from troupe.policy import Tokenizer

SYSTEM = {"role": "system", "content": "Add."}
USER = {"role": "user", "content": "1+1?"}
TALK = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3+4?"}]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copy(qwen_rank_file(), folder / "qwen.tiktoken")
    shutil.copy(DATA / "tokenizer_config.json", folder)
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with positions for a conversation."""
    config = msgspec.structs.replace(CONFIG, max_position_embeddings=256)
    return write_tiny_model(tmp_path_factory.mktemp("roomy") / "m", config)


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_conversations_become_the_ids_that_transformers_gives_them(qwen3: Tokenizer, tmp_path: Path) -> None:
    """Several turns, system messages, tools and both ways of thinking, from rows in TRL's conversational format."""
    chats = [chat for chat in read_vectors()["chats"] if chat["add_generation_prompt"]]
    kinds = {tuple(message["role"] for message in chat["messages"]) for chat in chats}
    assert ("system", "user", "assistant", "user") in kinds
    assert {chat["chat_template_kwargs"].get("enable_thinking") for chat in chats} == {None, True, False}
    for number, chat in enumerate(chats):
        source = write_rows(tmp_path / f"{number}.jsonl", {"prompt": chat["messages"]})
        tools = {} if chat["tools"] is None else {"tools": chat["tools"]}
        config = DataConfig(chat_template_kwargs={**chat["chat_template_kwargs"], **tools})
        [ids] = tokenize_prompts(PromptDataset.load(source, config), qwen3, config, max_tokens=10_000)
        assert list(ids) == chat["ids"]


def test_texts_with_a_system_prompt_and_no_thoughts(qwen3: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "p.jsonl", {"prompt": "1+1?", "answer": "2"})
    config = DataConfig(system_prompt="Add.", chat_template_kwargs={"enable_thinking": False})
    dataset = PromptDataset.load(source, config)
    prompt_ids = tokenize_prompts(dataset, qwen3, config, max_tokens=100)
    assert qwen3.decode(prompt_ids[0], skip_special_tokens=False) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    first, second = describe_prompts(dataset, prompt_ids, qwen3).splitlines()
    length = len(prompt_ids[0])
    assert first == f"1 prompt of {length} tokens from {source}; columns for rewards: answer"
    assert second.startswith("the first one, as the model reads it: '<|im_start|>system\\nAdd.")
    assert second.endswith("<think>\\n\\n</think>\\n\\n'")


def test_a_long_first_prompt_is_cut_in_the_middle(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_model)
    dataset = PromptDataset.from_rows([{"prompt": "a" * 300 + "b" * 300}])
    [_, shown] = describe_prompts(dataset, [tuple(tokenizer.encode(str(dataset[0].prompt)))], tokenizer).splitlines()
    assert shown == f"the first one, as the model reads it: '{'a' * 200} … {'b' * 200}'"


def test_a_run_gives_rewards_what_trl_gives_them(tmp_path: Path, roomy_model: Path) -> None:
    """Rows of one, three and four messages; a function with every argument that TRL's trainer passes."""
    calls: list[dict[str, Any]] = []

    def judge(prompts, completions, completion_ids, solution, log_extra=None, log_metric=None, **kwargs):  # type: ignore[no-untyped-def]
        calls.append({"prompts": prompts, "completions": completions, "solution": solution, **kwargs})
        contents = [completion[0]["content"] for completion in completions]
        log_extra("content", contents)
        log_metric("longest", max(map(len, contents)))
        return [
            None if not content else len(set(ids)) / 12 for content, ids in zip(contents, completion_ids, strict=True)
        ]

    rows = [
        {"prompt": [USER], "solution": "2", "level": 1},
        {"prompt": TALK, "solution": "7", "level": 2},
        {"prompt": [SYSTEM, *TALK], "solution": "7", "level": 3},
    ]
    config = tiny_config(
        roomy_model, tmp_path, data__path=write_rows(tmp_path / "p.jsonl", *rows), learner__max_steps=3
    )
    result = troupe.train(config, [judge])
    assert result.closed_groups == {"trained": 6}
    assert result.incidents == {}
    assert {json.dumps(call["prompts"][0]) for call in calls} == {json.dumps(row["prompt"]) for row in rows}
    for call in calls:
        [row] = [row for row in rows if row["prompt"] == call["prompts"][0]]
        assert call["prompts"] == [row["prompt"]] * 3
        assert (call["solution"], call["level"]) == ([row["solution"]] * 3, [row["level"]] * 3)
        assert call["trainer_state"].max_steps == 3
        for [message] in call["completions"]:
            assert (set(message), message["role"]) == ({"role", "content"}, "assistant")
    logged = [json.loads(line) for line in Path(result.folder, "metrics.jsonl").read_text().splitlines()]
    assert any("longest" in line for line in map(str, logged))
