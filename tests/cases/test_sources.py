"""Sources of prompts that were read wrongly: splits of saved folders, and tasks whose rows take long to make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cases.cases import copy_case, expected_of
from tests.extras import extra
from troupe.dataset import PromptDataset
from troupe.errors import DatasetError

SPLIT = "hf-split-ignored"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case's folder, with what its script saves and a DatasetDict besides."""
    datasets = extra("datasets")
    folder = copy_case(SPLIT, tmp_path_factory.mktemp("saved"))
    code = "from datasets import disable_progress_bars as quiet; quiet(); " + (folder / "make.py").read_text()
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=120)
    datasets.disable_progress_bars()
    ten = datasets.load_from_disk(str(folder / "ten"))
    datasets.DatasetDict({"train": ten, "test": ten.select(range(4))}).save_to_disk(str(folder / "both"))
    return folder


def numbers(source: str) -> list[int]:
    """Which of the rows 0 … 9 a source has."""
    return [int(row.prompt.partition("+")[0]) for row in PromptDataset.load(source) if isinstance(row.prompt, str)]


@pytest.mark.parametrize(("source", "right"), expected_of(SPLIT).items())
def test_a_split_of_a_saved_folder_is_heeded(saved: Path, source: str, right: str) -> None:
    source = source.replace("hf:", f"hf:{saved}/")
    if count := re.match(r"\d+(?= prompts)", right):
        assert len(numbers(source)) == int(count[0])
    else:
        assert right.startswith("refused")
        with pytest.raises(DatasetError, match=r"there is no split '\w+'; there are train, and slices of them"):
            PromptDataset.load(source)


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("ten", range(10)),
        ("ten?split=train", range(10)),
        ("ten?split=all", range(10)),
        ("ten?split=train[10%:20%]", [1]),
        ("ten?split=train[-2:]", [8, 9]),
        ("ten?split=train[:2]%2Btrain[8:]", [0, 1, 8, 9]),
        ("both?split=test[1:]", [1, 2, 3]),
        ("both?split=train[:1]%2Btest[:1]", [0, 0]),
        ("both/test?split=test[:2]", [0, 1]),
    ],
)
def test_slices_are_the_librarys(saved: Path, source: str, rows: Any) -> None:
    assert numbers(f"hf:{saved}/{source}") == list(rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ten?split=train[", "there is no split 'train\\['; there are train"),
        ("ten?split=", "there is no split ''"),
        ("both?split=dev[:2]", "there is no split 'dev\\[:2\\]'; there are train, test"),
        ("both/test?split=train", "there is no split 'train'; there are test"),
        ("both?config=a", "takes no option but split"),
        ("ten?revision=a", "takes no option but split"),
        ("ten?columns=a", "unknown option columns"),
        ("ten?split=train[5:2]", "the dataset has no rows"),
    ],
)
def test_what_a_saved_folder_does_not_have_is_refused(saved: Path, source: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        PromptDataset.load(f"hf:{saved}/{source}")
