"""Chat templates against Qwen3's renderings by Hugging Face, and against templates that misbehave."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.policy.tokenizer_vectors import DATA, read_vectors
from troupe.errors import ModelError
from troupe.policy.chat import ChatTemplate, choose_chat_template, load_chat_templates

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> str:
    return ChatTemplate(source, "test.jinja").render(HELLO if messages is None else messages, **kwargs)


@pytest.fixture(scope="module")
def qwen3() -> ChatTemplate:
    config = json.loads((DATA / "tokenizer_config.json").read_text(encoding="utf-8"))
    return load_chat_templates(DATA, config, {})["default"]


def test_qwen3_renderings(qwen3: ChatTemplate) -> None:
    for chat in read_vectors()["chats"]:
        kwargs = chat["chat_template_kwargs"]
        assert qwen3.render(chat["messages"], chat["tools"], chat["add_generation_prompt"], **kwargs) == chat["text"]


def test_tojson_does_not_escape_html_or_unicode() -> None:
    assert render("{{ messages | tojson }}", [{"content": "<é & 'x'>"}]) == '[{"content": "<é & \'x\'>"}]'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'
    assert render("{{ 'é' | tojson(ensure_ascii=true) }}") == '"\\u00e9"'


def test_blocks_are_trimmed() -> None:
    assert render("  {% if true %}\nyes\n  {% endif %}\nend") == "yes\nend"


def test_loop_controls_and_generation_blocks() -> None:
    steps = "{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
    assert render("{% for i in [1, 2, 3, 4] %}" + steps + "{% endfor %}") == "13"
    assert render("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c") == "abhelloc"


def test_variables_of_the_template() -> None:
    template = ChatTemplate(
        "{{ eos_token }}|{{ tools is none }}|{{ add_generation_prompt }}|{{ mood }}", "t", {"eos_token": "<e>"}
    )
    assert template.render(HELLO, mood="good") == "<e>|True|False|good"


def test_strftime_now_is_the_local_time() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().astimezone().year + n) for n in (-1, 0)}


def test_range_counts_within_its_budget() -> None:
    assert render("{% for i in range(1, 4) %}{{ i }}{% endfor %}") == "123"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(100001) %}{% endfor %}", "100000"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}", "100000"),
        ("{% set r = range(9999)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "200000 steps"),
        (
            "{% set r = range(999)|list %}{% for i in r %}{% for j in r|select %}{% endfor %}{% endfor %}",
            "200000 steps",
        ),
        ("{% macro m(n) %}{{ m(n - 1) + m(n - 1) if n }}{% endmacro %}{{ m(40) }}", "200000 steps"),
        ("{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}", "200000 steps"),
        ("{{ lipsum(n=1000000) }}", "lipsum"),
        ("{{ ''.__class__ }}", "__class__"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "forbidden"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_misbehaves_is_stopped_and_named(source: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        render(source)
    assert str(caught.value).startswith("test.jinja: the chat template failed")


def test_messages_are_not_changed_by_a_template_that_tries() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ModelError, match="clear"):
        render("{{ messages[0].clear() }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_broken_jinja_is_named_with_its_line() -> None:
    with pytest.raises(ModelError, match=r"test\.jinja: line 2 of the chat template is no valid Jinja"):
        render("fine\n{% if %}")


def test_the_template_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_chat_templates(tmp_path, {"chat_template": "config"}, {})["default"].render(HELLO) == "file"


def test_a_template_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: the chat template is not UTF-8"):
        load_chat_templates(tmp_path, {}, {})


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    templates = load_chat_templates(tmp_path, {"chat_template": named}, {})
    assert choose_chat_template(templates, "m", has_tools=False).render(HELLO) == "plain"
    assert choose_chat_template(templates, "m", has_tools=True).render(HELLO) == "tools"
    assert choose_chat_template(templates, "m", has_tools=True, name="default").render(HELLO) == "plain"
    with pytest.raises(ModelError, match=r"m: no chat template is called 'rag'; there are \['default', 'tool_use'\]"):
        choose_chat_template(templates, "m", has_tools=False, name="rag")


def test_no_template_and_malformed_ones_are_refused(tmp_path: Path) -> None:
    assert load_chat_templates(tmp_path, {}, {}) == {}
    with pytest.raises(ModelError, match="m: this model has no chat template"):
        choose_chat_template({}, "m", has_tools=False)
    with pytest.raises(ModelError, match="key chat_template must be text or a list"):
        load_chat_templates(tmp_path, {"chat_template": 3}, {})
