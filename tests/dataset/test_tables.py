"""CSV, TSV and Parquet: rows as the files have them, and what is no table."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.dataset.test_prompts import write
from tests.support.extras import extra
from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import DatasetError


def test_csv_rows_are_texts_and_know_the_line_they_start_on(tmp_path: Path) -> None:
    text = '\ufeffprompt, answer,note\r\n"one, ""two""\r\nthree",4,\r\n\r\nfive,6,"x\ny"\r\nlast,7,z'
    dataset = PromptDataset.load(write(tmp_path, "a.CSV", text))
    assert [(row.prompt, row.line, row.columns) for row in dataset] == [
        ('one, "two"\r\nthree', 2, {"answer": "4", "note": ""}),
        ("five", 5, {"answer": "6", "note": "x\ny"}),
        ("last", 7, {"answer": "7", "note": "z"}),
    ]


def test_tsv_values_are_parted_by_tabs(tmp_path: Path) -> None:
    [row] = PromptDataset.load(write(tmp_path, "a.tsv", "prompt\tanswer\na, b\t3\n"))
    assert (row.prompt, row.columns) == ("a, b", {"answer": "3"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the dataset has no rows"),
        ("prompt,answer\n", "the dataset has no rows"),
        ("prompt,answer\na,1\nb,2,3\n", "a.csv:3: 3 values, but the header names 2 columns"),
        ('prompt,answer\n"a\nb",1\nc\n', "a.csv:4: 1 values, but the header names 2 columns"),
        ("prompt,a,a\nx,1,2\n", "a.csv:1: two columns are called 'a'"),
        ("prompt;a\nx;1\n", "a.csv:1: .* semicolons between .* are separated by commas; save it with commas"),
        ("prompt\ta\nx\t1\n", "a.csv:1: .* tabs between .* are separated by commas; name the file .tsv"),
        ('prompt\n"a" b\n', "a.csv:2: the row starting here cannot be read"),
        ('prompt\nx\n"a\n\n', "a.csv:3: the row starting here cannot be read: unexpected end of data"),
        (b"prompt\n\xff\n", "a.csv:2: byte 0xff is not UTF-8"),
        ("question,answer\na,1\n", 'a.csv:2: row 0 .* has no "prompt" .it has answer, question.*data.prompt_column'),
        ("prompt,answer\n ,1\n", "a.csv:2: row 0 .*the prompt is empty"),
        ("prompt,completions\na,1\n", "a.csv:2: row 0 .*column 'completions' is the name of another argument"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        PromptDataset.load(write(tmp_path, "a.csv", text))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(DatasetError, match=r"d\.parquet: is a folder; .* or hf:FOLDER for all"):
        PromptDataset.load(tmp_path / "d.parquet")
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(DatasetError, match=f"{name}: no such file"):
            PromptDataset.load(tmp_path / name)


def test_parquet_rows_keep_their_types_and_conversations(tmp_path: Path) -> None:
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows: list[dict[str, Any]] = [
        {"prompt": talk, "answer": 2, "tags": ["a", "b"], "hard": False},
        {"prompt": talk[1:], "answer": None, "tags": [], "hard": True},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=1)
    dataset = PromptDataset.load(path)
    assert [(row.prompt, row.columns, row.row, row.line) for row in dataset] == [
        (talk, {"answer": 2, "tags": ["a", "b"], "hard": False}, 0, None),
        (talk[1:], {"answer": None, "tags": [], "hard": True}, 1, None),
    ]
    assert dataset.fingerprint == PromptDataset.from_rows(rows).fingerprint


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    extra("pyarrow")
    with pytest.raises(DatasetError, match=r"a\.parquet: this is no Parquet file that pyarrow can read: "):
        PromptDataset.load(write(tmp_path, "a.parquet", b"PAR1 but no more"))


def test_values_that_cannot_be_sent_on_are_named_with_row_and_column(tmp_path: Path) -> None:
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    table = arrow.table({"prompt": ["a", "b"], "n": [1, 2], "big": arrow.array([0, 2**70], arrow.decimal128(38, 0))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.columns["n"] for row in PromptDataset.load(tmp_path / "a.parquet")] == [1, 2]  # decimals are sent on
    rows: list[dict[str, Any]] = [{"prompt": "a", "x": 1, "image": object()}]
    with pytest.raises(DatasetError, match=r"row 0 .*: column 'image' holds a value that cannot be sent on"):
        PromptDataset.from_rows(rows)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, find_spec = importlib.import_module, importlib.util.find_spec
    gone = ("pyarrow", "datasets", "reasoning_gym")

    def without(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr("troupe.dataset.gym.find_spec", lambda name: None if name in gone else find_spec(name))
    path = write(tmp_path, "a.parquet", b"")
    for source, name in ((str(path), "datasets"), ("hf:x", "datasets"), ("reasoning_gym:chain_sum", "reasoning-gym")):
        with pytest.raises(DatasetError) as caught:
            PromptDataset.load(source)
        assert str(caught.value).startswith(f"{source}: ")
        assert str(caught.value).endswith(f"in its clone: pip install -e '.[{name}]'")


def test_reading_a_csv_file_imports_no_optional_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def watched(name: str, *arguments: Any, **more: Any) -> Any:
        assert name.partition(".")[0] not in ("pyarrow", "datasets", "reasoning_gym", "pandas")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", watched)
    assert len(PromptDataset.load(write(tmp_path, "a.csv", "prompt\nx\n"), DataConfig(chat="always"))) == 1
