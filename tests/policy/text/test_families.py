"""What Llama 3, SmolLM2 and Gemma 3 ask of tokenizer and chat template beside ids: calls, tools, roles, begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.policy.text.test_added_tokens import CONFIG, DECODER, HELD, TEXT, folder_of, token
from tests.policy.text.test_conversations import HELLO, said
from tests.policy.text.test_tokenizer import BYTE_LEVEL, load, with_merges
from tests.support.extras import extra
from troupe.errors import InputError, ModelError
from troupe.policy.text.tokenizer import Tokenizer, opened_thought

LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "1 May 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- for t in tools or [] %}
    {{- t | tojson(indent=4) + "\\n\\n" }}
{%- endfor %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {{- message.content | tojson if message.content is mapping else message.content }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("only single calls at once") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}" }}
    {%- else %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim }}
    {%- endif %}
    {{- "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""
"""Written in the manner of Llama 3's: variables that are set where they are not given, calls as JSON."""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ item['text'] | trim if item['type'] == 'text' else '<image>' }}
        {%- endfor -%}
    {%- endif -%}
    {{ '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<turn>model\\n' }}
{%- endif -%}
"""
"""Written in the manner of Gemma 3's: roles of its own that alternate, the system's words before the user's first."""

TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Köln", "n": [1, None]}}}
SYSTEM = {"role": "system", "content": " Be kind. "}
CHATS: list[list[dict[str, Any]]] = [
    [HELLO],
    [SYSTEM, HELLO, said("Yes "), HELLO],
    [HELLO, said(None, tool_calls=[CALL]), {"role": "tool", "content": "sunny"}],
    [HELLO, said("", tool_calls=[CALL]), {"role": "ipython", "content": {"sky": "blue"}}, said("Sunny.")],
    [HELLO, said("", tool_calls=[CALL, CALL])],
    [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]}],
    [HELLO, HELLO],
]
ASKED: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"tools": [TOOL], "date_string": "2 May 2024"},
    {"custom_tools": [TOOL], "add_generation_prompt": True},
]


def template_of(folder: Path, template: str) -> Tokenizer:
    config = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
    return Tokenizer.from_pretrained(folder_of(folder, config))


def test_a_call_by_llama_s_template(tmp_path: Path) -> None:
    text = template_of(tmp_path, LLAMA).apply_chat_template(
        [HELLO, said(None, tool_calls=[CALL]), {"role": "tool", "content": "sunny"}],
        tools=[{"name": "w"}],
        add_generation_prompt=True,
        date_string="2 May 2024",
    )
    assert text == (
        '<|im_start|><|head|>system<|/head|>\n\nToday: 2 May 2024\n\n{\n    "name": "w"\n}\n\n<|eot|>'
        "<|head|>user<|/head|>\n\nHello<|eot|>"
        '<|head|>assistant<|/head|>\n\n{"name": "w", "parameters": {"c": "Köln", "n": [1, null]}}<|eot|>'
        "<|head|>ipython<|/head|>\n\nsunny<|eot|><|head|>assistant<|/head|>\n\n"
    )


def test_roles_by_gemma_s_template_and_tools_that_it_does_not_know(tmp_path: Path) -> None:
    gemma = template_of(tmp_path, GEMMA)
    text = gemma.apply_chat_template([SYSTEM, HELLO, said("Yes "), HELLO], add_generation_prompt=True)
    assert text == (
        "<|im_start|><turn>user\n Be kind. \n\nHello</turn>\n<turn>model\nYes</turn>\n<turn>user\nHello</turn>\n"
        "<turn>model\n"
    )
    with pytest.raises(InputError, match="the chat template never refers to tools"):
        gemma.apply_chat_template([HELLO], tools=[TOOL])
    with pytest.raises(ModelError, match="roles must alternate"):
        gemma.apply_chat_template([HELLO, HELLO])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [LLAMA, GEMMA])
def test_both_are_rendered_as_transformers_renders_them(tmp_path: Path, template: str) -> None:
    ours = template_of(tmp_path, template)
    theirs = extra("transformers").AutoTokenizer.from_pretrained(tmp_path)
    rendered = 0
    for chat in CHATS:
        for asked in ASKED:
            known = {name: value for name, value in asked.items() if not ours.unknown_variables(**{name: value})}
            try:
                expected = theirs.apply_chat_template(chat, tokenize=False, **known)
            except Exception:
                with pytest.raises(ModelError):
                    ours.apply_chat_template(chat, **known)
                continue
            assert ours.apply_chat_template(chat, **known) == expected
            rendered += 1
    assert rendered >= 4


