"""Messages as templates read them, and answers that are continued: against transformers, and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.policy.text.test_added_tokens import folder_of
from tests.policy.tokenizer_vectors import DATA
from tests.support.extras import extra
from troupe.errors import InputError
from troupe.policy.text.chat import plain_messages
from troupe.policy.text.tokenizer import Tokenizer

QWEN3 = json.loads((DATA / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
SPOILS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
KEEPS = "{% for m in messages %}{{ m }}|{% endfor %}"
MUTE = "{{ messages | length }}content"

HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Paris"}}}


def said(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


CHATS: list[list[dict[str, Any]]] = [
    [HELLO],
    [HELLO, said("Sure: the city of")],
    [HELLO, said("Trailing blanks  \n\n")],
    [HELLO, said("\n  leading")],
    [HELLO, said("")],
    [HELLO, said("<think>\nWell")],
    [HELLO, said("<think>\nWell\n</think>\n\nYes")],
    [HELLO, said("Yes", reasoning="Well"), {"role": "user", "content": "More"}, said("And")],
    [HELLO, said("Yes", thinking="Well", reasoning_content=None)],
    [HELLO, said("Yes", reasoning_content="A", thinking="B", reasoning="C")],
    [HELLO, said(None, tool_calls=[TOOL], name=None), {"role": "tool", "content": "sunny", "tool_calls": None}],
    [HELLO, said("", reasoning="Ask", tool_calls=[TOOL]), {"role": "tool", "content": "sunny"}, said("It is")],
    [HELLO, said([{"type": "text", "text": "blocks"}, {"type": "image"}])],
    [HELLO, said(3)],
    [{"role": "system", "content": "Be kind."}, HELLO, said("hello again: hello")],
]
ASKED: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"continue_final_message": "content"},
    {"continue_final_message": "reasoning_content"},
    {"continue_final_message": "thinking"},
    {"continue_final_message": "name"},
    {"continue_final_message": True, "add_generation_prompt": True},
]


def outcome(render: Callable[..., str], chat: list[dict[str, Any]], asked: dict[str, Any]) -> str | None:
    """The text, or None where it is refused."""
    try:
        return render(chat, **asked)
    except Exception:
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [QWEN3, TRIMS, SPOILS, KEEPS, MUTE])
def test_every_conversation_is_rendered_as_transformers_renders_it(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path, {"chat_template": template})
    theirs = extra("transformers").AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    for chat in CHATS:
        for asked in ASKED:
            expected = outcome(lambda c, **a: theirs.apply_chat_template(c, tokenize=False, **a), chat, asked)
            assert outcome(ours.apply_chat_template, chat, asked) == expected, (chat, asked)


def tokenizer_of(folder: Path, template: str) -> Tokenizer:
    return Tokenizer.from_pretrained(folder_of(folder, {"chat_template": template}))


def test_nulls_are_no_keys_and_thoughts_have_one_name() -> None:
    asked = said(None, tool_calls=[TOOL], name=None, reasoning="Ask")
    [plain] = plain_messages([asked])
    assert plain == {"role": "assistant", "tool_calls": [TOOL], **dict.fromkeys(("reasoning", "thinking"), "Ask")} | {
        "reasoning_content": "Ask"
    }
    assert asked["name"] is None  # what was given stays as it was
    [plain] = plain_messages([said("x", reasoning_content="A", thinking="B")])
    assert (plain["reasoning_content"], plain["thinking"]) == ("A", "B")


def test_a_begun_answer_ends_where_it_ends(tmp_path: Path) -> None:
    kept = tokenizer_of(tmp_path / "kept", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    trimmed = tokenizer_of(tmp_path / "trimmed", TRIMS)
    chat = [HELLO, said("It is  ")]
    assert kept.apply_chat_template(chat, continue_final_message=True) == "<Hello><It is  "
    assert trimmed.apply_chat_template(chat, continue_final_message=True) == "[user]Hello<|im_end|>[assistant]It is"
    blocks = [HELLO, said([{"type": "text", "text": "It is"}, {"type": "image"}])]
    text = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}."
    both = tokenizer_of(tmp_path / "both", text + "{% endif %}{% endfor %}")
    assert both.apply_chat_template(blocks, continue_final_message=True) == "HelloIt is"
    assert blocks[1]["content"][0]["text"] == "It is"


@pytest.mark.parametrize(
    ("template", "chat", "asked", "message"),
    [
        (TRIMS, [HELLO, said("x")], {"continue_final_message": True, "add_generation_prompt": True}, "exclude each"),
        (TRIMS, [HELLO, said(None)], {"continue_final_message": True}, "has no content to continue"),
        (TRIMS, [HELLO, said("x")], {"continue_final_message": "reasoning"}, "has no reasoning to continue"),
        (TRIMS, [HELLO, said("x", reasoning="y")], {"continue_final_message": "reasoning"}, "never reads"),
        (TRIMS, [HELLO, said([{"type": "image"}])], {"continue_final_message": True}, "content is no text"),
        (SPOILS, [HELLO, said("x")], {"continue_final_message": True}, "does not appear"),
        (TRIMS, [HELLO, said("x")], {"continue_final_message": 3}, "give true, false or a key"),
        (TRIMS, [HELLO], {"enable_thinking": False}, "never refers to enable_thinking; it refers to none; leave it"),
        (QWEN3, [HELLO], {"enable_thinkin": False}, r"tokenizer_config\.json: .*did you mean enable_thinking\?"),
        (TRIMS, [HELLO], {"tools": [TOOL]}, "never refers to tools"),
        (TRIMS, [HELLO], {"documents": [{"title": "x"}]}, "never refers to documents"),
    ],
)
def test_what_cannot_be_continued_or_is_not_known_is_refused(
    tmp_path: Path, template: str, chat: list[dict[str, Any]], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer_of(tmp_path, template).apply_chat_template(chat, **asked)


def test_variables_that_the_template_knows_reach_it(tmp_path: Path) -> None:
    source = "{{ mood }}{{ tools[0].x }}{{ documents[0].title }}{% if add_generation_prompt %}!{% endif %}"
    tokenizer = tokenizer_of(tmp_path, source)
    asked: dict[str, Any] = {"mood": "good", "tools": [{"x": 1}], "documents": [{"title": "t"}]}
    assert tokenizer.apply_chat_template([HELLO], add_generation_prompt=True, **asked) == "good1t!"
    assert tokenizer_of(tmp_path, "{{ messages|length }}").apply_chat_template([HELLO], tools=[], documents=None) == "1"
