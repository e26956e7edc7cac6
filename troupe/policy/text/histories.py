"""Whether a chat template tells earlier turns in another way than they were told when the next turn was sampled.

Qwen3's drops the thoughts of all turns before the last user's message: kept while tools answer, dropped when the user
speaks again. It is seen by rendering: the prompt that the last turn was sampled from must be the beginning of what the
conversation is rendered as now, its end must be what stands behind the turn, and between them there must be what the
turn said. Where made-up conversations of a kind (who speaks next, are there thoughts) all keep what was told, whatever
their length, real ones of that kind are not looked at, so that a turn costs the same early and late.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from troupe.errors import ModelError
from troupe.policy.text.chat import REASONING, ChatTemplate, plain_messages
from troupe.policy.text.seams import TOOL_ROLES, Seams
from troupe.policy.text.tokenizer import CLOSED, OPENED

_THOUGHTS_END = ("</think>", "<channel|>", "<|channel|>", "[/THINK]", "</thinking>", "<|END_THINKING|>", "</reasoning>")
"""What ends thoughts within a content, by the templates of several families."""
_TAGS = re.compile(r"</?think>")
_ROUNDS = ("", "t", "u", "tt", "uu", "tu", "ut", "tut", "t" * 12, "u" * 12, "tu" * 6)
"""Earlier turns of the made-up conversations: answered by a tool, or by the user."""


Thoughts: TypeAlias = Literal["none", "apart", "within"]
"""How a turn's thoughts are written: under a key of their own, or within the content."""


class Kind(NamedTuple):
    """What conversations that go on have in common."""

    by_tool: bool
    """Whether only tools speak before the policy's next turn."""
    thoughts: frozenset[Thoughts]
    """Of the policy's turns, that of the prompt included."""
    talks: bool = False
    """Whether a turn that calls a tool says something beside."""


class Histories:
    """Asks one template, with the tools that it tells of."""

    def __init__(
        self,
        template: ChatTemplate,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        seams: Seams,
    ) -> None:
        self._template, self._tools, self._variables, self._seams = template, tools, dict(variables), seams
        self._keeps: dict[Kind, bool] = {}

    def tell(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the template tells it, with the header of a next turn.

        Where it never reads thoughts from a key of their own, they are told within the content, as they were sampled.
        """
        plain = plain_messages(messages)
        if not self._template.reads_thoughts:
            plain = [_with_thoughts_within(message) for message in plain]
        return self._template.render(plain, self._tools, True, **self._variables)

    def keeps(self, kind: Kind) -> bool:
        """Whether conversations of a kind never change what was told."""
        if kind not in self._keeps:
            self._keeps[kind] = all(self._probe(*made) for made in self._made_up(kind))
        return self._keeps[kind]

    def rewritten(
        self,
        messages: Sequence[Mapping[str, Any]],
        said: Mapping[str, Any],
        new: Sequence[Mapping[str, Any]],
        tail: str,
    ) -> str | None:
        """How the template tells the conversation, where that changes what was told; None where it does not.

        `tail`: what stands behind the turn `said`, header of the next one included. A conversation that the template
        refuses to tell is not changed.
        """
        try:
            now = self.tell([*messages, said, *new])
            return None if self._stands(now, messages, said, tail) else now
        except ModelError:
            return None

    def _stands(self, now: str, messages: Sequence[Mapping[str, Any]], said: Mapping[str, Any], tail: str) -> bool:
        """Whether what was told before `said`, and what it says, stands in what is told now."""
        parts = _parts(said)
        if not now.endswith(tail) or any(part not in now for part in parts):
            return False
        before = self.tell(messages)
        told = now[len(before) : max(0, len(now) - len(tail))]
        return now.startswith(before) and all(part in told for part in parts)

    def _probe(self, messages: list[dict[str, Any]], said: dict[str, Any], new: list[dict[str, Any]]) -> bool:
        try:
            now = self.tell([*messages, said, *new])
            return self._stands(now, messages, said, self._seams.before(new).text)
        except ModelError:
            return False

    def _made_up(self, kind: Kind) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]]:
        """Conversations of a kind: messages, a turn, and what follows."""
        name = next((str(tool.get("function", tool).get("name", "tool")) for tool in self._tools or ()), "tool")
        for rounds in _ROUNDS:
            if "t" in rounds and not self._tools:
                continue
            for thoughts in _mixtures(kind.thoughts):
                messages: list[dict[str, Any]] = [{"role": "user", "content": "Asked."}]
                for place, by in enumerate([*rounds, "t" if kind.by_tool else "u"]):
                    messages += _round(place, by == "t", thoughts[place % len(thoughts)], name, kind.talks)
                yield messages[:-2], messages[-2], messages[-1:]


def kind_of(messages: Sequence[Mapping[str, Any]], said: Mapping[str, Any], new: Sequence[Mapping[str, Any]]) -> Kind:
    """Of a conversation in which `new` follows on the turn `said`."""
    turns = [message for message in (said, *messages) if message.get("role") == "assistant"]
    by_tool = bool(new) and all(message.get("role") in TOOL_ROLES for message in new)
    talks = any(message.get("tool_calls") and message.get("content") for message in turns)
    return Kind(by_tool, frozenset(map(_thoughts_of, turns)), talks)


def _thoughts_of(turn: Mapping[str, Any]) -> Thoughts:
    if any(turn.get(key) for key in REASONING):
        return "apart"
    return "within" if _thinks_within(turn.get("content")) else "none"


def _thinks_within(content: Any) -> bool:
    return any(end in content for end in _THOUGHTS_END) if isinstance(content, str) else bool(content)


def _mixtures(thoughts: frozenset[Thoughts]) -> list[tuple[Thoughts, ...]]:
    """How turns may follow one another: all alike, or in alternation."""
    ways = sorted(thoughts)
    return [(way,) for way in ways] + [(a, b) for a in ways for b in ways if a != b]


def _with_thoughts_within(message: dict[str, Any]) -> dict[str, Any]:
    thoughts, content = message.get(REASONING[0]), message.get("content")
    if not thoughts or message.get("role") != "assistant" or not isinstance(content, str | None):
        return message
    return {**message, "content": f"{OPENED}\n{thoughts}\n{CLOSED}\n\n{content or ''}"}


def _round(place: int, by_tool: bool, thoughts: Thoughts, name: str, talks: bool) -> list[dict[str, Any]]:
    """A turn of the assistant, and what follows on it."""
    call = {"type": "function", "function": {"name": name, "arguments": {"text": f"Given {place}"}}}
    said: dict[str, Any] = {"role": "assistant", "content": "" if by_tool and not talks else f"Said {place}."}
    if by_tool:
        said["tool_calls"] = [call]
    if thoughts == "apart":
        said[REASONING[0]] = f"Thought {place}."
    elif thoughts == "within":
        said["content"] = f"{OPENED}\nThought {place}.\n{CLOSED}\n\n{said['content']}"
    if by_tool:
        return [said, {"role": "tool", "name": name, "content": f"Result {place}."}]
    return [said, {"role": "user", "content": f"Heard {place}."}]


def _parts(said: Mapping[str, Any]) -> list[str]:
    """The texts of a turn that have to stand in what is told of it."""
    thoughts = next((said[key] for key in REASONING if said.get(key)), "")
    texts = [text for text in (thoughts, said.get("content")) if isinstance(text, str)]
    parts = [part.strip() for text in texts for part in _TAGS.split(text)]
    for call in said.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        parts.append(str(function.get("name", "")))
    return parts
