"""Hugging Face `datasets`: what is asked of it, and real files and folders through it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.extras import extra
from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import DatasetError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in for the library was asked for; it knows one dataset."""
    calls: list[Any] = []

    def load_dataset(path: str, **arguments: Any) -> list[dict[str, Any]]:
        calls.append((path, arguments))
        if path == "gone":
            raise ConnectionError("no\nnetwork")
        return [{"prompt": "a", "n": 1}]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return calls


def test_the_options_of_a_source_are_the_librarys(asked: list[Any]) -> None:
    [row] = PromptDataset.load("hf:openai/gsm8k?config=main&split=train[:2]&revision=abc")
    assert (row.prompt, row.columns, row.line) == ("a", {"n": 1}, None)
    PromptDataset.load("hf:plain")
    assert asked == [
        ("openai/gsm8k", {"split": "train[:2]", "name": "main", "revision": "abc"}),
        ("plain", {"split": "train"}),
    ]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "hf:: no dataset is named"),
        ("hf:a?subset=b", "unknown option subset; there are split, config, revision, data_dir"),
        ("hf:gone", "hf:gone: datasets.load_dataset failed: ConnectionError: no network; check name, config and split"),
    ],
)
def test_what_cannot_be_loaded_is_refused(source: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        PromptDataset.load(source)


def test_what_save_to_disk_wrote_is_read_from_there(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Splits(dict[str, Any]):
        """What the library calls DatasetDict."""

    one, both = tmp_path / "one", tmp_path / "both"
    for folder, mark in ((one, "state.json"), (both, "dataset_dict.json")):
        folder.mkdir()
        (folder / mark).touch()
    saved = {str(one): [{"prompt": "a"}], str(both): Splits(train=[{"prompt": "b"}], test=[{"prompt": "c"}])}
    monkeypatch.setattr(sys.modules["datasets"], "DatasetDict", Splits, raising=False)
    monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", saved.__getitem__, raising=False)
    found = [PromptDataset.load(f"hf:{source}")[0].prompt for source in (one, both, f"{both}?split=test")]
    assert found == ["a", "b", "c"]
    with pytest.raises(DatasetError, match=r"both: there is no split 'dev'; there are train, test"):
        PromptDataset.load(f"hf:{both}?split=dev")
    with pytest.raises(DatasetError, match=r"one: .* takes no option but split"):
        PromptDataset.load(f"hf:{one}?config=a")
    assert asked == []
    (tmp_path / "files").mkdir()
    PromptDataset.load(f"hf:{tmp_path}/files?data_dir=x")
    with pytest.raises(DatasetError, match=r"files: a folder has no revisions"):
        PromptDataset.load(f"hf:{tmp_path}/files?revision=x")
    assert asked == [(f"{tmp_path}/files", {"split": "train", "data_dir": "x"})]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_local_folders_and_saved_datasets_through_the_real_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = extra("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    talk = [{"role": "user", "content": "1+1?"}]
    rows = [{"prompt": talk, "answer": "2"}, {"prompt": talk, "answer": "3"}]
    expected = PromptDataset.from_rows(rows).fingerprint

    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "test.jsonl").write_text(json.dumps({"prompt": talk, "answer": "4"}))
    assert PromptDataset.load(f"hf:{files}").fingerprint == expected
    assert [row.columns["answer"] for row in PromptDataset.load(f"hf:{files}?split=test")] == ["4"]
    assert [row.columns["answer"] for row in PromptDataset.load(f"hf:{files}?split=train[1:]")] == ["3"]
    with pytest.raises(DatasetError, match=r"load_dataset failed: ValueError: Unknown split"):
        PromptDataset.load(f"hf:{files}?split=dev")

    whole = datasets.Dataset.from_list([{"question": "1+1?", "answer": 2}])
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "both"))
    config = DataConfig(prompt_column="question")
    for source in ("one", "both", "both?split=test"):
        [row] = PromptDataset.load(f"hf:{tmp_path / source}", config)
        assert (row.prompt, row.columns) == ("1+1?", {"answer": 2})
    with pytest.raises(DatasetError, match="there is no split 'dev'; there are train, test"):
        PromptDataset.load(f"hf:{tmp_path}/both?split=dev")
    with pytest.raises(DatasetError, match="takes no option but split"):
        PromptDataset.load(f"hf:{tmp_path}/both?config=a")