def calling(folder: Path) -> Tokenizer:
    """Id 261 is a special token that begins a call."""
    decoder = {**DECODER, "261": token("<|python_tag|>")}
    return Tokenizer.from_pretrained(folder_of(folder, {"added_tokens_decoder": decoder}))


def test_a_completion_keeps_the_special_token_that_makes_it_a_call(tmp_path: Path) -> None:
    tokenizer = calling(tmp_path)
    ids = [261, *b"f()", 258, 999]
    assert tokenizer.decode_sampled(ids) == "<|python_tag|>f()"
    assert tokenizer.decode(ids[:-1]) == "f()", "as transformers decodes"
    stream = tokenizer.sampled_stream()
    assert "".join(map(stream.push, ids[:-1])) + stream.finish() == "<|python_tag|>f()"


def test_thoughts_that_a_prompt_opens_are_seen_behind_any_special_token(tmp_path: Path) -> None:
    tokenizer = calling(tmp_path)
    prompt = [{"role": "user", "content": "x"}]
    ids = tokenizer.encode("<|im_end|>model\n<think>\nWell", add_special_tokens=False)
    assert opened_thought(tokenizer, prompt, ids) == "<think>\nWell"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("class_", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_what_stands_around_a_text_is_the_post_processor_s_alone(
    tmp_path: Path, class_: str, bos: bool | None, eos: bool | None
) -> None:
    asked = {key: value for key, value in (("add_bos_token", bos), ("add_eos_token", eos)) if value is not None}
    config = {**CONFIG, "tokenizer_class": class_, "bos_token": "<|im_start|>", **asked}
    folder = folder_of(tmp_path, config, HELD)
    theirs = extra("transformers").AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.from_pretrained(folder).encode(TEXT) == theirs.encode(TEXT)


def test_a_digit_is_a_word_and_ends_white_space(tmp_path: Path) -> None:
    """SmolLM2's: "a  1" has two spaces before a digit, of which none stays back."""
    digits = {"type": "Digits", "individual_digits": True}
    smollm = {"type": "Sequence", "pretokenizers": [digits, {**BYTE_LEVEL, "use_regex": True}]}
    merges = with_merges("Ġ Ġ", "1 2", "Ġ 1", "Ġ a")
    assert load(tmp_path, pre_tokenizer=smollm, **merges).encode("a  12 a") == [97, 258, 49, 50, 261]
    runs = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {**BYTE_LEVEL, "use_regex": True}]}
    assert load(tmp_path, pre_tokenizer=runs, **merges).encode("a  12 a") == [97, 258, 259, 261]


def test_whole_words_that_are_tokens_are_no_merges(tmp_path: Path) -> None:
    """Of `ignore_merges`: a token that two others make and no merge does would be merged within longer words too."""
    changes = with_merges("a b")
    vocab = changes["model__vocab"]
    changes |= {"model__ignore_merges": True}
    tokenizer = load(tmp_path, **{**changes, "model__vocab": vocab | {"xyz": 259}})
    assert tokenizer.encode("xyz") == [259]
    with pytest.raises(ModelError, match=r"tokenizer\.json: model.ignore_merges is true, and token 260, 'bc', is two"):
        load(tmp_path, **{**changes, "model__vocab": vocab | {"bc": 260}})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "Digits", "wishes": True}, "part .*'wishes': True.* is not supported; supported are one Split"),
        ({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": True}, "'invert': True"),
        ({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": False}, "'Removed'"),
        ({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated"}, "splits 2 times, by 'a' then .*Digits"),
    ],
)
def test_splits_that_are_not_known_are_refused(tmp_path: Path, part: dict[str, Any], message: str) -> None:
    split = {"type": "Sequence", "pretokenizers": [part, {**BYTE_LEVEL, "use_regex": True}]}
    with pytest.raises(ModelError, match=rf"tokenizer\.json: pre_tokenizer .*{message}"):
        load(tmp_path, pre_tokenizer=split)
