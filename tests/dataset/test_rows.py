"""Columns under the names that are wanted, and prompts as the conversations that are wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import DatasetError

USER = {"role": "user", "content": "1+1?"}


def load(folder: Path, *rows: dict[str, Any], **settings: Any) -> PromptDataset:
    path = folder / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return PromptDataset.load(path, DataConfig(**settings))


def test_prompts_and_answers_may_stand_in_columns_of_other_names(tmp_path: Path) -> None:
    row = {"question": "1+1?", "solution": "2", "level": 3}
    [found] = load(tmp_path, row, prompt_column="question", answer_column="solution")
    assert (found.prompt, found.columns) == ("1+1?", {"solution": "2", "answer": "2", "level": 3})


def test_what_is_called_as_ours_gives_way(tmp_path: Path) -> None:
    row = {"prompt": "a template", "question": "1+1?", "answer": "so it is #### 2", "final": "2"}
    [found] = load(tmp_path, row, prompt_column="question", answer_column="final")
    assert (found.prompt, found.columns) == ("1+1?", {"prompt": "a template", "answer": "2", "final": "2"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_column": "qestion"},
            "has no column 'qestion', which data.prompt_column names; did you mean question",
        ),
        ({"prompt_column": "text"}, "has no column 'text', which data.prompt_column names; it has question, solution"),
        (
            {"prompt_column": "question", "answer_column": "gold"},
            "has no column 'gold', which data.answer_column names; it has solution; name one",
        ),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=rf"p\.jsonl:1: row 0 \(counted from 0\) {message}"):
        load(tmp_path, {"question": "1+1?", "solution": "2"}, **settings)


def test_a_system_prompt_begins_every_conversation(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    told = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]
    dataset = load(tmp_path, {"prompt": "1+1?"}, {"prompt": told}, system_prompt="Be brief.")
    assert [row.prompt for row in dataset] == [[system, USER], [system, *told]]
    with pytest.raises(
        DatasetError, match=r"p\.jsonl:1: row 0 .*has a system message already; leave data.system_promp"
    ):
        load(tmp_path, {"prompt": [system, USER]}, system_prompt="Be brief.")


def test_another_system_prompt_or_column_makes_other_prompts(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "answer": "2", "other": "3"}
    settings: list[dict[str, str]] = [{}, {"system_prompt": "Be brief."}, {"answer_column": "other"}]
    assert len({load(tmp_path, row, **kwargs).fingerprint for kwargs in settings}) == 3


def test_messages_are_the_prompt_and_a_final_answer_is_the_solution(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "2"}
    more = {"role": "user", "content": "Sure?"}
    asked, begun = load(tmp_path, {"messages": [USER, answer, more]}, {"messages": [USER, answer], "level": 1})
    assert (asked.prompt, asked.columns) == ([USER, answer, more], {"level": None, "solution": None})
    assert (begun.prompt, begun.columns) == ([USER], {"level": 1, "solution": "2"})
    [kept] = load(tmp_path, {"messages": [USER, answer], "solution": "two"})
    assert (kept.prompt, kept.columns) == ([USER], {"solution": "two"})


def test_messages_stay_whole_where_they_are_named_or_continued(tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "It is"}]}
    for settings in ({"prompt_column": "messages"}, {"chat_template_kwargs": {"continue_final_message": True}}):
        [found] = load(tmp_path, row, **settings)
        assert (found.prompt, found.columns) == (row["messages"], {})
    [found] = load(tmp_path, {"prompt": "1+1?", **row})
    assert (found.prompt, found.columns) == ("1+1?", row)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "2"}], "messages has an answer and nothing that it answers"),
        ([], "the prompt is an empty list"),
        (["hi"], "message 0 of the prompt is a text"),
        ("hi", 'has no "prompt" .it has messages'),
    ],
)
def test_messages_without_a_question_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"p\.jsonl:1: row 0 .*{message}"):
        load(tmp_path, {"messages": messages})


def test_values_of_a_hundred_levels_are_taken(tmp_path: Path) -> None:
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    assert load(tmp_path, {"prompt": "x", "n": nested})[0].columns == {"n": nested}
