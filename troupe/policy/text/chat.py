"""A model's own chat template: messages in, prompt text out, with what transformers does around a template.

The template is code that came with a model folder, so it runs in Jinja's immutable sandbox, with the helpers that
Hugging Face gives such templates. Of a message, a key whose value is null is no key. Thoughts are `reasoning_content`,
also where they come as `thinking` or `reasoning`. A final message that is to be continued is marked, and what is
rendered ends at the mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, meta, nodes

from troupe.errors import InputError, ModelError
from troupe.policy.text.template_budget import rendering, spend
from troupe.policy.text.template_sandbox import GenerationBlocks, Sandbox, instrument

TEMPLATE_FILE = "chat_template.jinja"
"""Where newer model folders keep the template; it wins over the one in `tokenizer_config.json`."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thoughts; the first that is there counts."""

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # the blank at its end tells whether the template trims
_MOST_SHOWN = 500  # characters of what a template says went wrong
_MAX_SOURCE = 1_000_000  # characters of a template


class ChatTemplate:
    """One Jinja chat template, compiled when first used."""

    def __init__(
        self, source: str, origin: str, special_tokens: Mapping[str, Any] | None = None, day: date | None = None
    ) -> None:
        """`origin` names the file in messages; `special_tokens` (`eos_token`, …) are variables of the template; `day`:
        the date that it is told where it asks for today's, as several do; None: today's."""
        self.source = source
        self.origin = origin
        self.special_tokens = dict(special_tokens or {})
        self._day = day

    def dated(self, day: date) -> ChatTemplate:
        """The same on another day."""
        return ChatTemplate(self.source, self.origin, self.special_tokens, day)

    @property
    def asks_for_today(self) -> bool:
        """Whether what it makes may depend on the day."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of `messages`; `kwargs` (such as `enable_thinking`) become variables of the template.

        `tools` are JSON schemas. Raises ModelError where the template is broken, refuses the messages, loops too
        long, builds too much, or reaches for what the sandbox forbids.
        """
        compiled = self._compiled
        with rendering() as budget:
            variables = {
                **self.special_tokens,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "range": budget.range,
                "strftime_now": partial(_written, self._day),
                **kwargs,
            }
            try:
                return compiled.render(variables)
            except Exception as error:  # whatever template code can run into: types, lookups, the sandbox's refusals
                raise ModelError(
                    f"{self.origin}: the chat template failed on these messages: {type(error).__name__}: "
                    f"{_cut(str(error))}; check that every message has the roles and fields which the template expects"
                ) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template asks for and does not set itself. ModelError where it is broken."""
        return frozenset(meta.find_undeclared_variables(self._parsed()))

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether it reads the thoughts of a message from a key of their own (`REASONING`). ModelError where it is
        broken."""
        tree = self._parsed()
        read = {node.attr for node in tree.find_all(nodes.Getattr)} | {
            node.value for node in tree.find_all(nodes.Const)
        }
        return not read.isdisjoint(REASONING)

    @cached_property
    def _compiled(self) -> Template:
        tree = self._parsed()
        environment = tree.environment
        assert environment is not None
        with self._naming_faults():
            instrument(tree)
            return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))

    def _parsed(self) -> nodes.Template:
        if len(self.source) > _MAX_SOURCE:
            raise ModelError(
                f"{self.origin}: the chat template has {len(self.source)} characters; the limit is {_MAX_SOURCE}"
            )
        with self._naming_faults():
            return _environment().parse(self.source)

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        """Whatever keeps the source from becoming a template, with its line where that is known."""
        try:
            yield
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) if isinstance(error, TemplateError) else None
            place = f"line {line} of the chat template" if line else "the chat template"
            raise ModelError(
                f"{self.origin}: {place} is no valid Jinja: {_cut(str(error)) or type(error).__name__}; repair the "
                "template"
            ) from error


