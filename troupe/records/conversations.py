"""An episode as people read it: who said what, one after the other, with the calls of tools, tokens and seconds.

Everything in it may hold anything: whoever shows it escapes it.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from troupe.messages import ChatMessage, Episode, PromptText, Rollout, RolloutGroup, RowStart, ToolCall, Turn
from troupe.records import text as words
from troupe.records.store.completions import StoredCompletion
from troupe.records.store.text import json_text, safe_text

Ranges = Sequence[tuple[int, int]]

_THOUGHTS = "reasoning_content", "thinking", "reasoning"
_THINK, _THOUGHT = "<think>", "</think>"
SPEAKER, INDENT = "── ", "    "
"""How lines of a conversation's text begin that say who speaks, and all others."""


class Called(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call of a tool."""

    name: str
    arguments: str
    """As JSON."""
    result: str
    error: str = ""
    """Why it failed; empty where it did not."""
    seconds: float = 0.0


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one of them said."""

    role: str
    """system, user, assistant, tool, as in chat templates."""
    text: str
    turn: int = 0
    """Of the policy, from 1; 0 where another one speaks."""
    thoughts: str = ""
    calls: tuple[Called, ...] = ()
    tokens: int = 0
    """Of a turn: sampled in it."""
    read: int = 0
    """Of a turn: those of what came back."""
    row: int = 0
    """Of a turn: tokens of the prompt of a new row that it begins; 0 where it begins none."""
    seconds: float = 0.0
    """Of a turn: that what came back took."""
    reward: float | None = None
    """Of a turn."""
    failed: str = ""
    """Why no answer came."""
    info: str = ""
    """What the environment told of the turn, as JSON."""


_S = TypeVar("_S", Called, Said)


def conversation(
    prompt: PromptText | None, episode: Episode, *, observed: Ranges, rows: Sequence[RowStart], length: int
) -> tuple[Said, ...]:
    """What was said in an episode, from its prompt on. `observed`, `rows` as in `Rollout`; `length`: its tokens."""
    opening = episode.opening
    said = [_message(message) for message in opening.messages or _as_messages(prompt)]
    if opening.failed:
        said.append(Said(role="environment", text="", failed=opening.failed, seconds=opening.seconds))
    for number, turn in enumerate(episode.turns, 1):
        end = episode.turns[number].start if number < len(episode.turns) else length
        begins = [row for row in rows if (number == 1 or row.start > episode.turns[number - 2].start)]
        row = next((row for row in begins if row.start <= turn.start), None)
        said.append(
            _turn(number, turn, observed_within(observed, turn.stop, end), 0 if row is None else len(row.prompt_ids))
        )
        said += _came_back(turn)
    return tuple(said)


def conversation_of(completion: StoredCompletion) -> tuple[Said, ...]:
    """What was said in a stored episode; nothing where a completion answered once."""
    if (episode := completion.episode) is None:
        return ()
    length = len(completion.token_ids)
    return conversation(completion.prompt, episode, observed=episode.observed, rows=episode.rows, length=length)


def conversation_in(group: RolloutGroup, sample: int) -> tuple[Said, ...]:
    """What was said in a sample of a group; nothing where the policy answers once."""
    if sample >= len(group.episodes):
        return ()
    rollout, episode = group.rollouts[sample], group.episodes[sample]
    length = len(rollout.token_ids)
    return conversation(group.prompt.prompt, episode, observed=rollout.observed, rows=rollout.rows, length=length)


def sampled_tokens(rollout: Rollout) -> int:
    """How many tokens the policy sampled of a completion."""
    return len(rollout.token_ids) - observed_within(rollout.observed, 0, len(rollout.token_ids))


def observed_within(observed: Ranges, start: int, stop: int) -> int:
    """How many of the tokens from `start` to `stop` were observed."""
    return sum(max(0, min(stop, last) - max(start, first)) for first, last in observed)


def shortened(
    said: Sequence[Said], longest: int, most: int | None = None, *, most_calls: int | None = None
) -> tuple[Said, ...]:
    """The same with texts of at most `longest` characters each, which say how many more there were; of more than
    `most` messages the first ones and the last; of more than `most_calls` calls in a turn the first ones."""
    if most is not None and len(said) > most:
        head = most // 2
        left = len(said) - most
        gap = Said(role="…", text=f"{left:,} more message{'' if left == 1 else 's'}")
        said = [*said[:head], gap, *said[len(said) - (most - head) :]]
    return tuple(_shortened(one, longest, most_calls) for one in said)


def cut(text: str, longest: int) -> str:
    """The beginning of a text, as a file takes it, and how much is left out."""
    text = safe_text(text)
    return text if len(text) <= longest else f"{text[:longest]} … {len(text) - longest:,} more characters"


def as_text(said: Sequence[Said]) -> str:
    """A conversation as plain text. Whoever speaks stands at the beginning of a line, what is said further in."""
    return "\n".join(line for one in said for line in _lines(one))


def facts_of(said: Said) -> list[str]:
    """What is told of a turn beside what was said: tokens, seconds, reward."""
    facts = [f"new row after {said.row:,} tokens"] if said.row else []
    if said.turn:
        facts.append(f"{said.tokens:,} token{'' if said.tokens == 1 else 's'}")
    if said.read:
        facts.append(f"{said.read:,} read")
    if said.seconds:
        facts.append(words.seconds(said.seconds))
    if said.reward is not None:
        facts.append(f"reward {words.number(said.reward)}")
    return facts


def _as_messages(prompt: PromptText | None) -> list[ChatMessage]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt or words.MISSING}]


