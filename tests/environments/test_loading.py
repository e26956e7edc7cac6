"""The world by names: from files, modules and Python, and every way in which it can be wrong before a run begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import tools
from troupe.dataset.rows import PromptRow
from troupe.environments import adapters
from troupe.environments.convention import EnvironmentSpec
from troupe.environments.loading import check_rows, load_world
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError

GOOD = '''\
from __future__ import annotations
from troupe.environments import StepResult

def look(where: str) -> str:
    """Looks.

    Args:
        where: A place
    """
    return where
look.retries = True

class Base:
    def wait(self, minutes: int) -> None:
        """Waits.

        Args:
            minutes: How long
        """

class Game(Base):
    retries = True
    def __init__(self):
        self.callback = look
    def reset(self, level: int, **columns) -> str | None: ...
    async def ask(self, question: str) -> str:
        """Asks.

        Args:
            question: What
        """
    @property
    def broken(self):
        raise RuntimeError("is not looked at")
    def get_reward(self) -> float: ...
    def save_state(self): ...
    def load_state(self, data): ...
    def close(self): ...
    def _secret(self): ...

class Talk:
    close = 0
    def reset(self, level=0): ...
    def step(self, text: str) -> StepResult: ...
    def state_id(self, observation): ...

class Walk:
    def reset(self, **columns): ...
    def step(self, direction: str) -> str:
        """Takes a step.

        Args:
            direction: Where to
        """
        return ""

def make_game():
    return Game()
number = 3
'''


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, text: str = GOOD) -> Path:
    (folder / "mine.py").write_text(text)
    return folder


def test_an_environment_of_a_file_with_tools_beside_it(tmp_path: Path) -> None:
    config = EnvironmentConfig(factory="mine.py:Game", tools=("mine.py:look",))
    world = load_world(config, [tools.plain], base=write(tmp_path))
    (spec,) = world.environments.values()
    assert [tool.name for tool in spec.tools] == ["look", "plain", "ask", "wait"]
    assert [tool.is_async for tool in spec.tools] == [False, False, True, False]
    assert [tool.is_method for tool in spec.tools] == [False, False, True, True]
    assert [tool.retries for tool in spec.tools] == [True, False, False, False]
    assert (spec.name, spec.label, spec.has_step, spec.has_reward, spec.can_save) == ("Game", "Game", False, True, True)
    assert (spec.has_close, spec.has_state_id, spec.retries) == (True, False, True)
    assert (spec.reset_takes, spec.reset_requires) == (None, ("level",))
    assert world.spec_of({"environment": "ignored"}) is spec
    assert type(world.probes["Game"]) is type(world.factories["Game"]())
    function = world.function("look")
    assert function is not None
    assert function("x") == "x"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=EnvironmentSpec) == spec


def test_a_table_of_environments_from_a_file_and_from_python(tmp_path: Path) -> None:
    config = EnvironmentConfig(factory={"game": "mine.py:make_game", "talk": "mine.py:Talk"})
    world = load_world(config, base=write(tmp_path))
    assert {name: spec.label for name, spec in world.environments.items()} == {"game": "Game", "talk": "Talk"}
    assert world.spec_of({"environment": "talk"}).has_step
    again = load_world(EnvironmentConfig(), [tools.later], world.factories)
    assert again.multi
    assert again.environments["game"].tools[1:] == world.environments["game"].tools


def test_only_tools() -> None:
    world = load_world(EnvironmentConfig(), [tools.plain, tools.later])
    spec = world.spec_of({})
    assert (spec.name, spec.is_live, [tool.name for tool in spec.tools]) == ("", False, ["plain", "later"])


def test_a_step_that_returns_text_is_a_tool_like_any_other(tmp_path: Path) -> None:
    (spec,) = load_world(EnvironmentConfig(factory="mine.py:Walk"), base=write(tmp_path)).environments.values()
    assert (spec.has_step, [tool.name for tool in spec.tools]) == (False, ["step"])


def test_an_adapter_is_found_by_its_prefix_and_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    place = adapters.Place("tests.support.no_such_module", "gymnasium")
    monkeypatch.setitem(adapters.ADAPTERS, "imagined", place)
    with pytest.raises(
        WorldError, match=r'"imagined:a:b" needs a package: No module named .*no_such_module.*gymnasium'
    ):
        load_world(EnvironmentConfig(factory="imagined:a:b"))
    with pytest.raises(WorldError, match='"imagined:" names nothing'):
        load_world(EnvironmentConfig(factory="imagined:"))


def environment(body: str) -> str:
    return f"class E:\n    def reset(self, **columns): ...\n{body}"


BAD = [
    ("class E:\n    pass\n", r"mine.py:1: environment E has no reset; write def reset"),
    ("class E:\n    reset = 3\n", r"mine.py:1: reset of E is 3 \(int\); it must be a method"),
    ("class E:\n    def reset(self, a, /): ...\n", r"mine.py:2: reset takes 'a' by position only"),
    (
        environment("    def __init__(self, x): ...\n"),
        r"mine.py:1: E\(\) failed: TypeError: .*it is called without arg",
    ),
    (
        environment("    def __init__(self): raise ValueError('no board')\n"),
        r"mine.py:1: E\(\) failed: ValueError: no bo",
    ),
    (environment("    def go(self, x):\n        '''Goes.'''\n"), r"mine.py:3: tool E.go has no type hint.*call it _go"),
    (environment("    def go(self): ...\n"), r"mine.py:3: tool E.go has no docstring.*if go is no tool, call it _go"),
    (environment("    def save_state(self): ...\n"), r"mine.py:1: environment E has save_state but no load_state"),
    (environment("    get_reward = staticmethod(dict)\n"), r"mine.py:1: get_reward of E is .*; it must be a method"),
    (environment("    def get_reward(self, x): ...\n"), r"mine.py:3: get_reward of E is called without arguments"),
    ("E = 3\n", r"mine.py: E is 3 \(int\), which cannot be called"),
    ("async def E(): ...\n", r"mine.py:1: .*E is an async function"),
    ("def E(): ...\n", r"mine.py:1: E\(\) returned None"),
    ("x = 1\nimport nothing_of_the_kind\n", r"mine.py:2: the file does not import: ModuleNotFoundError"),
    ("x = 1\n", r"mine.py: has no 'E'; name a class or function of it"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_an_environment_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorldError, match=message):
        load_world(EnvironmentConfig(factory="mine.py:E"), base=write(tmp_path, text))


def one(a: int) -> int:
    """One.

    Args:
        a: b
    """
    return a


@pytest.mark.parametrize(
    ("config", "given", "factory", "message"),
    [
        ({}, [], None, "no environment and no tool"),
        ({"tools": ["mine.py:number"]}, [], None, r"tool 3 \(int\) is no function"),
        ({"tools": ["mine.py:Talk"]}, [], None, "is no function with a name"),
        ({"tools": ["mine.py"]}, [], None, "tool 'mine.py' names a file and nothing in it; write mine.py:NAME"),
        ({"tools": ["gone.py:f"]}, [], None, "gone.py: no such file"),
        ({}, [lambda a: a], None, r"test_loading.py:\d+: tool .* is no function with a name"),
        ({}, [one, one], None, "two tools are called 'one'"),
        ({"factory": "mine.py:Game", "tools": ["mine.py:look"]}, [tools.plain, tools.plain], None, "called 'plain'"),
        ({"factory": "Game"}, [], None, "environment 'Game' is unknown; give FILE.py:NAME"),
        ({"factory": "nothing:Game"}, [], None, "nothing: environment code is a .py file"),
        (
            {"factory": "mine.py:Game"},
            [],
            dict,
            "environment_factory is given, and environment.factory = 'mine.py:Game'",
        ),
        ({}, [], {}, "a table of environments needs names"),
        ({}, [], {"a": 3}, r"environment 'a' is 3 \(int\), which cannot be called"),
    ],
)
def test_what_is_named_wrongly_is_refused(
    tmp_path: Path, config: dict[str, Any], given: list[Callable[..., Any]], factory: Any, message: str
) -> None:
    with pytest.raises(WorldError, match=message):
        load_world(msgspec.convert(config, EnvironmentConfig), given, factory, write(tmp_path))


def test_a_function_and_a_method_of_one_name_are_refused(tmp_path: Path) -> None:
    def ask(a: int) -> int:
        """One.

        Args:
            a: b
        """
        return a

    with pytest.raises(WorldError, match="two tools of Game are called 'ask'"):
        load_world(EnvironmentConfig(factory="mine.py:Game"), [ask], base=write(tmp_path))


def test_rows_that_no_episode_can_begin_with_are_refused(tmp_path: Path) -> None:
    table = EnvironmentConfig(factory={"game": "mine.py:Game", "talk": "mine.py:Talk"})
    world = load_world(table, base=write(tmp_path))

    def row(prompt: Any = ({"role": "user", "content": "a"},), line: int | None = 7, **columns: Any) -> PromptRow:
        return PromptRow(prompt=prompt if isinstance(prompt, str) else list(prompt), columns=columns, row=2, line=line)

    check_rows(world, [row(environment="game", level=1), row(environment="talk")], "rows.jsonl")
    for bad, message in [
        (row(level=1), "rows.jsonl:7: the row has no column `environment`; it says which one is meant, of game, talk"),
        (row(environment="gam", level=1), r"rows.jsonl:7: .* 'gam' \(str\) is unknown \(did you mean game\?\)"),
        (row(environment=3, line=None), r"rows.jsonl, row 2: the row's environment 3 \(int\) is unknown; there are"),
        (row(environment="game"), "no column 'level', which reset of Game requires"),
        (row("a", environment="talk"), "the prompt is a plain text, and an episode is a conversation"),
    ]:
        with pytest.raises(WorldError, match=message):
            check_rows(world, [bad], "rows.jsonl")
