"""Chat templates against Qwen3's renderings by Hugging Face, and against templates that misbehave."""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.policy.tokenizer_vectors import DATA, read_vectors
from troupe.errors import ModelError
from troupe.policy.text.chat import ChatTemplate, choose_chat_template, load_chat_templates

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


STEPS = "{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ [{'content': '<é & ' ~ 'x>'}] | tojson }}", '[{"content": "<é & x>"}]'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("  {% if true %}\nyes\n  {% endif %}\nend", "yes\nend"),
        ("{% for i in [1, 2, 3, 4] %}" + STEPS + "{% endfor %}", "13"),
        ("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", "abhelloc"),
        ("{% for i in range(1, 4) %}{{ i }}{% endfor %}", "123"),
    ],
)
def test_what_templates_ask_for(source: str, expected: str) -> None:
    """JSON without HTML's escapes, trimmed blocks, loop controls, generation blocks, range."""
    assert render(source) == expected


def test_variables_of_the_template() -> None:
    template = ChatTemplate(
        "{{ eos_token }}|{{ tools is none }}|{{ add_generation_prompt }}|{{ mood }}", "t", {"eos_token": "<e>"}
    )
    assert template.render(HELLO, mood="good") == "<e>|True|False|good"


def test_strftime_now_is_the_local_time() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().astimezone().year + n) for n in (-1, 0)}


def test_the_day_may_be_another() -> None:
    today = ChatTemplate("{{ strftime_now('%d %b %Y, %H:%M') if strftime_now is defined }}", "t")
    assert today.asks_for_today
    assert not ChatTemplate("{{ messages }}", "t").asks_for_today
    assert today.dated(date(2024, 2, 29)).render(HELLO) == "29 Feb 2024, 00:00"


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
        pytest.param(
            "{% macro m(n) %}{{ m(n - 1) + m(n - 1) if n }}{% endmacro %}{{ m(40) }}",
            "200000 steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}",
            "200000 steps",
            marks=pytest.mark.slow,
        ),
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


GROWS = "{% set n = namespace(x='x') %}{% for i in range(100) %}{% set n.x = GROWN %}{% endfor %}{{ n.x | length }}"
SHARES = "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ [0] * 10**9 }}",
        "{{ (2**1000000) ** 1000000 }}",
        "{{ 'x' | center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'.zfill(10**10) }}",
        "{{ '\t'.expandtabs(10**10) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '{:{}}'.format(1, '>1000000000') }}",
        "{{ '{:{w[0]}}'.format(1, w=[1000000000]) }}",
        "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
        "{{ ('x' * 1000000).translate({120: 'y' * 1000}) }}",
        "{{ ('x' * 1000000) | replace('x', 'y' * 1000) }}",
        "{{ ('x' * 1000000).replace('x', 'y' * 1000) }}",
        "{{ ('y' * 1000).join('x' * 1000000) }}",
        "{{ ('x' * 10000) | join('y' * 10000) }}",
        "{{ ('\n' * 100000) | indent(100000, true) }}",
        "{{ ('x' * 100000) | wordwrap(1, true, 'y' * 10000) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ ('x ' * 5000000).split() | length }}",
        "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
        "{{ messages | map('string') | map('center', 10**9) | list }}",
        "{{ range(10**9) | list }}",
        "{{ strftime_now('%1000000000Y') }}",
        GROWS.replace("GROWN", "n.x ~ n.x"),
        GROWS.replace("GROWN", "n.x + n.x"),
        GROWS.replace("GROWN", "[n.x, n.x] | join"),
        GROWS.replace("GROWN", "n.x | replace('x', 'xx')"),
        GROWS.replace("GROWN", "'%s%s' % (n.x, n.x)"),
        GROWS.replace("GROWN", "'{0}{0}'.format(n.x)"),
        GROWS.replace("{% set n.x = GROWN %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROWS.replace("GROWN", "m(n.x)"),
        "{% set s = 'x' * 1000000 %}{% for i in range(90000) %}{{ s }}{% endfor %}",
        "{% set n = namespace(l=[]) %}{% set s = 'x' * 1000000 %}"
        "{% for i in range(9999) %}{% set n.l = n.l + [s[i:]] %}{% endfor %}",
        SHARES + "{{ n.x }}",
        SHARES + "{{ n }}",
        SHARES + "{{ n.x ~ '' }}",
        SHARES + "{{ n.x | tojson }}",
        SHARES + "{{ n.x | string | length }}",
        SHARES + "{{ '%s' % [n.x] }}",
        *(
            SHARES + f"{{{{ n.x | {name} }}}}"
            for name in ("upper", "title", "e", "trim", "wordcount", "center", "safe")
        ),
        SHARES + "{{ n.x | replace('a', 'b') }}",
        SHARES + "{{ 'a' | replace(n.x, 'b') }}",
        SHARES + "{{ n.x | format(1) }}",
        SHARES + "{{ n.x | indent }}",
        SHARES + "{{ [n.x] | map('lower') | list }}",
        SHARES + "{{ raise_exception(n.x) }}",
        *(
            SHARES + "{% for i in range(99) %}{% set n.y = [n.y, n.y] %}{% endfor %}" + compared
            for compared in (
                "{{ n.x == n.y }}",
                "{{ n.x is eq n.y }}",
                "{{ n.x is in [n.y] }}",
                "{{ [n.x] | select('lt', n.y) | list }}",
                "{{ [n.x].index(n.y) }}",
                "{{ [n.x].count(n.y) }}",
            )
        ),
        *(
            SHARES.replace("[", "(").replace("]", ",)") + hashed
            for hashed in (
                "{{ {n.x: 1} }}",
                "{{ {}[n.x] }}",
                "{{ {}.get(n.x) }}",
                "{{ dict([[n.x, 1]]) }}",
                "{{ dict.fromkeys([n.x]) }}",
                "{{ namespace([[n.x, 1]]) | string }}",
            )
        ),
    ],
)
def test_a_template_is_stopped_before_it_fills_the_memory(source: str) -> None:
    with pytest.raises(ModelError, match=r"^test\.jinja: the chat template failed .*OverflowError") as caught:
        render(source)
    assert len(str(caught.value)) < 1000


def test_what_templates_do_every_day_is_within_bounds() -> None:
    source = (
        "{{ 'a' + 'b' ~ 1 ~ [2] }} {{ '%s-%05.1f' % ('x', 2) }} {{ '{} {:>3}'.format('é', 7) }} {{ 2 ** 10 }}"
        " {{ 'a-b'.replace('-', '+') }} {{ ', '.join(['x', 'y']) }} {{ [1, 2] | sum }} {{ [[1], [2]] | sum(start=[]) }}"
        " {{ 7 % 4 }} {{ 'x' | center(3) | trim | indent(2) }} {{ messages[0].content[1:3] }}"
        " {{ messages | map(attribute='role') | list }}"
        " {{ 'a b' | wordcount }} {{ ['b', 'a'] | sort | join('') }} {{ {'k': 1}.items() | list }} {{ 'x'.ljust(3) }}|"
    )
    assert render(source) == ("ab1[2] x-002.0 é   7 1024 a+b x, y 3 [1, 2] 3 x el ['user'] 2 ab [('k', 1)] x  |")


def test_what_a_template_complains_of_is_cut() -> None:
    with pytest.raises(ModelError, match=r"x{500} … \(100000 characters\); check") as caught:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 9000, "{{ 1" + "+1" * 9000 + " }}", "{% if 1 %}" * 200, "x" * 1_000_001]
)
def test_a_source_that_nobody_can_compile_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=r"test\.jinja: (the chat template|line 1 of the chat template)"):
        render(source)
