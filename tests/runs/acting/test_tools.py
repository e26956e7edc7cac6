"""A whole run with tools, of a policy that says what a script has: calls, what comes of them, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import troupe
from tests.support.fakes import tiny_config
from tests.support.runs import STORED, column, completions
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.environments import StepResult
from troupe.errors import ConfigError, InputError, ModelError, WorldError
from troupe.policy import CompletedTurn, RolloutEngine, TurnRequest
from troupe.run.ledgers import Factories

pytestmark = pytest.mark.no_cover

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} call them by <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = '''
CALLS = []


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: One.
        b: Another.
    """
    return a + b


async def late(text: str) -> str:
    """Answers later.

    Args:
        text: Anything.
    """
    return text.upper()


def bare(a):
    return a
'''


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


SCRIPTS = (
    [call("add", a=1, b=2), "three"],
    [call("late", text="x") + call("add", a=2, b=2), call("add", a="x", b=[]), "well"],
    ["<tool_call>{add}</tool_call>", call("nobody"), "so be it"],
)


class ScriptedSession:
    """Says what the script of a row's sample has, turn by turn."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._turns: dict[tuple[int, ...], int] = {}

    def decode(self, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
        for request in requests:
            number = self._turns[request.row] = 0 if request.fresh else self._turns[request.row] + 1
            ids = (*SCRIPTS[request.row[-1]][number].encode(), 256)
            log_probs = (-1.0,) * len(ids)
            yield [
                CompletedTurn(
                    row=request.row,
                    token_ids=ids,
                    log_probs=log_probs,
                    sampling_log_probs=log_probs,
                    versions=(self._version,) * len(ids),
                    finish_reason="stop",
                )
            ]

    def forget(self, rows: Any) -> None:
        pass

    def close(self) -> None:
        pass


class ScriptedEngine(RolloutEngine):
    def session(self, *, sessions: int = 1) -> Any:
        return ScriptedSession(self.current_weights()[1][0])


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "caller"
    write_tiny_model(folder, msgspec.structs.replace(CONFIG, max_position_embeddings=2048))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def config_of(model: Path, folder: Path, *tools: str, **settings: Any) -> troupe.RunConfig:
    folder.mkdir(exist_ok=True)
    (folder / "tools.py").write_text(TOOLS)
    named = [f"{folder / 'tools.py'}:{name}" for name in tools or ("add", "late")]
    more = {"data__chat": "always", "generation__max_completion_length": 400, "environment__tools": named}
    return tiny_config(model, folder, **STORED | more | {"learner__max_steps": 2} | settings)


def own(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """Sees the conversation as TRL gives it."""
    return [float(len(messages)) for messages in completions]


def test_tools_are_called_and_what_they_say_is_read(caller: Path, tmp_path: Path) -> None:
    run = troupe.train(config_of(caller, tmp_path), [own], factories=Factories(engine=ScriptedEngine))
    assert run.complete
    assert not run.incidents
    first, second, third = (each for each in completions(run.folder) if (each.step, each.gid) == (1, 0))
    assert (first.reward, second.reward, third.reward) == (3.0, 6.0, 5.0)
    assert first.episode is not None
    assert second.episode is not None
    assert third.episode is not None
    [asked, ended] = first.episode.turns
    assert asked.answer.messages == ({"role": "tool", "name": "add", "content": "3"},)
    assert (ended.answer.said["content"], ended.answer.done) == ("three", True)
    read = first.token_ids[slice(*first.episode.observed[0])]
    assert read == [*b"[tool]3", 256, *b"[assistant]"]
    told = [[message["content"] for message in turn.answer.messages] for turn in second.episode.turns]
    assert told[0] == ["4", "X"], "those that are not async first, as in TRL"
    assert "error" in told[1][0]
    errors = [turn.answer.messages[0]["content"] for turn in third.episode.turns[:2]]
    assert all("error" in error for error in errors)
    assert "nobody" in errors[1]
    assert column(run.folder, "tools/call_frequency") == [pytest.approx(6 / 3)] * 2
    assert column(run.folder, "tools/failure_frequency") == [pytest.approx(3 / 6)] * 2


def test_most_turns_are_counted_as_trl_does_with_one_more(caller: Path, tmp_path: Path) -> None:
    config = config_of(caller, tmp_path, environment__max_turns=2)
    run = troupe.train(config, [own], factories=Factories(engine=ScriptedEngine))
    second = completions(run.folder)[1]
    assert second.episode is not None
    assert len(second.episode.turns) == 2
    assert second.episode.turns[1].answer.messages == (), "nobody would read what it asks for"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        pytest.param({"environment__max_turns": 0}, ConfigError, ["environment.max_turns is 0"], id="no turn"),
        pytest.param({"tools": ["bare"]}, WorldError, ["tools.py", "bare"], id="a tool without hints"),
        pytest.param({"tools": ["nobody"]}, WorldError, ["tools.py", "nobody"], id="no such tool"),
        pytest.param(
            {"learner__turn_advantages": "gigpo"},
            ConfigError,
            ["turn_advantages", "state_id"],
            id="states without names",
        ),
        pytest.param({"data__chat": "auto"}, WorldError, ["prompts.json", "data.chat"], id="texts are no conversation"),
    ],
)
def test_bad_input_is_told_before_sampling(
    caller: Path, tmp_path: Path, change: dict[str, Any], error: type[InputError], words: list[str]
) -> None:
    change = dict(change)
    tools = change.pop("tools", ())
    with pytest.raises(error) as caught:
        troupe.train(config_of(caller, tmp_path, *tools, **change), [own])
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()


def test_a_template_without_tools_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="never refers to tools"):
        troupe.train(config_of(tiny_model, tmp_path), [own])


def test_rows_name_environments(caller: Path, tmp_path: Path) -> None:
    class Quiet:
        def reset(self, **columns: Any) -> None:
            pass

        def step(self, text: str) -> StepResult:
            return StepResult(done=True)

    config = config_of(caller, tmp_path, environment__tools=[])
    rows = [{"prompt": "ab", "environment": name} for name in ("one", "two", "tow")]
    Path(str(config.data.path)).write_text(json.dumps(rows))
    with pytest.raises(WorldError, match=r"prompts\.json.*tow"):
        troupe.train(config, [own], environment_factory={"one": Quiet, "two": Quiet})