def _message(message: ChatMessage) -> Said:
    thoughts, text = _parts(message)
    calls = tuple(_named(call) for call in message.get("tool_calls") or ())
    return Said(role=str(message.get("role", "")), text=text, thoughts=thoughts, calls=calls)


def _named(call: object) -> Called:
    """A call within a prompt, in any of the forms that templates take."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    return Called(name=_plain(inner.get("name", "")), arguments=_plain(inner.get("arguments", "")), result="")


def _turn(number: int, turn: Turn, read: int, row: int) -> Said:
    answer = turn.answer
    thoughts, text = _parts(answer.said)
    return Said(
        role="assistant",
        text=text,
        turn=number,
        thoughts=thoughts,
        calls=tuple(_called(call) for call in answer.calls),
        tokens=turn.stop - turn.start,
        read=read,
        row=row,
        seconds=answer.seconds,
        reward=answer.reward,
        failed=answer.failed,
        info=_plain(answer.info) if answer.info else "",
    )


def _called(call: ToolCall) -> Called:
    arguments = _plain(call.arguments)
    return Called(name=call.name, arguments=arguments, result=call.result, error=call.error, seconds=call.seconds)


def _came_back(turn: Turn) -> Iterator[Said]:
    """What others said after a turn; results of tools stand with their calls already."""
    results = [call.result.strip("\n") for call in turn.answer.calls]
    for message in turn.answer.messages:
        said = _message(message)
        if said.role == "tool" and said.text in results:
            results.remove(said.text)
        else:
            yield said


def _parts(message: ChatMessage) -> tuple[str, str]:
    """Thoughts and text of a message."""
    content = message.get("content")
    if isinstance(content, list):
        text = "\n".join(_plain(part.get("text", part) if isinstance(part, dict) else part) for part in content)
    else:
        text = "" if content is None else _plain(content)
    thoughts = next((_plain(message[name]) for name in _THOUGHTS if message.get(name)), "")
    if not thoughts and message.get("role") == "assistant" and _THOUGHT in text:
        thoughts, _, text = text.partition(_THOUGHT)
        thoughts = thoughts.partition(_THINK)[2] or thoughts
    return thoughts.strip(), text.strip("\n")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json_text(value)


def _shortened(said: Said, longest: int, most_calls: int | None) -> Said:
    kept = said.calls[:most_calls]
    calls = [_with_cut(call, longest, "name", "arguments", "result", "error") for call in kept]
    if left := len(said.calls) - len(kept):
        calls.append(Called(name=f"… {left:,} more call{'' if left == 1 else 's'}", arguments="", result=""))
    short = _with_cut(said, longest, "role", "text", "thoughts", "failed", "info")
    return msgspec.structs.replace(short, calls=tuple(calls))


def _with_cut(struct: _S, longest: int, *names: str) -> _S:
    return msgspec.structs.replace(struct, **{name: cut(getattr(struct, name), longest) for name in names})


def _lines(said: Said) -> Iterator[str]:
    who = f"turn {said.turn}" if said.turn else said.role
    yield " · ".join([f"{SPEAKER}{' '.join(who.split())}", *facts_of(said)])
    if said.thoughts:
        yield from _indented(said.thoughts, "~ ")
    if said.text or not (said.calls or said.thoughts or said.failed):
        yield from _indented(said.text or "(nothing)")
    for call in said.calls:
        took = f"  ({words.seconds(call.seconds)})" if call.seconds else ""
        yield from _indented(f"{call.name} {call.arguments}{took}", "→ ")
        if call.error:
            yield from _indented(f"failed: {call.error}", "✗ ")
        if call.result and (not call.error or call.error not in call.result):
            yield from _indented(call.result, "← ")
    if said.failed:
        yield from _indented(f"failed: {said.failed}", "✗ ")
    if said.info:
        yield from _indented(said.info, "i ")


def _indented(text: str, mark: str = "") -> Iterator[str]:
    for number, line in enumerate(text.splitlines() or [""]):
        yield INDENT + (mark if number == 0 else " " * len(mark)) + line
