"""Prompts of one's own: how files are read, what rewards see of them, and which prompt comes when."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.fakes import ones, same_bits, tiny_config, weigh_ids, write_prompts
from tests.support.runs import STORED, completions, done, lines, policy_of, refused, summary, train, write_jsonl

TRAIN = ("train", "-m", "m", "-o", "out", "--num-generations", "2", "--batch-size", "2", "--max-steps", "1")
SHORT = ("--set", "generation.max_completion_length=6")
ROWS = [{"prompt": f"say {word}", "word": word} for word in ("one", "two", "three")]


class Witness:
    """A reward that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, completions: list[Any], **given: Any) -> list[float]:
        self.calls.append({"completions": completions, **given})
        return weigh_ids(given["completion_ids"])

    def by_row(self, name: str) -> dict[str, Any]:
        """Prompt → what a column held for all completions of it, which must be one value."""
        seen: dict[str, Any] = {}
        for call in self.calls:
            for prompt, value in zip(call["prompts"], call[name], strict=True):
                key = prompt if isinstance(prompt, str) else json.dumps(prompt)
                assert seen.setdefault(key, value) == value
        return seen


def with_data(model: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> troupe.RunConfig:
    """A tiny run on these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"data__path": str(write_jsonl(folder / "rows.jsonl", rows))}
    return tiny_config(model, folder, **STORED | data | settings)


def test_json_jsonl_and_a_file_from_windows_make_one_run(tmp_path: Path, ragged_model: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    windows = "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n"
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + windows.encode())
    first, second, third = (
        policy_of(train(ragged_model, tmp_path / f"run of {name}", data__path=str(tmp_path / name)).folder)
        for name in ("a.json", "b.jsonl", "c.jsonl")
    )
    assert same_bits(first, second)
    assert same_bits(first, third)


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ('{"text": "hello"}', 'has no "prompt"'),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": 7}', "a number"),
        ('{"prompt": "a"', "malformed JSON"),
        ('{"prompt": [{"role": "bot", "content": "a"}]}', "'bot'"),
        ('{"prompt": "a", "completions": 1}', "'completions'"),
        ('{"prompt": "a"} {"prompt": "b"}', "one object a line"),
    ],
    ids=["no prompt", "empty", "number", "cut off", "role", "reserved column", "two objects"],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line_and_nothing_is_written(
    desk: Path, third: str, said: str
) -> None:
    (desk / "rows.jsonl").write_text('{"prompt": "a"}\n\n' + third + '\n{"prompt": "z"}\n', encoding="utf-8")
    message = refused(*TRAIN, "-d", "rows.jsonl", "--reward", "length")
    assert message.startswith(f"troupe: {desk / 'rows.jsonl'}:3:")
    assert said in message
    assert not (desk / "out").exists()


def test_bytes_that_are_no_text_are_named_by_their_line(desk: Path) -> None:
    (desk / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    message = refused(*TRAIN, "-d", "rows.jsonl", "--reward", "length")
    assert f"{desk / 'rows.jsonl'}:2: byte 0xe9 is not UTF-8" in message


def test_a_prompt_too_long_for_the_model_is_named_with_its_row_before_training(desk: Path) -> None:
    write_jsonl(desk / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b" * 70}])
    message = refused(*TRAIN, "-d", "rows.jsonl", "--reward", "length")
    assert f"{desk / 'rows.jsonl'}:2" in message
    assert "70" in message
    assert not (desk / "out").exists()


def test_the_longest_prompt_that_is_wanted_is_kept_to(desk: Path) -> None:
    write_jsonl(desk / "rows.jsonl", [{"prompt": "abc"}, {"prompt": "abcdefgh"}])
    train = (*TRAIN, *SHORT, "-d", "rows.jsonl", "--reward", "length")
    message = refused(*train, "--set", "data.max_prompt_tokens=7")
    assert "data.max_prompt_tokens" in message
    assert "8" in message
    assert "1 of 1 steps" in done(*train, "--set", "data.max_prompt_tokens=8")


def test_a_column_that_the_reward_wants_and_the_rows_lack_is_told_before_the_model_is_looked_for(desk: Path) -> None:
    (desk / "r.py").write_text("def f(completions, colour):\n    return [0.0] * len(completions)\n")
    message = refused(*TRAIN[:1], "-m", "nowhere", *TRAIN[3:], "-d", "p.json", "--reward", "r.py:f")
    assert f"{desk / 'r.py'}:1" in message
    assert "colour" in message
    assert "answer" in message, "what there is instead"
    assert "nowhere" not in message


def test_rewards_see_columns_as_the_file_has_them(tmp_path: Path, ragged_model: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "tests": [{"in": [1, 2], "out": {"x": None}}], "n": 3, "ok": True},
        {"prompt": "b", "n": 2.5, "name": "Zoë 🦊 “quoted”\u2028line"},
        {"prompt": "c", "n": -(2**53), "tests": []},
    ]
    reward = Witness()
    troupe.train(with_data(ragged_model, tmp_path, rows), [reward])
    for name in ("tests", "n", "ok", "name"):
        assert reward.by_row(name) == {row["prompt"]: row.get(name) for row in rows}
    stored = {c.prompt: c.columns for c in completions(tmp_path / "run")}
    assert stored["b"] == {"n": 2.5, "name": "Zoë 🦊 “quoted”\u2028line", "tests": None, "ok": None}


def test_what_a_reward_does_to_its_columns_is_forgotten_by_the_next_step(tmp_path: Path, ragged_model: Path) -> None:
    sizes: list[int] = []

    def greedy(completions: list[str], tests: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        for one in tests:
            sizes.append(len(one))
            one.append(99)
        return weigh_ids(completion_ids)

    config = with_data(ragged_model, tmp_path, [{"prompt": "a", "tests": [1, 2]}])
    troupe.train(config, [greedy])
    assert set(sizes) == {2}
    assert {str(c.columns) for c in completions(tmp_path / "run")} == {"{'tests': [1, 2]}"}


def test_conversations_go_through_the_models_template_and_are_scored_as_messages(
    tmp_path: Path, ragged_model: Path
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    reward = Witness()
    result = troupe.train(with_data(ragged_model, tmp_path, [{"prompt": turns}]), [reward])
    assert all(call["prompts"] == [turns] * 3 for call in reward.calls)
    for call in reward.calls:
        for [message] in call["completions"]:
            assert message.keys() == {"role", "content"}
            assert message["role"] == "assistant"
    templated = "[system]Be brief.[user]Hi[assistant]"
    first = lines(result.folder)[0]
    stored = completions(result.folder)
    tokens = sum(len(c.token_ids) for c in stored if c.step == 1)
    assert first["num_tokens"] == 6 * len(templated) + tokens, "a byte is a token of this model"
    assert all(c.prompt == turns for c in stored)


def test_chat_always_makes_a_text_the_users_message(tmp_path: Path, ragged_model: Path) -> None:
    turns = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    texts = [{"prompt": row["prompt"]} for row in ROWS]
    written = troupe.train(with_data(ragged_model, tmp_path / "one", turns), [weigh_ids])
    meant = troupe.train(with_data(ragged_model, tmp_path / "two", texts, data__chat="always"), [weigh_ids])
    plain = troupe.train(with_data(ragged_model, tmp_path / "three", texts), [weigh_ids])
    assert same_bits(policy_of(written.folder), policy_of(meant.folder))
    assert not same_bits(policy_of(meant.folder), policy_of(plain.folder))


def test_a_single_prompt_fills_every_step_with_one_pass_after_the_other(tmp_path: Path, ragged_model: Path) -> None:
    config = with_data(ragged_model, tmp_path, [{"prompt": "only"}], learner__batch_size=4, learner__max_steps=2)
    result = troupe.train(config, [weigh_ids])
    stored = completions(result.folder)
    assert {c.row for c in stored} == {0}
    assert [{c.epoch for c in stored if c.step == step} for step in (1, 2)] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    groups = {c.gid: tuple(tuple(d.token_ids) for d in stored if d.gid == c.gid) for c in stored}
    assert len(set(groups.values())) == 8, "each time with other completions"


def test_a_single_prompt_without_signal_is_tried_as_often_as_asked_and_the_run_ends(
    tmp_path: Path, ragged_model: Path
) -> None:
    sampling = {"learner__dynamic_sampling": True, "learner__max_resampling_attempts": 2, "learner__max_steps": 2}
    result = troupe.train(with_data(ragged_model, tmp_path, [{"prompt": "only"}], **sampling), [ones])
    assert result.complete
    assert result.closed_groups == {"filtered": 2 * 2 * (1 + 2)}


def test_epochs_decide_how_many_steps_there_are_and_each_has_every_row_once(tmp_path: Path, ragged_model: Path) -> None:
    data = write_prompts(tmp_path / "five.json", rows=5)
    settings = {"data__path": str(data), "learner__max_steps": None, "learner__epochs": 2}
    result = train(ragged_model, tmp_path, **settings)
    assert result.total_steps == 5, "5 rows, 2 a step, twice"
    orders = defaultdict[int | None, list[int | None]](list)
    for c in completions(result.folder):
        if c.sample == 0:
            orders[c.epoch].append(c.row)
    assert [sorted(row or 0 for row in orders[epoch]) for epoch in (0, 1)] == [[0, 1, 2, 3, 4]] * 2
    assert orders[0] != orders[1], "in another order"
    assert lines(result.folder)[-1]["epoch"] == 2.0


def test_without_shuffling_prompts_come_as_the_file_has_them(tmp_path: Path, ragged_model: Path) -> None:
    result = train(ragged_model, tmp_path, data__shuffle=False)
    assert [c.row for c in completions(result.folder) if c.sample == 0] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_another_seed_gives_another_order_of_the_same_prompts(tmp_path: Path, ragged_model: Path) -> None:
    orders = []
    for seed in (1, 2):
        result = train(ragged_model, tmp_path / str(seed), seed=seed, learner__max_steps=2, learner__batch_size=5)
        orders.append([c.row for c in completions(result.folder, step=1) if c.sample == 0])
    assert orders[0] != orders[1]
    assert sorted(orders[0], key=str) == sorted(orders[1], key=str) == [0, 1, 2, 3, 4]


def test_emoji_and_other_scripts_come_back_from_the_store_as_they_were(desk: Path) -> None:
    prompts = ["日本語: ", "emoji 👩‍👩‍👧 → ", "العربية "]
    write_jsonl(desk / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
    done(*TRAIN[:-1], "2", *SHORT, "-d", "rows.jsonl", "--reward", "length")
    stored = [json.loads(line) for line in done("inspect", "out", "--step", "all", "--json").splitlines()]
    assert {one["prompt"] for one in stored} == set(prompts)
    done("inspect", "out", "--jsonl", "all.jsonl")
    assert [json.loads(line) for line in Path("all.jsonl").read_text(encoding="utf-8").splitlines()] == stored


def test_rows_with_an_answer_need_no_reward_and_rows_without_one_say_what_to_do(desk: Path) -> None:
    done(*TRAIN, *SHORT, "-d", "p.json")
    assert lines("out")[0]["rewards/exact_answer_reward/mean"] == lines("out")[0]["reward"] == 0.0
    write_jsonl(desk / "rows.jsonl", [{"prompt": "a"}])
    message = refused("train", "-m", "m", "-o", "new", "-d", "rows.jsonl")
    assert "--reward" in message
    assert not (desk / "new").exists()


def test_held_out_rows_are_answered_before_and_after_and_never_trained_on(desk: Path) -> None:
    write_jsonl(desk / "held.jsonl", [{"prompt": "held out", "answer": "x"}])
    said = done(*TRAIN, *SHORT, "-d", "p.json", "--reward", "length", "--set", "data.eval_path=held.jsonl")
    result = summary("out")
    before, after = result.rewards_before["length_reward"], result.rewards_after["length_reward"]
    assert f"held-out length_reward: {before:.3f} before, {after:.3f} after" in said
    assert "held out" not in {c.prompt for c in completions("out")}
    message = refused(
        "train", "-m", "m", "-d", "p.json", "-o", "new", "--set", "data.eval_path=gone.jsonl", "--reward", "length"
    )
    assert str(desk / "gone.jsonl") in message


def test_a_prompt_that_says_a_special_token_is_the_tokens_as_the_tokenizer_has_them(
    tmp_path: Path, ragged_model: Path
) -> None:
    rows = [{"prompt": "a<|endoftext|>b"}]
    result = troupe.train(with_data(ragged_model, tmp_path, rows, learner__max_steps=1), [weigh_ids])
    stored = completions(result.folder)
    assert lines(result.folder)[0]["num_tokens"] == 6 * 3 + sum(len(c.token_ids) for c in stored)
    assert {c.prompt for c in stored} == {"a<|endoftext|>b"}
