"""Messages of a run for its store, and the store's rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from tests.support.fakes import make_rollout, make_scored
from troupe.messages import (
    Answer,
    ChatMessage,
    ClosedState,
    Episode,
    GroupClosed,
    Rollout,
    RowStart,
    ToolCall,
    Turn,
    Update,
)
from troupe.records.sinks.sqlite import SqliteSink

SCORES = (0.25, None, 1.0)


def closed(
    step: int, place: int, scores: Sequence[float | None] = SCORES, *, state: ClosedState = "trained", attempt: int = 0
) -> GroupClosed:
    """A group that ends with `step` ≥ 1; its rewards are twice the scores."""
    scored = make_scored(step - 1, place, scores, version=step - 1, attempt=attempt)
    return GroupClosed(
        gid=scored.group.prompt.gid,
        slot=scored.group.prompt.slot,
        state=state,
        version=step,
        scored=scored,
        rewards=tuple(None if score is None else 2 * score for score in scores),
        advantages=tuple(float(i) for i in range(len(scores))) if state == "trained" else None,
    )


def update(step: int, **metrics: float) -> Update:
    """The Update of a step of a run of nine."""
    return Update(step=step, version=step, total_steps=9, metrics=metrics)


def write_step(sink: SqliteSink, step: int, groups: int = 2) -> None:
    """Tell a sink of a step, and have it written."""
    for place in range(groups):
        sink.write(closed(step, place))
    sink.write(update(step, reward=step / 10))
    sink.flush()


def rows(path: Path, query: str) -> list[Any]:
    """What a query gives; the values themselves where it has one column."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(query).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


def tool_turn(text: str, *calls: ToolCall, thoughts: str = "", **answer: Any) -> Answer:
    """The answer to a turn that calls tools."""
    said: ChatMessage = {"role": "assistant", "content": text}
    said |= {"reasoning_content": thoughts} if thoughts else {}
    asked = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    said |= {"tool_calls": asked} if asked else {}
    messages = tuple({"role": "tool", "name": call.name, "content": call.result} for call in calls)
    return Answer(said=said, **{"messages": messages, "calls": calls, **answer})


def game_turn(text: str, back: str, **answer: Any) -> Answer:
    """The answer to a turn in an environment with `step`."""
    said: ChatMessage = {"role": "assistant", "content": text}
    return Answer(said=said, messages=({"role": "user", "content": back},), **answer)


def acted_rollout(answers: Sequence[Answer], *, row_at: int | None = None, text: str = "") -> tuple[Rollout, Episode]:
    """A completion of which turn t has 10 + t tokens, and what came back after it 5, if anything; `row_at`: the turn
    before which a new row begins, after 40 other tokens."""
    turns, observed, rows, length = [], [], [], 0
    for number, answer in enumerate(answers, 1):
        if number == row_at:
            rows.append(RowStart(start=length, prompt_ids=tuple(range(40))))
        turns.append(Turn(start=length, stop=length + 10 + number, answer=answer))
        length += 10 + number
        if answer.messages and number < len(answers) and number + 1 != row_at:
            observed.append((length, length + 5))
            length += 5
    rollout = make_rollout([index % 100 for index in range(length)], text=text)
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    failed = next((answer.failed for answer in answers if answer.failed), "")
    episode = Episode(
        environment="library",
        opening=Answer(said={}, seconds=0.031),
        turns=tuple(turns),
        reward=sum(rewards) if rewards and not failed else None,
        failed=failed,
        attributes={"opened": 3, "found": None},
    )
    return msgspec.structs.replace(rollout, observed=tuple(observed), rows=tuple(rows)), episode


LONG_RESULT = "<tr onclick='alert(1)'><td>Ibn Sina, The Book of Healing</td><td>1027</td></tr>\n" * 256
"""Twenty kilobytes of a catalogue, in HTML."""
DOWN = "TimeoutError: no answer within 60 s"


