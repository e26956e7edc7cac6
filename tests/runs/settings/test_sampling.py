"""How completions are sampled, and the odd prompts, models and completions that a run has to live with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import same_bits, weigh_ids
from tests.support.runs import column, completions, done, lines, policy_of, train, write_jsonl
from tests.support.tiny import CONFIG
from troupe.policy import load_policy

ONE_STEP = {"learner__max_steps": 1}


def test_only_the_likeliest_token_makes_a_group_of_equals_that_teaches_nothing(
    tmp_path: Path, ragged_model: Path
) -> None:
    run = train(ragged_model, tmp_path, generation__top_k=1, **ONE_STEP).folder
    for gid in (0, 1):
        assert len({tuple(c.token_ids) for c in completions(run, gid=gid)}) == 1
    assert {c.advantage for c in completions(run)} == {0.0}
    assert same_bits(policy_of(run), load_policy(ragged_model).weights)


def test_a_low_temperature_writes_more_alike_than_a_high_one(tmp_path: Path, tiny_model: Path) -> None:
    entropies, different = [], []
    for temperature in (0.05, 2.0):
        settings = {"generation__temperature": temperature, "generation__num_generations": 8} | ONE_STEP
        run = train(tiny_model, tmp_path / str(temperature), **settings).folder
        entropies += column(run, "entropy")
        different.append(len({c.text for c in completions(run)}))
    assert entropies[0] < 0.5 * entropies[1]
    assert different[0] < different[1]


def test_a_stop_string_ends_a_completion_and_stays_in_it(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"generation__stop": ["a", "zz"], "generation__logit_bias": {97: 4.0}, **ONE_STEP}
    run = train(tiny_model, tmp_path, generation__num_generations=8, **settings).folder
    stopped = [c for c in completions(run) if c.finish_reason == "stop" and c.token_ids[-1] != 256]
    assert stopped
    assert all(c.text.endswith("a") and c.text.count("a") == 1 for c in stopped)
    cut = [c for c in completions(run) if c.finish_reason == "length"]
    assert column(run, "completions/clipped_ratio") == [len(cut) / 16]


def test_a_completion_that_repeats_itself_is_ended(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"generation__logit_bias": {97: 100.0}, "generation__repetition_cutoff": 4} | ONE_STEP
    run = train(tiny_model, tmp_path, **settings).folder
    assert {(c.text, c.finish_reason) for c in completions(run)} == {("aaaa", "repetition")}
    assert column(run, "completions/clipped_ratio") == [1.0]


def test_a_banned_token_is_never_written(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"generation__num_generations": 8, **ONE_STEP}
    free = completions(train(tiny_model, tmp_path / "free", **settings).folder)
    banned = max({t for c in free for t in c.token_ids}, key=lambda t: sum(c.token_ids.count(t) for c in free))
    bias = {"generation__logit_bias": {banned: -1000.0}}
    left = completions(train(tiny_model, tmp_path / "banned", **settings | bias).folder)
    assert any(banned in c.token_ids for c in free)
    assert not any(banned in c.token_ids for c in left)


def test_completions_of_one_token_are_a_run_like_any_other(tmp_path: Path, tiny_model: Path) -> None:
    result = train(tiny_model, tmp_path, generation__max_completion_length=1)
    assert result.closed_groups == {"trained": 8}
    assert {len(c.token_ids) for c in completions(result.folder)} == {1}
    assert column(result.folder, "completions/mean_length") == [1.0] * 4


def test_completions_that_end_at_once_are_empty_texts_for_rewards_and_train_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    seen: list[str] = []

    def looks(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(index) for index in range(len(completions))]

    result = train(tiny_model, tmp_path, looks, generation__logit_bias={256: 100.0})
    assert result.complete
    assert set(seen) == {""}
    stored = completions(result.folder)
    assert {(c.text, tuple(c.token_ids), c.finish_reason) for c in stored} == {("", (256,), "stop")}
    assert column(result.folder, "completions/clipped_ratio") == [0.0] * 4
    shown = done("inspect", result.folder, "--best", "1")
    assert "ended by     stop" in shown
    assert "tokens       1 by policy version 3" in shown


def test_two_completions_a_prompt_are_one_better_and_one_worse(tmp_path: Path, ragged_model: Path) -> None:
    result = train(ragged_model, tmp_path, generation__num_generations=2)
    for gid in range(8):
        one, other = (c for c in completions(result.folder, gid=gid))
        if one.reward != other.reward:
            assert abs(one.advantage or 0.0) == pytest.approx(math.sqrt(0.5), abs=2e-3)
        assert (one.advantage or 0.0) == pytest.approx(-(other.advantage or 0.0), abs=1e-4)


def test_a_prompt_that_leaves_room_for_one_token_shortens_every_completion_and_says_so(desk: Path) -> None:
    write_jsonl(desk / "long.jsonl", [{"prompt": "x" * 63}, {"prompt": "y"}])
    flags = ("--num-generations", "2", "--batch-size", "2", "--max-steps", "2", "--reward", "length")
    said = done("train", "-m", "m", "-d", "long.jsonl", "-o", "out", *flags)
    assert "generation.max_completion_length lowered from 256 to 1" in said
    assert {len(c.token_ids) for c in completions("out")} == {1}


def test_tokens_that_the_tokenizer_has_no_text_for_are_written_as_nothing(tmp_path: Path, tiny_model: Path) -> None:
    assert CONFIG.vocab_size == 260, "of which the tokenizer knows 258"
    run = train(tiny_model, tmp_path, generation__logit_bias={258: 100.0, 259: 100.0}, **ONE_STEP).folder
    stored = completions(run)
    assert {token for c in stored for token in c.token_ids} <= {258, 259}
    assert {c.text for c in stored} == {""}
    assert len(lines(run)) == 1


def test_characters_cut_in_half_do_not_break_the_text_or_its_json(tmp_path: Path, tiny_model: Path) -> None:
    halves = dict.fromkeys((0xF0, 0x9F, 0xA6, 0x8A, 0xE2), 60.0)
    run = train(tiny_model, tmp_path, generation__logit_bias=halves, generation__max_completion_length=7).folder
    stored = completions(run)
    assert any("\ufffd" in c.text for c in stored)
    for c in stored:
        assert c.text == bytes(token for token in c.token_ids if token < 256).decode(errors="replace")
    told = [json.loads(line) for line in done("inspect", run, "--step", "all", "--json").splitlines()]
    assert [one["text"] for one in told] == [c.text for c in stored]


def test_what_is_streamed_is_what_is_told_at_once_where_characters_span_tokens(desk: Path) -> None:
    for seed in range(6):
        flags = ("generate", "-m", "m", "-p", "🦊", "--seed", str(seed), "--max-new-tokens", "24")
        streamed = done(*flags)
        told = json.loads(done(*flags, "--json"))
        assert streamed == told["completion"] + "\n"
        assert told["prompt_tokens"] == 4


def test_a_penalty_on_repetition_makes_repetition_rarer(tmp_path: Path, tiny_model: Path) -> None:
    repeated = []
    for penalty in (0.0, 50.0):
        settings = {"generation__presence_penalty": penalty, "generation__num_generations": 8} | ONE_STEP
        bias = {"generation__logit_bias": dict.fromkeys(range(97, 105), 6.0)}
        stored = completions(train(tiny_model, tmp_path / str(penalty), **settings | bias).folder)
        repeated.append(sum(len(c.token_ids) - len(set(c.token_ids)) for c in stored))
    assert repeated[0] > 0
    assert repeated[1] == 0


def test_rare_tokens_can_be_cut_off(tmp_path: Path, tiny_model: Path) -> None:
    different = []
    for settings in ({}, {"generation__min_p": 0.5}, {"generation__top_p": 0.2}, {"generation__top_k": 3}):
        name = "-".join(settings) or "none"
        stored = completions(
            train(tiny_model, tmp_path / name, generation__num_generations=8, **settings, **ONE_STEP).folder
        )
        different.append(len({token for c in stored for token in c.token_ids}))
    assert all(fewer < different[0] for fewer in different[1:])


def test_the_completions_of_a_prompt_do_not_depend_on_its_neighbours(tmp_path: Path, ragged_model: Path) -> None:
    texts = {}
    for others in (["bb"], ["cccccc"]):
        data = write_jsonl(tmp_path / f"{others[0]}.jsonl", [{"prompt": p} for p in ["aa", *others]])
        settings = {"data__path": str(data), "data__shuffle": False, **ONE_STEP}
        run = train(ragged_model, tmp_path / others[0], weigh_ids, **settings).folder
        texts[others[0]] = [c.text for c in completions(run, gid=0)]
    assert texts["bb"] == texts["cccccc"]
