"""What a policy sees as its own teacher: beside TRL, and what cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from troupe import RunConfig
from troupe.actors.teacher.settings import TeacherConfig
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError, DatasetError
from troupe.run.config import load_config
from troupe.run.demonstrations import demonstrated_prompts

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "trl" / "sdft.json").read_text(encoding="utf-8"))


def config_of(**teacher: Any) -> RunConfig:
    table = {"model": {"path": "m"}, "data": {"path": "d.json"}, "teacher": {"model_kind": "ema"} | teacher}
    return load_config(None, [table | {"rewards": {"functions": ["char_count"]}}])


def shown(rows: list[dict[str, Any]], config: RunConfig, *, acts: bool = False) -> list[Any]:
    """The prompts that are told in ids, for which their lengths stand here."""
    told: list[Any] = []

    def tokenize(dataset: PromptDataset) -> list[tuple[int, ...]]:
        told.extend(row.prompt for row in dataset)
        return [tuple(range(len(str(row.prompt)))) for row in dataset]

    dataset = PromptDataset.from_numbered(((i + 1, row) for i, row in enumerate(rows)), "d.jsonl", config.data)
    demonstrated_prompts(config, dataset, tokenize, acts=acts)
    return told


@pytest.mark.parametrize("case", VECTORS["prompts"], ids=range(len(VECTORS["prompts"])))
def test_prompts_are_those_of_trl(case: dict[str, Any]) -> None:
    row = {"prompt": case["prompt"], "privileged_context": case["context"]}
    assert shown([row], config_of(prompt_template=case["template"])) == [case["seen"]]


def test_the_template_is_that_of_trl_by_default() -> None:
    assert TeacherConfig().prompt_template == VECTORS["default_template"]


GOOD: dict[str, Any] = {"prompt": "1+1", "privileged_context": "2"}
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no column": ([{"prompt": "a"}], {}, "d.jsonl: has no column 'privileged_context'"),
    "nothing there": ([GOOD, GOOD | {"privileged_context": ""}], {}, "d.jsonl:2: row 1 has nothing in the column"),
    "lacking": ([GOOD, {"prompt": "a"}], {}, "d.jsonl:2: row 1 has nothing in the column"),
    "not the user": (
        [GOOD | {"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}],
        {},
        "d.jsonl:1: row 0: the conversation does not end with a text of the user",
    ),
    "parts": ([GOOD | {"privileged_context": [{"content": [{"text": "2"}]}]}], {}, "d.jsonl:1: .*nor messages whose"),
    "texts": ([GOOD | {"privileged_context": ["2"]}], {}, "d.jsonl:1: .*nor messages whose"),
    "acting": ([GOOD], {"acts": True}, "acts in an environment"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shown_is_refused(case: str) -> None:
    rows, settings, told = REFUSED[case]
    with pytest.raises((ConfigError, DatasetError), match=told):
        shown(rows, config_of(), **settings)


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({"prompt_template": "{prompt}"}, r"lacks \{privileged_context\}"),
        ({"path": "x"}, "the policy teaches itself, and another teacher is named"),
        ({"dtype": "bfloat16"}, "leave dtype out"),
        ({"update_rate": 1.5}, "update_rate"),
        ({"sync_steps": 0}, "sync_steps"),
        ({"coef": 0.0, "reward_coef": 0.0}, "nothing is learned from"),
    ],
)
def test_settings_that_cannot_be_are_refused(teacher: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(**teacher)
