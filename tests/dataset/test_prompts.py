"""Rows that are read right, rows that are refused with their line, and an order that never changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import DatasetError


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def numbered(count: int) -> PromptDataset:
    return PromptDataset.from_rows({"prompt": f"p{i}", "n": i} for i in range(count))


def test_json_rows_have_their_numbers_lines_and_the_union_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n {"prompt": "one", "answer": 1},\n\n {"prompt":\n "two",\n "hint": "x"}\n]\n')
    dataset = PromptDataset.from_json(path)
    assert [(row.prompt, row.row, row.line, row.columns) for row in dataset] == [
        ("one", 0, 2, {"answer": 1, "hint": None}),
        ("two", 1, 4, {"answer": None, "hint": "x"}),
    ]
    assert dataset.columns == {"answer", "hint"}
    assert (len(dataset), dataset.source, dataset[1].prompt) == (2, str(path), "two")


def test_jsonl_skips_empty_lines_and_keeps_line_separators_inside_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.JSONL", '\ufeff{"prompt": "a\u2028b"}\r\n\n  {"prompt": "c"}')
    assert [(row.prompt, row.line) for row in PromptDataset.from_json(path)] == [("a\u2028b", 1), ("c", 3)]


def test_the_fingerprint_is_of_the_contents_in_order_and_not_of_the_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": None}]
    as_list = PromptDataset.from_json(write(tmp_path, "a.json", json.dumps(rows, indent=3)))
    as_lines = PromptDataset.from_json(write(tmp_path, "a.jsonl", '{"x":1,"prompt":"a"}\n{"prompt":"b"}\n'))
    assert as_list.fingerprint == as_lines.fingerprint == PromptDataset.from_rows(rows).fingerprint
    assert len(as_list.fingerprint) == 64
    assert PromptDataset.from_rows(rows[::-1]).fingerprint != as_list.fingerprint
    assert PromptDataset.from_rows([{"prompt": "a", "x": 2}, rows[1]]).fingerprint != as_list.fingerprint


def test_conversations_stay_and_chat_always_makes_texts_conversations() -> None:
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": ""},
    ]
    rows: list[dict[str, Any]] = [{"prompt": talk}, {"prompt": "hi"}]
    assert [row.prompt for row in PromptDataset.from_rows(rows)] == [talk, "hi"]
    always = PromptDataset.from_rows(rows, chat="always")
    assert [row.prompt for row in always] == [talk, [{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x", "unknown suffix '.yaml'"),
        ("a.json", "", "no rows"),
        ("a.json", "[ ]", "no rows"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", '\n{"prompt": "x"}', "a.json:2: not a list"),
        ("a.json", '[\n{"prompt": "x"},\n3]', r"a.json:3: row 1 \(counted from 0\) is a number, not an object"),
        ("a.json", '[{"prompt": "x"},\n{"prompt": "y"]', "a.json:2: malformed JSON at column"),
        ("a.json", '[{"prompt": "x"},\n]', "a.json:2: malformed JSON"),
        ("a.json", '[{"prompt": "x"}\n{"prompt": "y"}]', "a.json:2: malformed JSON: expected ',' or ']'.*found '{'"),
        ("a.json", '[{"prompt": "x"}\n', "a.json:2: malformed JSON: .*found the end of the file"),
        ("a.json", '[{"prompt": "x"}]\n[]', "a.json:2: malformed JSON: more text after the list"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt" "y"}', "a.jsonl:2: malformed JSON"),
        ("a.jsonl", '{"prompt": "x"} {"prompt": "y"}', "a.jsonl:1: malformed JSON: more text"),
        ("a.jsonl", '{"prompt": "x", "n": NaN}', "a.jsonl:1: .*NaN is no JSON value"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1: .*recursion"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "y", "n": ' + "[" * 900 + "]" * 900 + "}",
            "a.jsonl:2: .*'n' is nested",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "n": ' + '{"a":[' * 51 + "]}" * 51 + "}",
            "'n' is nested more than 100 levels deep",
        ),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "a": 1, "a": 2}', "a.jsonl:2: .*the key 'a' stands twice"),
        (
            "a.json",
            '[{"prompt": "x"},\n{"prompt": "y", "n": {"b": 1, "b": 1}}]',
            "a.json:2: .*the key 'b' stands twice",
        ),
        ("a.jsonl", b'{"prompt": "x"}\n\xff', "a.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "a.jsonl:1: row 0 .*cannot be sent on"),
        ("a.jsonl", '{"prompt": "x", "n": 100000000000000000000}', "a.jsonl:1: row 0 .*64 bits"),
        ("a.jsonl", '{"answer": 1}', 'no "prompt" .it has answer'),
        ("a.jsonl", "{}", "it has no keys"),
        ("a.jsonl", '["x"]', "is a list, not an object"),
        ("a.jsonl", '{"prompt": " \\n"}', "the prompt is empty"),
        ("a.jsonl", '{"prompt": null}', "the prompt is null or missing"),
        ("a.jsonl", '{"prompt": 1.5}', "the prompt is a float"),
        ("a.jsonl", '{"prompt": []}', "the prompt is an empty list"),
        ("a.jsonl", '{"prompt": ["hi"]}', "message 0 of the prompt is a text, not an object"),
        ("a.jsonl", '{"prompt": [{"role": "wizard", "content": "x"}]}', "role 'wizard'; use one of system, user"),
        ("a.jsonl", '{"prompt": [{"content": "x"}]}', "has role None"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}', "content that is null or missing"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": ["x"]}]}', "content that is a list"),
        ("a.jsonl", '{"prompt": "x", "completions": 1}', "column 'completions' is the name of another argument"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(DatasetError, match=f"(?s)^{path}.*") as caught:
        PromptDataset.from_json(path)
    assert caught.match(message)


def test_missing_unreadable_and_folder_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"no\.json: no such file"):
        PromptDataset.from_json(tmp_path / "no.json")
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(DatasetError, match="is a folder"):
        PromptDataset.from_json(str(tmp_path / "dir.json"))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.json", "[]")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DatasetError, match="Permission denied"):
        PromptDataset.from_json(path)


@pytest.mark.parametrize("row", [{"prompt": "x", 3: "y"}, {"prompt": "x", "y": object()}, "x"])
def test_rows_in_memory_are_checked_too(row: Any) -> None:
    with pytest.raises(DatasetError, match=r"^mine: row 0 \(counted from 0\)"):
        PromptDataset.from_rows([row], source="mine")


def test_batches_keep_the_order_and_the_last_may_be_shorter() -> None:
    assert [[row.row for row in batch] for batch in numbered(5).batches(2)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(DatasetError, match="batch_size = 0"):
        numbered(5).batches(0)


def test_the_order_is_the_documented_algorithm() -> None:
    """Worked out with numpy's Mersenne Twister; the numbers must never change, or resumed runs would."""
    assert numbered(8).order(seed=0, epoch=0) == [3, 1, 2, 4, 6, 5, 7, 0]
    assert numbered(8).order(seed=0, epoch=1) == [7, 5, 6, 0, 3, 2, 4, 1]
    assert numbered(8).order(seed=7, epoch=3, shuffle=False) == list(range(8))


@given(count=st.integers(1, 50), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(numbered(count).order(seed, epoch)) == list(range(count))


def test_shuffle_makes_a_new_dataset_in_the_order_of_epoch_0() -> None:
    dataset = numbered(8)
    shuffled = dataset.shuffle(0)
    assert [row.row for row in shuffled] == dataset.order(0, 0)
    assert [row.row for row in dataset] == list(range(8))
    assert shuffled.columns == {"n"}


def test_the_config_refuses_unknown_keys_and_bounds() -> None:
    assert msgspec.convert({}, DataConfig) == DataConfig()
    for bad in ({"max_prompt_tokens": 0}, {"chat": "sometimes"}, {"pth": "x"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, DataConfig)
