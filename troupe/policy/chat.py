"""A model's own chat template: messages in, prompt text out.

The template is code that came with a model folder, so it runs in Jinja's immutable sandbox, with the helpers that
Hugging Face gives such templates. Knows nothing of token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import Environment, Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from troupe.errors import ModelError

TEMPLATE_FILE = "chat_template.jinja"
"""Where newer model folders keep the template; it wins over the one in `tokenizer_config.json`."""

MAX_STEPS = 200_000
"""Most steps of loops and calls in one rendering, together."""

_STEPS = "count of steps"
"""No identifier, so that no template can name it."""


class ChatTemplate:
    """One Jinja chat template, compiled when first used."""

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        """`origin` names the file in messages; `special_tokens` (`eos_token`, …) are variables of the template."""
        self.source = source
        self.origin = origin
        self.special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of `messages`; `kwargs` (such as `enable_thinking`) become variables of the template.

        `tools` are JSON schemas. Raises ModelError where the template is broken, refuses the messages, loops too
        long, or reaches for what the sandbox forbids.
        """
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "range": _budgeted_range(),
            **kwargs,
            _STEPS: _Steps(),
        }
        try:
            return self._compiled.render(variables)
        except ModelError:
            raise
        except Exception as error:  # whatever template code can run into: types, lookups, the sandbox's refusals
            raise ModelError(
                f"{self.origin}: the chat template failed on these messages: {type(error).__name__}: {error}; "
                "check that every message has the roles and fields which the template expects"
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        environment = _environment()
        try:
            tree = environment.parse(self.source)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, _STEPS, [], [], None, None)
            return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f"line {line} of the chat template" if line else "the chat template"
            raise ModelError(f"{self.origin}: {place} is no valid Jinja: {error}; repair the template") from error


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


class _Named(msgspec.Struct, frozen=True):
    name: str
    template: str


class _Steps:
    """Counts the steps of one rendering."""

    def __init__(self) -> None:
        self._spent = 0

    def spend(self, steps: int) -> None:
        self._spent += steps
        if self._spent > MAX_STEPS:
            raise OverflowError(f"the template's loops and calls take more than {MAX_STEPS} steps, the limit")

    def spend_on(self, items: Iterable[Any]) -> Iterable[Any]:
        """`items`, every one a step; those of unknown number are counted as they come."""
        if isinstance(items, Sized):
            self.spend(len(items))
            return items
        return self._spend_singly(items)

    def _spend_singly(self, items: Iterable[Any]) -> Iterable[Any]:
        for item in items:
            self.spend(1)
            yield item


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """What a `for` goes over, counted."""
    steps: _Steps = context[_STEPS]
    return steps.spend_on(items)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which stops at a forbidden attribute where it is reached for, not where it is later used.

    Calls are steps, because macros and recursive loops that call themselves twice at every level never end either.
    """

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 – as in the base
        steps: _Steps = __context[_STEPS]
        steps.spend(1)
        if isinstance(__obj, LoopContext) and args:
            args = (steps.spend_on(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is forbidden in chat templates")


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text; the prompt is the same without the marks."""

    tags = {"generation"}  # noqa: RUF012 – the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.filters[_STEPS] = _counted
    del environment.globals["lipsum"]  # placeholder text of any length, which no prompt wants
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _budgeted_range() -> Callable[..., range]:
    """`range` for one rendering: all calls together may count to the sandbox's limit for one call.

    That bounds nested loops too, which the sandbox's own limit multiplies.
    """
    spent = 0

    def limited(*args: int) -> range:
        nonlocal spent
        numbers = range(*args)
        spent += len(numbers)
        if spent > MAX_RANGE:
            raise OverflowError(f"the template's range() loops count past {MAX_RANGE} steps, the limit")
        return numbers

    return limited


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that Jinja's own filter makes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 – templates may name the argument
    return datetime.now().astimezone().strftime(format)
