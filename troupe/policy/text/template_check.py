"""Whether conversations can go on by a chat template, and what becomes of earlier turns: told before a run begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from troupe.errors import ModelError
from troupe.policy.text.chat import ChatTemplate
from troupe.policy.text.histories import Histories, Kind, Thoughts
from troupe.policy.text.seams import Seams

_NAME, _KEY, _VALUE, _RESULT, _HEARD = "tool7a3f", "key9d4f", "value6e7a", "result4f9a", "heard8f3e"
_WITHOUT: frozenset[Thoughts] = frozenset({"none"})
_WITH: frozenset[Thoughts] = frozenset({"apart"})
_ASKED = {"role": "user", "content": "dummy"}


def check_template(
    template: ChatTemplate,
    histories: Histories,
    seams: Seams,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    by_tool: bool,
    by_user: bool,
) -> None:
    """Raise ModelError where the template does not tell of the tools, of their calls and results, or of what a user
    says in between."""
    if tools:
        _check_tools(template, histories, tools)
    if by_tool:
        _check_calls(template, histories)
        result = {"role": "tool", "name": _NAME, "content": _RESULT}
        if _RESULT not in seams.before([result]).text:
            raise _left_out(template, "a tool's result at its place")
    if by_user and _HEARD not in seams.before([{"role": "user", "content": _HEARD}]).text:
        raise _left_out(template, "a user's message at its place")


def _check_tools(template: ChatTemplate, histories: Histories, tools: Sequence[Mapping[str, Any]]) -> None:
    remedy = "use a model whose template knows tools, or an environment without them, which has `step`"
    if "tools" not in template.variables:
        raise ModelError(f"{template.origin}: the chat template never refers to tools; {remedy}")
    told = histories.tell([_ASKED])
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
    if missing := [name for name in names if name not in told]:
        raise ModelError(f"{template.origin}: the chat template does not tell of the tool {missing[0]}; {remedy}")


def _check_calls(template: ChatTemplate, histories: Histories) -> None:
    result = {"role": "tool", "name": _NAME, "content": _RESULT}
    refused: ModelError | None = None
    for arguments in ({_KEY: _VALUE}, f'{{"{_KEY}": "{_VALUE}"}}'):
        call = {"type": "function", "function": {"name": _NAME, "arguments": arguments}}
        try:
            told = histories.tell([_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, result])
        except ModelError as error:
            refused = refused or error
            continue
        parts = {"a call's name": _NAME, "its arguments": _VALUE, "a tool's result": _RESULT}
        for what, text in parts.items():
            if text not in told:
                raise _left_out(template, what)
        return
    raise ModelError(f"{refused}; it cannot render a call of a tool and its result") from refused


def _left_out(template: ChatTemplate, what: str) -> ModelError:
    return ModelError(
        f"{template.origin}: the chat template leaves out {what}; use a model whose template tells conversations of "
        "this kind"
    )


def describe_history(origin: str, histories: Histories, forks: bool, *, by_tool: bool, by_user: bool) -> str:
    """A line on what becomes of earlier turns when a tool has answered, and when the user speaks."""
    sides = [(by_tool, True, "a tool's result"), (by_user, False, "a user's message")]
    told: list[str] = []
    for asked, tool, what in sides:
        if not asked:
            continue
        kept = [histories.keeps(Kind(tool, thoughts)) for thoughts in (_WITHOUT, _WITH)]
        if all(kept):
            told.append(f"{what} is put behind what was sampled")
        elif not forks:
            told.append(f"{what} is put behind what was sampled, though the template would tell earlier turns anew")
        else:
            when = "" if not any(kept) else " where there are thoughts" if kept[0] else " where a turn has no thoughts"
            told.append(f"{what} begins a new row{when}, since the template tells earlier turns anew")
    mode = "fork" if forks else "keep"
    return f'history = "{mode}": {"; ".join(told) or "no turn follows on another"} ({origin})'
