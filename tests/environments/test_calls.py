"""What the policy says is understood as TRL understands it; what is written wrongly is told; nothing takes for ever."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.extras import extra
from tests.support.tools import plain
from troupe.environments.calls import MOST_CALLS, CallStyle, parse_turn, which_calls
from troupe.environments.convention import ToolSpec
from troupe.environments.schemas import json_schema

TOOLS = (ToolSpec(name="plain", schema=json_schema(plain)),)
ARGUMENTS = {"a": 7, "b": 0.5, "c": "x\n y", "d": True}
HERMES = '<tool_call>\n{"name": "plain", "arguments": {"a": 7, "b": 0.5, "c": "x\\n y", "d": true}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=plain>\n<parameter=a>\n7\n</parameter>\n<parameter=b>\n0.5\n</parameter>\n"
    "<parameter=c>\nx\n y\n</parameter>\n<parameter=d>\ntrue\n</parameter>\n</function>\n</tool_call>"
)
CALL = {"type": "function", "function": {"name": "plain", "arguments": ARGUMENTS}}
STYLES: list[tuple[CallStyle, str]] = [("hermes", HERMES), ("xml", XML)]


@pytest.mark.parametrize(("style", "written"), STYLES)
def test_thoughts_text_and_calls(style: CallStyle, written: str) -> None:
    said = parse_turn(f"<think>\nhm <tool_call>\n</think>\n\nI call. {written}\n{written}", style, TOOLS)
    assert said.message == {
        "role": "assistant",
        "content": "I call.",
        "reasoning_content": "hm <tool_call>",
        "tool_calls": [CALL, CALL],
    }
    assert [(call.name, call.arguments, call.error) for call in said.calls] == [("plain", ARGUMENTS, "")] * 2
    assert said.text == "I call."


def test_thoughts_that_the_prompt_has_begun() -> None:
    assert parse_turn("hm</think> yes", None, begun="<think>\n").message == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "hm",
    }
    assert parse_turn("still", None, begun="<think>").message["reasoning_content"] == "still"


def test_without_tools_nothing_is_a_call() -> None:
    assert parse_turn(HERMES, "hermes").message == {"role": "assistant", "content": HERMES}
    assert parse_turn(HERMES, None, TOOLS).calls == ()


def test_text_around_calls_is_kept() -> None:
    assert parse_turn(f"one {HERMES} two {HERMES}", "hermes", TOOLS).text == "one\ntwo"


@pytest.mark.parametrize(
    ("style", "written", "name", "error"),
    [
        ("hermes", "<tool_call>{'name': 1}</tool_call>", "", "not valid JSON: Expecting property name"),
        ("hermes", '<tool_call>["plain"]</tool_call>', "", "not a JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "", 'has no "name"'),
        (
            "hermes",
            '<tool_call>{"name": "plain", "parameters": {}}</tool_call>',
            "plain",
            '"parameters", which is unkn',
        ),
        ("hermes", '<tool_call>{"name": "plain", "arguments": "a"}</tool_call>', "plain", '"arguments" is not a JSON'),
        ("hermes", '<tool_call>{"name": "plain", "arguments": {"a": NaN}}</tool_call>', "", "NaN is no number"),
        ("hermes", '<tool_call>{"name": "plain", "arguments": {"a": 1e999}}</tool_call>', "plain", "too large"),
        ("hermes", f'<tool_call>{{"name": "plain", "arguments": {{"a": {2**64}}}}}</tool_call>', "plain", "2\\^64"),
        (
            "hermes",
            '<tool_call>{"name": "plain", "arguments": {"a": "\\ud800"}}</tool_call>',
            "plain",
            "half of a char",
        ),
        (
            "hermes",
            f'<tool_call>{{"name": "p", "arguments": {{"a": {"[" * 60}{"]" * 60}}}}}</tool_call>',
            "p",
            "nested",
        ),
        ("hermes", f"<tool_call>{'[' * 100_000}</tool_call>", "", "too deep"),
        ("hermes", '<tool_call>{"name": "plain", ', "", "is not closed: </tool_call> is missing"),
        ("xml", '<tool_call>{"name": "plain"}</tool_call>', "", "does not begin with <function=NAME>"),
        ("xml", "<tool_call><function=>", "", "does not begin with <function=NAME>"),
        (
            "xml",
            "<tool_call><function=plain><parameter=a>1</function></tool_call>",
            "plain",
            "parameter a is not closed",
        ),
        ("xml", "<tool_call><function=plain><parameter=\n", "plain", "does not begin with <parameter=KEY>"),
        ("xml", "<tool_call><function=plain><parameter=a>1</parameter>", "plain", "the call is not closed"),
    ],
)
def test_a_call_that_is_written_wrongly_says_how(style: CallStyle, written: str, name: str, error: str) -> None:
    said = parse_turn(f"So: {written}", style, TOOLS)
    assert [call.name for call in said.calls] == [name]
    assert re.search(error, said.calls[0].error)
    assert said.message == {"role": "assistant", "content": f"So: {written}".strip()}


def test_what_is_whole_but_for_the_closing_tag_is_a_call() -> None:
    assert parse_turn(HERMES.removesuffix("</tool_call>"), "hermes", TOOLS).calls[0].arguments == ARGUMENTS
    assert parse_turn(XML.removesuffix("</tool_call>"), "xml", TOOLS).calls[0].arguments == ARGUMENTS


def test_texts_become_what_the_schema_says_where_they_can() -> None:
    written = (
        '<tool_call>{"name": "plain", "arguments": {"a": "7.0", "b": "1e1", "c": "7", "d": "1", "e": "7"}}</tool_call>'
    )
    (call,) = parse_turn(written, "hermes", TOOLS).calls
    assert call.arguments == {"a": 7, "b": 10, "c": "7", "d": True, "e": "7"}
    (call,) = parse_turn(written.replace('"7.0"', '"seven"'), "hermes", TOOLS).calls
    assert call.arguments["a"] == "seven"


def test_a_turn_has_so_many_calls_and_no_more() -> None:
    said = parse_turn(HERMES * (MOST_CALLS + 50), "hermes", TOOLS)
    assert len(said.message["tool_calls"]) == MOST_CALLS
    assert [call.error for call in said.calls[MOST_CALLS:]] == ["a turn may have 100 calls; those after were not made"]


@pytest.mark.parametrize("style", ["hermes", "xml"])
@pytest.mark.parametrize(
    "piece",
    [
        *("<tool_call>", "<think>", "</think>", "<tool_call><function=a>", "<parameter=", "<parameter=a>"),
        *("<tool_call></tool_call>", "<think></think>", "<tool_call><function=a><parameter=b>", "a>"),
        *("{", "[", "<", " ", '"\\', "9", "\n"),
    ],
)
def test_a_megabyte_of_anything_is_read_at_once(piece: str, style: CallStyle) -> None:
    began = time.process_time()
    for begin in ("", "<tool_call><function=a><parameter=a>", '<tool_call>{"name": '):
        parse_turn(begin + piece * (1_000_000 // len(piece)), style, TOOLS)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", "hermes"),
        ("<tool_call>\n<function={{ name }}>", "xml"),
        ("<tool_call>{{ name }}<arg_key>", None),
        ("<|python_tag|>", None),
    ],
)
def test_how_tools_are_called_is_read_from_the_template(template: str, style: CallStyle | None) -> None:
    assert which_calls(template) == style


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_templates_that_trl_knows_are_known() -> None:
    known = pytest.importorskip("trl.chat_template_utils")
    styles = {}
    for file in sorted((Path(known.__file__).parent / "chat_templates").glob("*.jinja")):
        tokenizer = SimpleNamespace(chat_template=file.read_text(encoding="utf-8"))
        with contextlib.suppress(ValueError):  # it knows no calls of this one
            parsed_by = known.add_response_schema(tokenizer).response_template
            xml = parsed_by in (known.qwen3_5_template, known.nemotron_3_template)
            expected = "hermes" if parsed_by == known.qwen3_template else "xml" if xml else None
            assert which_calls(tokenizer.chat_template) == expected, file.name
            styles[file.name] = expected
    assert {"hermes", "xml", None} <= set(styles.values())


def theirs(text: str, style: CallStyle, begun: str) -> dict[str, Any] | None:
    """What TRL makes of a turn; None where it cannot parse it, and takes all for text."""
    known, parsing = pytest.importorskip("trl.chat_template_utils"), extra("transformers.utils.chat_parsing")
    template = known.qwen3_template if style == "hermes" else known.qwen3_5_template
    try:
        parsed: dict[str, Any] = parsing.parse_response(
            text, template, prefix=f"<|im_start|>assistant\n{begun}", tools=[tool.schema for tool in TOOLS]
        )
    except (ValueError, TypeError):
        return None
    for call in parsed.get("tool_calls", []):
        if not isinstance(call["function"], dict) or not isinstance(call["function"].get("name"), str):
            return None
        call["function"].setdefault("arguments", {})
    return {"content": "", **parsed}


PARTS = [
    "Text. ",
    "<think>\nhm\n</think>\n\n",
    "<think>open",
    HERMES,
    XML,
    "\n",
    '<tool_call>{"name": "other"}</tool_call>',
]
PARTS += [
    "<tool_call>\n<function=plain>\n<parameter=a>\nseven\n</parameter>\n</function>\n</tool_call>",
    "</think>",
    " a ",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), max_size=5), st.sampled_from(["hermes", "xml"]), st.sampled_from(["", "<think>\n"])
)
def test_turns_are_understood_as_trl_does(parts: list[str], style: CallStyle, begun: str) -> None:
    """But for what TRL drops: all but the last of several texts or thoughts; and calls that it takes for text."""
    expected = theirs("".join(parts), style, begun)
    said = parse_turn("".join(parts), style, TOOLS, begun=begun)
    if expected is None or any(call.error for call in said.calls):
        return
    ours = dict(said.message)
    for key in ("content", "reasoning_content"):
        assert ours.pop(key, "").endswith(expected.pop(key, ""))
    assert ours == expected
