"""What pages show of completions: a chosen part, tokens, and none of it too large."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.many import make_many
from tests.support.stored import acted, closed, update
from troupe.messages import GroupClosed, TokenFigures
from troupe.policy.text.decoding import ByteStream
from troupe.records.browse import line_of, open_completion, part_of, run_tokenizer, tokens_of
from troupe.records.layout import STORE
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.completions import Query, StoredCompletion
from troupe.records.store.read import open_store

TEXTS = {0: b"Sch", 1: "ö".encode()[:1], 2: "ö".encode()[1:], 3: b"n", 4: b"\xff"}


class Letters:
    """A tokenizer of five tokens, one of them half a letter."""

    def sampled_stream(self) -> ByteStream:
        return ByteStream(self._bytes)

    def _bytes(self, token: int) -> bytes:
        if token not in TEXTS:
            raise ValueError(token)
        return TEXTS[token]


def write(folder: Path, *messages: Any, **options: Any) -> list[StoredCompletion]:
    sink = SqliteSink(folder / STORE, **options)
    sink.open()
    for message in messages:
        sink.write(message)
    sink.flush()
    sink.close()
    with open_store(folder) as run:
        return list(run.completions(Query()))


def with_text(text: str, token_ids: tuple[int, ...] = (0, 1, 2, 3, 9, 4)) -> GroupClosed:
    told = closed(1, 0, (1.0,))
    assert told.scored is not None
    [rollout] = told.scored.group.rollouts
    T = len(token_ids)
    rollout = msgspec.structs.replace(
        rollout, text=text, token_ids=token_ids, log_probs=(-0.1234567,) * T, versions=(0,) * T
    )
    group = msgspec.structs.replace(told.scored.group, rollouts=(rollout,))
    figures = TokenFigures(entropies=(0.5,) * (T - 1) + (float("nan"),), ratios=(1.25,) * T)
    scored = msgspec.structs.replace(told.scored, group=group)
    return msgspec.structs.replace(told, scored=scored, token_figures=(figures,))


def test_tokens_have_their_texts_and_what_is_stored_of_them(tmp_path: Path) -> None:
    [one] = write(tmp_path, with_text("Schön\ufffd"), update(1), log_probs=True)
    tokens = tokens_of(one, Letters())  # type: ignore[arg-type]
    assert tokens["texts"] == ["Sch", "", "ö", "n", "", "\ufffd"]
    assert tokens["log_probs"] == [-0.123] * 6
    assert tokens["entropies"] == [0.5] * 5 + [None]
    assert tokens["ratios"] == [1.25] * 6
    assert open_completion(one).colours == ("log_probs", "entropies", "ratios")


def test_what_is_sought_is_seen_in_a_line(tmp_path: Path) -> None:
    [one] = write(tmp_path, with_text("a" * 5000 + " THERE " + "b" * 5000), update(1))
    assert line_of(one).start == "a" * 240
    found = line_of(one, "there").start
    assert "THERE" in found
    assert len(found) <= 242


def test_what_was_read_does_not_count_as_written(tmp_path: Path) -> None:
    first, *_ = write(tmp_path, acted(1, 0), update(1))
    assert line_of(first).tokens == len(first.token_ids) - 25
    opened = open_completion(first)
    assert [one.role for one in opened.said][:2] == ["system", "user"]
    assert tokens_of(first, Letters())["read"][0] == [11, 16]  # type: ignore[arg-type]


def test_of_few_completions_a_page_has_all(tmp_path: Path) -> None:
    make_many(tmp_path, 64, letters=20)
    with open_store(tmp_path) as run:
        part = part_of(run, tmp_path)
    assert (len(part["rows"]), part["says"]) == (64, "")
    assert len(part["prompts"]) == 8
    assert {one.prompt_number for one in part["rows"]} == set(range(8))


def test_of_many_completions_a_page_has_a_part_and_says_so(tmp_path: Path) -> None:
    told = make_many(tmp_path, 4000, letters=20)
    with open_store(tmp_path) as run:
        part = part_of(run, tmp_path)
    rows = part["rows"]
    assert len(rows) == 400
    assert part["says"].startswith("this page has 400 of 4,000 completions: the best, the worst and others of ")
    steps = {one.step for one in rows}
    assert {1, told[-1]["step"]} <= steps
    assert len(steps) >= 40
    for step in (1, told[-1]["step"]):
        rewards = [one["reward"] for one in told if one["step"] == step and one["reward"] is not None]
        shown = [one.reward for one in rows if one.step == step and one.reward is not None]
        assert (max(shown), min(shown)) == (max(rewards), min(rewards))
    followed = [one.row for one in rows]
    assert max(map(followed.count, set(followed))) >= 5, "some prompts are followed through the steps"


def test_a_page_has_a_bounded_part_of_long_completions(tmp_path: Path) -> None:
    huge = "\u202e</script>\x1b[31m" * 70_000
    write(tmp_path, with_text(huge), update(1))
    with open_store(tmp_path) as run:
        [one] = part_of(run, tmp_path)["rows"]
    assert (len(one.text), one.left_out) == (8000, len(huge) - 8000)
    make_many(tmp_path, 2400, letters=6000)
    with open_store(tmp_path) as run:
        part = part_of(run, tmp_path)
    assert 100 < len(part["rows"]) < 400
    assert len(json.dumps(msgspec.to_builtins(part["rows"]))) < 1_200_000


@pytest.mark.parametrize("model", ["", 'path = "nowhere"', "path = 7"])
def test_a_run_without_a_tokenizer_has_none(tmp_path: Path, model: str) -> None:
    (tmp_path / "run.toml").write_text(f"[model]\n{model}\n")
    assert run_tokenizer(tmp_path) is None
