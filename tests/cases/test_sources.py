"""Sources of prompts that were read wrongly: splits of saved folders, and tasks whose rows take long to make."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cases.cases import copy_case, expected_of
from tests.support.extras import extra
from troupe.dataset import PromptDataset, gym
from troupe.errors import DatasetError
from troupe.run.config import load_config
from troupe.run.prepare import prepare

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


GYM = "slow-gym-rows"
SLOW = "reasoning_gym:slow?size=500"
LIBRARY = {
    "__init__.py": "from reasoning_gym.factory import Slow as create_dataset\n",
    "factory.py": """
import dataclasses, os, pathlib, time
@dataclasses.dataclass
class Config:
    size: int
    seed: int
    pause_s: float = 0.5
class Slow:
    def __init__(self, name, size, seed, pause_s=0.5):
        self.seed, self.pause_s = seed, pause_s
    def __getitem__(self, index):
        with open(os.environ["MADE_ROWS"], "a") as made:
            print(os.getpid(), file=made)
        time.sleep(self.pause_s)
        return {"question": f"{self.seed + index}?", "answer": index}
DATASETS = {"slow": (Slow, Config)}
""",
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library whose rows take as long as one likes, and the file where it notes the process that makes each."""
    package = tmp_path / "library" / "reasoning_gym"
    package.mkdir(parents=True)
    for name, text in LIBRARY.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MADE_ROWS", str(tmp_path / "made"))
    return tmp_path / "made"


def rows_made(made: Path) -> int:
    return len(made.read_text().split()) if made.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether there is such a process that still does something: the dead may wait to be buried."""
    told = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(told.strip()) and not told.strip().startswith("Z")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("how", ["dry", "train", "eval"])
def test_the_making_of_rows_is_told_and_ends_with_who_wanted_them(
    made: Path, tmp_path: Path, tiny_model: Path, sign: signal.Signals, how: str
) -> None:
    command = [sys.executable, "-m", "troupe", "train", "-m", str(tiny_model), "-d", f"{SLOW}&pause_s=30"]
    command += ["--dry-run"] if how == "dry" else ["-o", str(tmp_path / "run"), "--reward", "length"]
    if how == "eval":
        command = [sys.executable, "-m", "troupe", "eval", "-d", f"{SLOW}&pause_s=30"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not rows_made(made):
            assert run.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(sign)
        assert run.wait(30) == (130 if sign == signal.SIGINT else -sign)
    finally:
        run.kill()
        run.wait()
    deadline = time.monotonic() + 10
    while is_alive(maker := int(made.read_text().split()[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = expected_of(GYM)["processes left"]
    assert int(is_alive(maker)) == left
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith(SLOW)]
    assert len(told) == {"one": 1}[expected_of(GYM)["message while rows are made"]]
    assert ("its first 4 rows" if how == "dry" else "its rows") in told[0]
    assert not (tmp_path / "run" / "run.toml").exists()


def test_rows_are_made_once_and_then_kept(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "reasoning_gym:slow?size=6&pause_s=0"
    first = PromptDataset.load(source)
    assert rows_made(made) == len(first) == 6
    assert capsys.readouterr().err.startswith(f"{source}: making its rows")
    again = PromptDataset.load(source)
    assert again.fingerprint == first.fingerprint
    assert (rows_made(made), capsys.readouterr().err) == (6, "")
    PromptDataset.load(source.replace("size=6", "size=7"))
    PromptDataset.load(f"{source}&seed=1")
    assert rows_made(made) == 6 + 7 + 6, "others are others"


@pytest.mark.parametrize("harm", ["cut", "changed", pytest.param("empty", marks=pytest.mark.slow), "other", "folder"])
def test_kept_rows_that_are_not_whole_are_made_anew(made: Path, tmp_path: Path, harm: str) -> None:
    source = "reasoning_gym:slow?size=2&pause_s=0"
    first = PromptDataset.load(source)
    [file] = (tmp_path / "cache").rglob("*.json")
    data = file.read_bytes()
    file.unlink()
    match harm:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "changed":
            file.write_bytes(data.replace(b'"0?"', b'"8?"'))
        case "empty":
            file.touch()
        case "other":
            file.write_bytes(data.replace(b'"pause_s":"0"', b'"pause_s":"9"'))
        case "folder":
            file.mkdir()
    assert PromptDataset.load(source).fingerprint == first.fingerprint
    assert rows_made(made) == 4
    PromptDataset.load(source)
    assert rows_made(made) == (6 if harm == "folder" else 4), "mended where it can be written"


def test_another_version_of_the_library_makes_its_own_rows(made: Path) -> None:
    source = "reasoning_gym:slow?size=2&pause_s=0"
    PromptDataset.load(source)
    factory = made.parent / "library" / "reasoning_gym" / "factory.py"
    factory.write_text(LIBRARY["factory.py"].replace("{self.seed + index}?", "{self.seed + index}!"))
    assert [row.prompt for row in PromptDataset.load(source)] == ["0!", "1!"]


def test_without_a_place_to_keep_them_rows_are_made(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(PromptDataset.load("reasoning_gym:slow?size=2&pause_s=0")) == 2


def test_a_dry_run_makes_a_few_rows_and_knows_how_many_there_are(
    made: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        None,
        [
            {
                "output": str(tmp_path / "run"),
                "model": {"path": str(tiny_model)},
                "data": {"path": "reasoning_gym:slow?size=500&pause_s=0", "eval_path": f"{SLOW}&pause_s=0&seed=1"},
                "generation": {"max_completion_length": 4},
                "rewards": {"functions": ["length"]},
            }
        ],
    )
    prepared = prepare(config, to_show=True)
    assert rows_made(made) == 2 * 4
    assert prepared.inputs.total_steps == 500 * config.learner.epochs // config.learner.batch_size
    assert prepared.inputs.description.startswith(
        "500 prompts of 2 tokens (in the first 4, the others were not made) from "
    )
    assert capsys.readouterr().err.count("making its first 4 rows") == 2
    PromptDataset.load(config.data.path or "")
    prepare(config, to_show=True)
    assert rows_made(made) == 2 * 4 + 500 + 4, "what is kept is read whole"


@pytest.mark.slow
def test_how_far_it_is_is_told_now_and_then(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gym, "_EVERY_S", 0.0)
    source = "reasoning_gym:slow?size=3&pause_s=0.6"
    PromptDataset.load(source)
    _, *counts = capsys.readouterr().err.splitlines()
    assert counts[0] == f"{source}: 2 of 3 rows made"
