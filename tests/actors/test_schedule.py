from __future__ import annotations

import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from troupe.actors.schedule import PromptSchedule, count_steps, tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import ConfigError, DatasetError
from troupe.messages import Slot
from troupe.policy import Tokenizer, load_policy, opened_thought

ROWS = [{"prompt": f"p{i}", "answer": i} for i in range(3)]


def schedule(*, shuffle: bool = False, batch_size: int = 2, seed: int = 5) -> PromptSchedule:
    dataset = PromptDataset.from_rows(ROWS)
    ids = [(i, 10 + i) for i in range(3)]
    return PromptSchedule(dataset, ids, batch_size=batch_size, seed=seed, shuffle=shuffle)


def test_the_stream_runs_on_over_the_end_of_an_epoch() -> None:
    plan = schedule()
    seen = [plan.prompt(Slot(step=k, place=j)) for k in range(4) for j in range(2)]
    assert [prompt.row for prompt in seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [prompt.epoch for prompt in seen] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [prompt.gid for prompt in seen] == list(range(8))
    third = seen[2]
    assert (third.slot, third.prompt, third.prompt_ids) == (Slot(step=1, place=0), "p2", (2, 12))
    assert third.columns == {"answer": 2}
    assert (third.round_size, plan.rows) == (2, 3)


def test_each_epoch_is_the_datasets_permutation_of_the_seed() -> None:
    plan, dataset = schedule(shuffle=True), PromptDataset.from_rows(ROWS)
    seen = [plan.prompt(Slot(step=i // 2, place=i % 2)).row for i in range(12)]
    assert seen == [row for epoch in range(4) for row in dataset.order(5, epoch)]
    again = schedule(shuffle=True)  # asked for out of order, as after a resume
    assert [again.prompt(Slot(step=i // 2, place=i % 2)).row for i in reversed(range(12))] == seen[::-1]
    others = schedule(shuffle=True, seed=6)
    assert [others.prompt(Slot(step=i // 2, place=i % 2)).row for i in range(12)] != seen


def test_a_gid_is_unique_and_follows_from_the_slot() -> None:
    plan = schedule()
    slots = [Slot(step=k, place=j, attempt=a) for k in (0, 1, 1000) for j in range(2) for a in range(3)]
    gids = [plan.prompt(slot).gid for slot in slots]
    assert len(set(gids)) == len(slots)
    assert plan.prompt(Slot(step=1, place=1, attempt=2)).gid == 3 + 2 * 2**48
    assert max(gids) < 2**63


def wide(rows: int = 40, *, batch_size: int = 4, seed: int = 5) -> PromptSchedule:
    dataset = PromptDataset.from_rows([{"prompt": f"p{i}"} for i in range(rows)])
    return PromptSchedule(dataset, [(i,) for i in range(rows)], batch_size=batch_size, seed=seed, shuffle=True)


def rows_of(plan: PromptSchedule, step: int, attempts: range) -> list[int]:
    slots = [Slot(step=step, place=j, attempt=a) for a in attempts for j in range(plan.batch_size)]
    return [plan.prompt(slot).row for slot in slots]


@pytest.mark.parametrize("step", [0, 9, 12])
def test_replacements_show_no_row_of_the_step_and_none_twice(step: int) -> None:
    plan = wide()
    rows = rows_of(plan, step, range(10))  # all 40
    assert sorted(rows) == list(range(40))
    again = rows_of(plan, step, range(10, 11))
    assert len(set(again)) == 4, "then all rows are in it anew"


def test_replacements_depend_on_seed_and_slot_alone() -> None:
    first = rows_of(wide(), 3, range(1, 4))
    other = wide()
    slots = [Slot(step=3, place=j, attempt=a) for a in range(1, 4) for j in range(4)]
    assert [other.prompt(slot).row for slot in reversed(slots)] == first[::-1]
    assert rows_of(wide(seed=6), 3, range(1, 4)) != first
    assert rows_of(wide(), 4, range(1, 4)) != first
    assert [wide().prompt(Slot(step=k, place=0)).row for k in range(10)] == [
        wide().prompt(Slot(step=k, place=0, attempt=0)).row for k in range(10)
    ]
    prompt = wide().prompt(slots[5], round_size=2)
    assert (prompt.row, prompt.prompt, prompt.prompt_ids) == (first[5], f"p{first[5]}", (first[5],))
    assert (prompt.slot, prompt.epoch, prompt.round_size) == (slots[5], 0, 2)


def test_replacements_are_the_hash_written_down() -> None:
    seed = int.from_bytes(hashlib.sha256(b"troupe.schedule/replacements/5/2").digest(), "big")
    dice, plan = random.Random(seed), wide()
    expected: list[int] = []
    shown = set(rows_of(plan, 2, range(1)))
    while len(expected) < 8:
        row = int(dice.random() * 40)
        if row not in shown:
            shown.add(row)
            expected.append(row)
    assert rows_of(plan, 2, range(1, 3)) == expected


def test_a_row_can_be_prompted_again_in_a_slot_of_its_own() -> None:
    plan = wide()
    first = plan.prompt(Slot(step=3, place=2))
    again = plan.prompt(Slot(step=3, place=2, attempt=1), round_size=1, row=first.row)
    assert (again.row, again.prompt, again.prompt_ids, again.epoch) == (
        first.row,
        first.prompt,
        first.prompt_ids,
        first.epoch,
    )
    assert (again.gid, again.round_size) == (plan.gid(Slot(step=3, place=2, attempt=1)), 1)
    assert plan.prompt(Slot(step=3, place=2, attempt=1)).row != first.row


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_replacements_of_a_dataset_no_larger_than_a_step(rows: int) -> None:
    plan = wide(rows)
    assert set(rows_of(plan, 1, range(1, 3))) == set(range(rows))


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1, None, 3),
        (8, 4, 1, None, 2),
        (3, 4, 3, None, 3),
        (1, 64, 1, None, 1),
        (10, 4, 3, 2, 2),
        (2, 4, 1, 9, 9),
    ],
)
def test_steps_show_every_row_epochs_times_unless_told_their_number(
    rows: int, batch_size: int, epochs: int, max_steps: int | None, steps: int
) -> None:
    assert count_steps(rows, batch_size=batch_size, epochs=epochs, max_steps=max_steps) == steps


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_policy(tiny_model).tokenizer


def test_prompts_become_ids_with_the_template_where_they_are_chats(tokenizer: Tokenizer) -> None:
    dataset = PromptDataset.from_rows([{"prompt": "hi"}, {"prompt": [{"role": "user", "content": "é"}]}])
    plain, chat = tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=99)
    assert plain == tuple(b"hi")
    assert chat == tuple("[user]é[assistant]".encode())


def test_what_does_not_fit_is_named_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n\n{"prompt": "abcd"}\n')
    dataset = PromptDataset.from_json(path)
    with pytest.raises(DatasetError, match=r"prompts\.jsonl:3: the prompt has 4 tokens, at most 3 fit"):
        tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=3)
    assert tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=4) == [tuple(b"abc"), tuple(b"abcd")]
    memory = PromptDataset.from_rows([{"prompt": "ab"}, {"prompt": "abc"}], "mine")
    with pytest.raises(DatasetError, match="mine: row 1: the prompt has 3 tokens"):
        tokenize_prompts(memory, tokenizer, DataConfig(), max_tokens=2)


CHAT = PromptDataset.from_rows([{"prompt": [{"role": "user", "content": "x"}]}], "mine")


def test_a_chat_that_the_template_refuses_is_named_too(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('start with the system') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    strict = Tokenizer.from_pretrained(folder)
    with pytest.raises(DatasetError, match=r"mine: row 0: the prompt cannot be rendered: .*start with the system"):
        tokenize_prompts(CHAT, strict, DataConfig(), max_tokens=9)


def test_variables_of_the_template_come_from_the_config(tokenizer: Tokenizer) -> None:
    bare = DataConfig(chat_template_kwargs={"add_generation_prompt": False})
    assert tokenize_prompts(CHAT, tokenizer, bare, max_tokens=9) == [tuple(b"[user]x")]
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.messages: .*remove the key"):
        tokenize_prompts(CHAT, tokenizer, DataConfig(chat_template_kwargs={"messages": 3}), max_tokens=9)


def test_a_variable_that_the_template_never_refers_to_is_refused(tokenizer: Tokenizer) -> None:
    config = DataConfig(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(
        ConfigError, match=r"data\.chat_template_kwargs\.enable_thinking: .*never refers to enable_think"
    ):
        tokenize_prompts(CHAT, tokenizer, config, max_tokens=99)
    [ids] = tokenize_prompts(CHAT, tokenizer, config, max_tokens=99, keeps_unknown=True)
    assert ids == tuple(b"[user]x[assistant]")
    plain = PromptDataset.from_rows([{"prompt": "x"}])  # no template, so nothing to refer to it
    assert tokenize_prompts(plain, tokenizer, config, max_tokens=99) == [(120,)]


def test_ids_beyond_the_embedding_and_texts_without_words_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n{"prompt": "abcz"}\n')
    dataset = PromptDataset.from_json(path)
    with pytest.raises(
        DatasetError, match=r"prompts\.jsonl:2: the prompt has the token 122 \('z'\), but .* ends at 121 "
    ):
        tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=9, vocab_size=122)
    assert len(tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=9, vocab_size=123)) == 2
    path.write_text('{"prompt": "a"}\n{"prompt": "a' + " " * 1_000_000 + '"}\n')
    with pytest.raises(DatasetError, match=r"prompts\.jsonl:2: the prompt cannot be rendered: .* white space in a row"):
        tokenize_prompts(PromptDataset.from_json(path), tokenizer, DataConfig(), max_tokens=9)


def test_a_prompt_says_what_it_has_opened(tokenizer: Tokenizer) -> None:
    dataset = PromptDataset.from_rows([{"prompt": "Why?\n<think>\n"}, {"prompt": "Use <think>."}])
    ids = tokenize_prompts(dataset, tokenizer, DataConfig(), max_tokens=99)
    opened = partial(opened_thought, tokenizer)
    plan = PromptSchedule(dataset, ids, batch_size=2, seed=0, shuffle=False, opened=opened)
    assert [plan.prompt(Slot(step=0, place=place)).opened for place in (0, 1)] == ["<think>\n", ""]


def test_a_prompt_without_tokens_is_refused() -> None:
    class Mute:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return []

    with pytest.raises(DatasetError, match="mine: row 0: the prompt has no tokens"):
        tokenize_prompts(PromptDataset.from_rows([{"prompt": "?"}], "mine"), Mute(), DataConfig(), max_tokens=9)  # type: ignore[arg-type]
