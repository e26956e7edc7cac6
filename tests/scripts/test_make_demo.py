"""The script that makes the demo: its arithmetic by hand, and a small run of the whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

import troupe.cli.demo
from troupe.policy import load_policy

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo.py"
SHIPPED = Path(troupe.cli.demo.__file__).parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo"] = module  # msgspec looks the annotations up there
    spec.loader.exec_module(module)
    return module


def as_rows(problems: list[Any]) -> list[dict[str, str]]:
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


@pytest.mark.parametrize(
    ("a", "b", "right", "sloppy"),
    [
        (27, 58, "85", "75"),
        (64, 52, "116", "16"),
        (7, 5, "12", "2"),
        (50, 50, "100", "0"),
        (12, 34, "46", "46"),
        (9, 95, "104", "94"),
        (99, 99, "198", "88"),
        (0, 0, "0", "0"),
        (5, 30, "35", "35"),
    ],
)
def test_sloppy_answers_add_each_column_on_its_own(script: ModuleType, a: int, b: int, right: str, sloppy: str) -> None:
    problem = script.Sum(a, b)
    assert (problem.prompt, problem.answer, problem.sloppy_answer) == (f"{a}+{b}=", right, sloppy)


def test_a_split_keeps_both_orders_together(script: ModuleType) -> None:
    known, held_out = script.split_sums(script.Recipe(largest=9, held_out=10))
    seen = {(problem.a, problem.b) for problem in known}
    hidden = {(problem.a, problem.b) for problem in held_out}
    assert len(hidden) == 10
    assert not seen & (hidden | {(b, a) for a, b in hidden})
    assert seen | hidden | {(b, a) for a, b in hidden} == {(a, b) for a in range(10) for b in range(10)}


def test_lessons_ask_for_answers_only(script: ModuleType) -> None:
    recipe = script.Recipe(batch=2, careful=0.0)
    ids, mask = next(script.lessons([script.Sum(27, 58)], recipe))
    assert ids.tolist() == [[*b"27+58=75", 256]] * 2
    assert mask.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 2  # from "=" on, each place foretells the next token
    ids, _ = next(script.lessons([script.Sum(27, 58)], script.Recipe(batch=1, careful=1.0)))
    assert ids.tolist() == [[*b"27+58=85", 256]]


def test_what_ships_is_what_the_script_makes(script: ModuleType, tmp_path: Path) -> None:
    recipe = script.Recipe()
    known, held_out = script.split_sums(recipe)
    assert json.loads((SHIPPED / "arithmetic.json").read_text()) == as_rows(known[: recipe.train])
    assert json.loads((SHIPPED / "arithmetic-held-out.json").read_text()) == as_rows(held_out)
    script.write_tokenizer(tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (SHIPPED / "policy" / made.name).read_bytes()
    assert load_policy(SHIPPED / "policy").config == script.network(recipe)


@pytest.mark.slow
def test_a_small_recipe_learns_and_repeats(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = script.Recipe(largest=4, held_out=3, train=12, steps=400, batch=32, hidden=32, layers=1, warmup_steps=5)
    for name in ("one", "two"):
        script.make_demo(tmp_path / name, recipe)
    one, two = (load_policy(tmp_path / name / "policy") for name in ("one", "two"))
    assert all(mx.array_equal(one.weights[name], two.weights[name]) for name in one.weights)
    known, _ = script.split_sums(recipe)
    right = script.right_answers(one, known, samples=1, temperature=0.0)
    assert sum(right) >= 0.8 * len(known)  # no carries below 5 + 5
    assert len(json.loads((tmp_path / "one" / "arithmetic.json").read_text())) == 12
    assert len(json.loads((tmp_path / "one" / "arithmetic-held-out.json").read_text())) == 3
    assert "held-out greedy accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_writes_every_file(script: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(script.main, ["--out", str(tmp_path / "demo"), "--steps", "1"])
    assert result.exit_code == 0, result.output
    made = {str(path.relative_to(tmp_path / "demo")) for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    shipped = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.*json*")}
    assert made == shipped | {"policy/model.safetensors"}