def searching() -> list[Answer]:
    """Six turns with thoughts, tools that fail and succeed, other scripts, and what would act in a page."""
    search = ToolCall(name="search", arguments={"query": "ابن سينا", "limit": 256}, result=LONG_RESULT, seconds=1.42)
    opened = {"id": "bk-1027", "page": 12, "options": {"language": "ar", "notes": ["<script>alert(2)</script>"]}}
    wrong = '{"error": "KeyError: \'bk-1072\'"}'
    return [
        tool_turn(
            "I will look it up in the catalogue.",
            search,
            thoughts="The question is about Avicenna, whose Arabic name is ابن سينا. The catalogue has titles in both "
            "scripts, so I search with the Arabic one first, and widen the search if nothing is found.",
            seconds=1.45,
        ),
        tool_turn(
            "",
            ToolCall(
                name="open_book",
                arguments={"id": "bk-1072"},
                result=wrong,
                error="KeyError: 'bk-1072'",
                seconds=0.004,
            ),
            ToolCall(name="add", arguments={"a": 1027, "b": -980}, result="47", seconds=0.0002),
            seconds=0.006,
        ),
        tool_turn(
            "", ToolCall(name="open_book", arguments=opened, result="كتاب الشفاء 📖\n…", seconds=0.2), seconds=0.21
        ),
        tool_turn(
            '<tool_call>\n{"name": "open_book", "arguments": {"id": "bk-1027"\n</tool_call>',
            messages=({"role": "tool", "content": '{"error": "the call is no JSON: it ends too early"}'},),
            seconds=0.0001,
        ),
        tool_turn(
            "<b>Nearly</b> there… 🙂", ToolCall(name="add", arguments={"a": 980, "b": 47}, result="1027"), seconds=0.001
        ),
        tool_turn(
            "The Book of Healing (**كتاب الشفاء**) was finished in **1027**.", messages=(), done=True, reward=1.0
        ),
    ]


def guessing() -> list[Answer]:
    """Four turns of a game, each with a reward."""
    backs = ["higher", "lower", "lower", "that is it"]
    return [
        game_turn(
            f"<think>\nbetween {low} and {high}\n</think>\n\n{(low + high) // 2}",
            back,
            reward=1.0 if back == "that is it" else -0.05,
            seconds=0.002 * number,
            done=number == len(backs),
            info={"left": high - low},
        )
        for number, (low, high, back) in enumerate(zip((0, 50, 50, 50), (100, 100, 75, 62), backs, strict=True), 1)
    ]


def acted(step: int, place: int) -> GroupClosed:
    """A group of four that acts: it searches, guesses, calls a tool that fails, and one of which the environment does
    not answer."""
    broken = ToolCall(name="search", arguments={"query": ""}, result='{"error": "empty"}', error="empty", seconds=0.01)
    talks = [
        acted_rollout(searching(), text="as it was sampled </pre>"),
        acted_rollout(guessing(), row_at=3, text="50 75 62 56"),
        acted_rollout([tool_turn("", broken, seconds=0.02), tool_turn("I do not know.", messages=(), done=True)]),
        acted_rollout([tool_turn("", messages=(), failed=DOWN, seconds=60.0)]),
    ]
    scores = (1.0, 0.85, 0.0, None)
    message = closed(step, place, scores)
    assert message.scored is not None
    prompt = msgspec.structs.replace(
        message.scored.group.prompt,
        prompt=[
            {"role": "system", "content": "You are a librarian. Use the tools."},
            {"role": "user", "content": "When did Avicenna finish <i>The Book of Healing</i>?"},
        ],
    )
    group = msgspec.structs.replace(
        message.scored.group,
        prompt=prompt,
        rollouts=tuple(rollout for rollout, _ in talks),
        episodes=tuple(episode for _, episode in talks),
    )
    scored = msgspec.structs.replace(message.scored, group=group, faulted=(3,))
    return msgspec.structs.replace(message, scored=scored)
