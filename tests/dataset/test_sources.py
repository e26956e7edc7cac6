"""How sources are told from each other, found from elsewhere, and called."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.dataset import PromptDataset, anchored_source, source_name
from troupe.dataset.query import parse_value, split_query
from troupe.errors import DatasetError
from troupe.run.config import load_config


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/sums.train.jsonl", "sums.train"),
        ("/a/b/sums.parquet", "sums"),
        ("hf:openai/gsm8k?config=main&split=train", "gsm8k"),
        ("hf:./folder", "folder"),
        ("reasoning_gym:chain_sum?size=500", "chain_sum"),
        ("reasoning_gym:leg_counting,chain_sum", "leg_counting"),
        ("hf:", "run"),
    ],
)
def test_a_run_is_called_after_its_prompts(source: str, name: str) -> None:
    assert source_name(source) == name


def test_only_paths_count_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert anchored_source("p.csv", tmp_path) == str(tmp_path / "p.csv")
    assert anchored_source("/p.csv", tmp_path) == "/p.csv"
    assert anchored_source("hf:mine?split=test", tmp_path) == f"hf:{tmp_path}/mine?split=test"
    for elsewhere in ("hf:openai/gsm8k?split=test", "hf:", "reasoning_gym:chain_sum?size=3"):
        assert anchored_source(elsewhere, tmp_path) == elsewhere


def test_sources_in_a_config_file_are_found_from_everywhere(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('[data]\npath = "reasoning_gym:chain_sum?size=3"\neval_path = "held.parquet"\n')
    data = load_config(toml).data
    assert (data.path, data.eval_path) == ("reasoning_gym:chain_sum?size=3", str(tmp_path / "held.parquet"))


def test_a_file_of_an_unknown_kind_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"unknown suffix '.txt'; give a .json, .jsonl, .csv, .tsv, .parquet file"):
        PromptDataset.load(tmp_path / "p.txt")
    with pytest.raises(DatasetError, match=r"nothing: a file of prompts has a suffix; .*hf:NAME or reasoning_gym:TASK"):
        PromptDataset.load("nothing")


def test_a_folder_is_told_how_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"^{tmp_path}: is a folder; .* or hf:FOLDER for all$"):
        PromptDataset.load(tmp_path)


def test_options_are_read_from_behind_the_question_mark() -> None:
    assert split_query("hf:a/b") == ("hf:a/b", {})
    source = "x:y?size=5&data_dir=a%26b%20c&from=1+1&z="
    assert split_query(source) == ("x:y", {"size": "5", "data_dir": "a&b c", "from": "1+1", "z": ""})
    values = {"5": 5, "0.5": 0.5, "true": True, "null": None, "[1, 2]": [1, 2], "hard": "hard", "": ""}
    assert {text: parse_value(text) for text in values} == values
    with pytest.raises(DatasetError, match=r"the key 'b' stands twice in one object"):
        parse_value('{"a": [{"b": 1, "c": 2, "b": 3}]}')


@pytest.mark.parametrize(
    ("source", "message"),
    [("x?a", "'a' is no option"), ("x?=1", "'=1' is no option"), ("x?a=1&a=2", "a is given twice")],
)
def test_options_that_cannot_be_read_are_refused(source: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        split_query(source)
