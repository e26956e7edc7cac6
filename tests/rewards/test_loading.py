"""Rewards by name: built-in, from the user's file, and every way in which a file can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from troupe.errors import RewardError
from troupe.rewards import (
    RewardActor,
    RewardSample,
    diversity_reward,
    exact_answer_reward,
    length_reward,
    load_reward,
    think_format_reward,
)

pytestmark = pytest.mark.anyio

GOOD = """\
from dataclasses import dataclass
import asyncio
from troupe.rewards import RewardActor
CALLS = []
def kind(completions, **columns):
    CALLS.append(1)
    return [float(len(CALLS))] * len(completions)
async def later(prompts, completions, **columns):
    return [0.5]
class Judge(RewardActor):
    name = "judge"
    async def score(self, sample):
        return float(len(sample.completion))
judge = Judge()
number = 3
class Plain:
    pass
class Abstract(RewardActor):
    pass
def texts(strings):
    return []
"""


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_built_in_names() -> None:
    assert load_reward("length") is length_reward
    assert load_reward("diversity") is diversity_reward
    assert load_reward("exact_answer") is exact_answer_reward
    reward = load_reward("format:a:b+")
    assert not isinstance(reward, RewardActor)
    assert reward(completions=["a:bb", "a"]) == [1.0, 0.0]
    assert load_reward("think_format") is think_format_reward


@pytest.mark.parametrize(
    ("spec", "ids", "score"),
    [
        ("repetition_penalty", [7, 7, 7, 7], -0.5),
        ("repetition_penalty:2:-3", [7, 7, 7, 7], -2.0),
        ("soft_overlong:10:4", [7] * 7, -0.25),
    ],
)
def test_names_with_numbers(spec: str, ids: list[int], score: float) -> None:
    reward = load_reward(spec)
    assert not isinstance(reward, RewardActor)
    assert reward(completion_ids=[ids]) == [pytest.approx(score)]


async def test_functions_and_actors_of_one_file_share_one_module(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    kind, again = load_reward("mine.py:kind", tmp_path), load_reward(f"{tmp_path}/mine.py:kind")
    later, judge, made = (load_reward(f"mine.py:{name}", tmp_path) for name in ("later", "judge", "Judge"))
    assert kind is again
    assert not isinstance(kind, RewardActor)
    assert not isinstance(later, RewardActor)
    assert kind(completions=["a"]) == [1.0]
    assert await later(prompts=["p"], completions=["c"]) == [0.5]
    assert isinstance(judge, RewardActor)
    assert isinstance(made, RewardActor)
    assert judge is not made
    sample = RewardSample(prompt="p", completion="abc", completion_ids=(), columns={}, gid=None, index=0)
    assert await made.score(sample) == 3.0


def test_running_a_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    load_reward("mine.py:kind", tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_file_is_a_new_module(tmp_path: Path) -> None:
    write(tmp_path, "def f(completions):\n    return [1]\n")
    first = load_reward("mine.py:f", tmp_path)
    write(tmp_path, "def f(completions):\n    return [2]\n")
    second = load_reward("mine.py:f", tmp_path)
    assert not isinstance(first, RewardActor)
    assert not isinstance(second, RewardActor)
    assert (first(completions=["a"]), second(completions=["a"])) == ([1], [2])


def test_a_file_imports_its_neighbours_and_its_folder_comes_last(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 4\n", "troupe_test_neighbour.py")
    write(tmp_path, "def f(completions):\n    import troupe_test_neighbour as n\n    return [n.VALUE]\n")
    reward = load_reward("mine.py:f", tmp_path)
    load_reward("mine.py:f", tmp_path)
    assert not isinstance(reward, RewardActor)
    assert reward(completions=["a"]) == [4]
    assert sys.path[-1] == str(tmp_path.resolve())
    assert sys.path.count(str(tmp_path.resolve())) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght", r"reward 'lenght' is unknown \(did you mean length\?\); give length, diversity"),
        ("format", "is unknown"),
        ("mine.py", "reward 'mine.py' names a file and nothing in it; write mine.py:NAME"),
        ("mine.py:", "reward 'mine.py:' names a file and nothing in it; write mine.py:NAME"),
        (":kind", "is unknown"),
        ("mine.txt:kind", r"mine\.txt: reward code is a \.py file, not '\.txt'"),
        ("no.py:kind", r"no\.py: no such file"),
        ("mine.py:kidn", r"mine\.py: has no 'kidn' \(did you mean kind\?\)"),
        ("mine.py:number", r"mine\.py: number is of type int and cannot be called"),
        ("mine.py:Plain", r"mine\.py:16: class Plain is no RewardActor"),
        ("mine.py:Abstract", r"mine\.py:18: Abstract\(\) failed: TypeError"),
        ("mine.py:texts", r"mine\.py:20: reward texts cannot take `completions`"),
        ("format:(", "is no regular expression"),
        ("soft_overlong", "write soft_overlong:LONGEST:CACHE, LONGEST a whole number and CACHE a whole number"),
        ("soft_overlong:10:x", "'soft_overlong:10:x' cannot be read"),
        ("soft_overlong:10:11", "soft_punish_cache = 11; give a whole number of tokens from 0 to 10"),
        ("repetition_penalty:2", "write repetition_penalty:N:PENALTY, N a whole number and PENALTY a number"),
        ("repetition_penalty:0:-1", "ngram_size = 0"),
    ],
)
def test_specs_that_name_nothing_usable(tmp_path: Path, spec: str, message: str) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(RewardError, match=message):
        load_reward(spec, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", "mine.py:2: the file does not import: SyntaxError"),
        ("x = 1\n\nimport troupe_no_such_module\n", "mine.py:3: .*ModuleNotFoundError.*troupe_no_such_module"),
        ("def g():\n    return 1 / 0\nx = 1\ng()\n", "mine.py:2: .*ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: .*SystemExit: 3"),
        ("import json\njson.loads('x')\n", "mine.py:2: .*JSONDecodeError"),
        ("x = '\0'\n", "mine.py:1: .*"),
    ],
)
def test_a_file_that_does_not_import_is_named_with_its_own_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text)
    modules = set(sys.modules)
    with pytest.raises(RewardError, match=message):
        load_reward("mine.py:f", tmp_path)
    assert not [name for name in set(sys.modules) - modules if name.startswith("troupe_reward_")]
