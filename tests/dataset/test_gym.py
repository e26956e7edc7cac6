"""Tasks of reasoning-gym as prompts: what a source says, what is refused, and the same rows in every process."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.extras import extra
from troupe.dataset import PromptDataset, gym
from troupe.dataset.gym_rows import main, make_rows
from troupe.errors import DatasetError


@dataclasses.dataclass
class SumConfig:
    """Of a task that adds `terms` ones, `index` times."""

    size: int = 500
    seed: int | None = None
    terms: int = 1
    words: list[str] | None = None


class Sums:
    def __init__(self, config: SumConfig) -> None:
        if not config.terms > 0:
            raise AssertionError("terms must be\npositive")
        self.config = config

    def __getitem__(self, index: int) -> dict[str, Any]:
        print("a task may print")
        start = (self.config.seed or 0) + index
        return {"question": f"{start} + {self.config.terms}?", "answer": start + self.config.terms, "metadata": {}}


@pytest.fixture
def fake_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reasoning_gym with two tasks."""
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": (Sums, SumConfig), "more_sums": (Sums, SumConfig)}  # type: ignore[attr-defined]
    package.create_dataset = lambda name, **options: Sums(SumConfig(**options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def prompts(source: str) -> list[str]:
    return [row["prompt"] for row in make_rows(f"reasoning_gym:{source}")]


@pytest.mark.usefixtures("fake_gym")
def test_a_row_has_question_answer_task_and_which_entry_it_is() -> None:
    rows = list(make_rows("reasoning_gym:sums?size=2&seed=7&terms=3&words=[%22a%22]"))
    options = {"size": 2, "seed": 7, "terms": 3, "words": ["a"]}
    origin = {"task": "sums", "options": options}
    assert rows == [
        {"prompt": "7 + 3?", "answer": "10", "task": "sums", "reasoning_gym": {**origin, "index": 0}},
        {"prompt": "8 + 3?", "answer": "11", "task": "sums", "reasoning_gym": {**origin, "index": 1}},
    ]


@pytest.mark.usefixtures("fake_gym")
def test_size_and_seed_have_defaults_and_the_seed_is_never_left_to_chance() -> None:
    rows = list(make_rows("reasoning_gym:sums"))
    assert (len(rows), rows[0]["reasoning_gym"]["options"]) == (500, {"size": 500, "seed": 0})


@pytest.mark.usefixtures("fake_gym")
def test_several_tasks_take_turns_and_may_have_options_of_their_own() -> None:
    source = "more_sums,sums?size=2&sums.size=3&more_sums.terms=5&terms=4"
    assert prompts(source) == ["0 + 5?", "0 + 4?", "1 + 5?", "1 + 4?", "2 + 4?"]


@pytest.mark.usefixtures("fake_gym")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "reasoning-gym has no task ''; there are 2"),
        ("sms", "reasoning-gym has no task 'sms'; did you mean sums"),
        ("sums,sums", "the task sums is named twice"),
        ("sums?trems=2", "the task sums has no option 'trems'; did you mean terms?"),
        ("sums,more_sums?x=2", "has no option 'x'; it has size, seed, terms, words .for one task alone, write TASK.x="),
        ("sums?other.terms=2", "other.terms is for the task 'other', which the source does not name"),
        ("sums?size=0", "size of sums is 0; give a whole number from 1 on"),
        ("sums?size=many", "size of sums is 'many'; give a whole number from 1 on"),
        ("sums?seed=-1", "seed of sums is -1; give a whole number from 0 on"),
        ("sums?seed=null", "seed of sums is None"),
        ("sums?terms=0", "the task sums refuses its options .*'terms': 0.*: terms must be positive; correct them"),
        ("sums?terms=x", "the task sums refuses its options"),
    ],
)
def test_what_cannot_be_made_is_refused_with_its_name(source: str, message: str) -> None:
    with pytest.raises(DatasetError, match=f"^reasoning_gym:.*{message}"):
        prompts(source)


@pytest.mark.usefixtures("fake_gym")
def test_the_child_prints_rows_or_an_error_and_nothing_that_a_task_prints(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gym_rows", "reasoning_gym:sums?size=1"])
    main()
    out, err = capfdbinary.readouterr()
    assert out.startswith(b'{"rows":[{"prompt":"0 + 1?"')
    assert err == b"a task may print\n"
    monkeypatch.setattr(sys, "argv", ["gym_rows", "reasoning_gym:x"])
    main()
    assert capfdbinary.readouterr().out.startswith(b'{"error":"reasoning_gym:x: reasoning-gym has no task')


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `reasoning_gym` on the import path that fails when it is imported."""
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    return package


def test_rows_come_from_a_process_in_which_texts_have_the_same_hashes_each_time(stand_in: Path) -> None:
    (stand_in / "__init__.py").write_text(
        "from reasoning_gym.factory import Hashes\ndef create_dataset(name, **options):\n    return Hashes()\n"
    )
    (stand_in / "factory.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "    size: int\n"
        "    seed: int\n"
        "class Hashes:\n"
        "    def __getitem__(self, index):\n"
        "        return {'question': str(hash('a text')), 'answer': None}\n"
        "DATASETS = {'hashes': (Hashes, Config)}\n"
    )
    one, other = (PromptDataset.load("reasoning_gym:hashes?size=2") for _ in range(2))
    assert [row.prompt for row in one] == [row.prompt for row in other]
    assert (one[1].columns["answer"], one[1].columns["reasoning_gym"]["index"], one[1].line) == (None, 1, None)
    with pytest.raises(
        DatasetError, match=r"^reasoning_gym:hashs: reasoning-gym has no task 'hashs'; did you mean hashes"
    ):
        PromptDataset.load("reasoning_gym:hashs")


@pytest.mark.usefixtures("stand_in")
def test_a_child_that_dies_is_told_with_what_it_said() -> None:
    with pytest.raises(DatasetError, match=r"reasoning_gym:sums: the process .* ended with code 1: it is broken"):
        gym.read_gym("reasoning_gym:sums")


@pytest.mark.slow
def test_real_tasks_are_the_same_in_every_process_also_those_that_draw_from_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra("reasoning_gym")
    source = "reasoning_gym:chain_sum,word_ladder,isomorphic_strings?size=4&seed=3&chain_sum.min_terms=3"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = PromptDataset.load(source)
    kept = PromptDataset.load(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = PromptDataset.load(source)
    assert one.fingerprint == other.fingerprint == kept.fingerprint
    assert [row.columns["task"] for row in one][:4] == ["chain_sum", "word_ladder", "isomorphic_strings", "chain_sum"]
    assert all(row.columns["answer"] for row in one)