def load_chat_templates(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, Any]
) -> dict[str, ChatTemplate]:
    """Name → template of a model folder; most folders have only "default", and some none.

    `config` is the content of `tokenizer_config.json`. Raises ModelError where a template is not text.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return {"default": ChatTemplate(file.read_text(encoding="utf-8"), str(file), special_tokens)}
        except UnicodeDecodeError as error:
            raise ModelError(f"{file}: the chat template is not UTF-8 text: {error}") from error
    origin = str(folder / "tokenizer_config.json")
    found = config.get("chat_template")
    try:
        if found is None or isinstance(found, str):
            named = {} if found is None else {"default": found}
        else:
            named = {entry.name: entry.template for entry in msgspec.convert(found, list[_Named])}
    except msgspec.ValidationError as error:
        raise ModelError(
            f"{origin}: key chat_template must be text or a list of {{name, template}}: {error}"
        ) from error
    return {name: ChatTemplate(source, origin, special_tokens) for name, source in named.items()}


def choose_chat_template(
    templates: Mapping[str, ChatTemplate], origin: str, has_tools: bool, name: str | None = None
) -> ChatTemplate:
    """The template called `name`, or else "tool_use" where tools are given and it exists, or else "default".

    Raises ModelError, naming `origin`, where there is none.
    """
    if not templates:
        raise ModelError(
            f"{origin}: this model has no chat template; give plain text prompts, or add a {TEMPLATE_FILE}"
        )
    if name is None:
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ModelError(f"{origin}: no chat template is called {name!r}; there are {sorted(templates)}")
    return templates[name]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without nulls, thoughts under the name that templates read, and under `thinking`, which gpt-oss reads."""
    plain = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        thoughts = next((kept[key] for key in REASONING if key in kept), None)
        if thoughts is not None:
            kept = {"thinking": thoughts, **kept, "reasoning_content": thoughts}
        plain.append(kept)
    return plain


class Begun(msgspec.Struct, frozen=True):
    """A conversation whose final message is to be continued."""

    messages: list[dict[str, Any]]
    """With the mark behind the text that is continued."""
    text: str
    """That text."""

    @classmethod
    def of(cls, messages: list[dict[str, Any]], asked: bool | str, source: str) -> Begun:
        """Mark the final message's `content`, or the key that `asked` names, for the template `source`.

        Raises InputError where there is no such text, or the template does not read it.
        """
        key = asked if isinstance(asked, str) else "content"
        final = dict(messages[-1]) if messages else {}
        held = final.get(key)
        if held is None:
            raise InputError(f"continue_final_message: the final message has no {key} to continue; write one")
        keys = [name for name in REASONING if final.get(name) == held] if key in REASONING else [key]
        if not any(name in source for name in keys):
            raise InputError(
                f"continue_final_message is {key!r}, which the chat template never reads; name another key"
            )
        text = held
        if isinstance(held, list):
            blocks = [dict(block) if isinstance(block, Mapping) else block for block in held]
            block = next((b for b in reversed(blocks) if isinstance(b, dict) and isinstance(b.get("text"), str)), None)
            text = None if block is None else block["text"]
            if block is not None:
                block["text"] += _MARK
                final[key] = blocks
        if not isinstance(text, str):
            raise InputError(f"continue_final_message: the final message's {key} is no text, so it cannot be continued")
        if isinstance(held, str):
            final |= dict.fromkeys(keys, text + _MARK)
        return cls([*messages[:-1], final], text)

    def cut(self, rendered: str) -> str:
        """What was rendered up to the mark. Raises InputError where the template left the message out."""
        place = rendered.rfind(_MARK.strip())
        if place < 0 or self.text.strip() not in rendered:
            raise InputError(
                "continue_final_message: the final message does not appear in what the chat template makes of the "
                "conversation, so it cannot be continued there"
            )
        begun = rendered[:place]
        return begun if rendered.startswith(_MARK, place) else begun.rstrip()


class _Named(msgspec.Struct, frozen=True):
    name: str
    template: str


def _environment() -> Sandbox:
    environment = Sandbox(["jinja2.ext.loopcontrols", GenerationBlocks])
    environment.filters["tojson"] = _to_json
    environment.guard_filters()
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that Jinja's own filter makes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    spend().measure(message)
    raise TemplateError(_cut(str(message)))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN + 50 else f"{text[:_MOST_SHOWN]} … ({len(text)} characters)"


def _written(day: date | None, format: str) -> str:  # noqa: A002 – templates may name the argument
    if len(format) > _MOST_SHOWN or re.search(r"%[^a-zA-Z%]*\d\d\d", format):
        raise OverflowError(f"strftime_now: a format of {len(format)} characters; use a short one, without widths")
    now = datetime.now().astimezone() if day is None else datetime.combine(day, time())
    return now.strftime(format)
