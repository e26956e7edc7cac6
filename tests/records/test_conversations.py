"""A conversation as people read it."""

from __future__ import annotations

import msgspec

from tests.support.stored import DOWN, LONG_RESULT, acted
from troupe.messages import Answer
from troupe.records.conversations import Said, as_text, conversation, facts_of, shortened


def talk(sample: int, opening: Answer | None = None) -> tuple[Said, ...]:
    scored = acted(1, 0).scored
    assert scored is not None
    rollout, episode = scored.group.rollouts[sample], scored.group.episodes[sample]
    if opening is not None:
        episode = msgspec.structs.replace(episode, opening=opening)
    return conversation(
        scored.group.prompt.prompt,
        episode,
        observed=rollout.observed,
        rows=rollout.rows,
        length=len(rollout.token_ids),
    )


def test_results_stand_with_their_calls_and_other_answers_by_themselves() -> None:
    said = talk(0)
    assert [(one.role, one.turn) for one in said] == [
        ("system", 0),
        ("user", 0),
        *[("assistant", turn) for turn in (1, 2, 3, 4)],
        ("tool", 0),  # to a call that could not be read
        ("assistant", 5),
        ("assistant", 6),
    ]
    first, second = said[2:4]
    assert first.thoughts.startswith("The question is about")
    assert (first.calls[0].name, first.calls[0].result) == ("search", LONG_RESULT)
    assert [(call.name, call.arguments, call.error) for call in second.calls] == [
        ("open_book", '{"id":"bk-1072"}', "KeyError: 'bk-1072'"),
        ("add", '{"a":1027,"b":-980}', ""),
    ]
    assert said[-1].reward == 1.0


def test_tokens_seconds_and_rewards_of_each_turn() -> None:
    turns = [one for one in talk(1) if one.turn]
    assert [(one.tokens, one.read, one.row, one.reward) for one in turns] == [
        (11, 5, 0, -0.05),
        (12, 0, 0, -0.05),  # what came back after it stands in the prompt of the new row
        (13, 5, 40, -0.05),
        (14, 0, 0, 1.0),
    ]
    assert (turns[0].thoughts, turns[0].text) == ("between 0 and 100", "50")
    assert facts_of(turns[2]) == ["new row after 40 tokens", "13 tokens", "5 read", "6 ms", "reward −0.05"]
    assert [one.text for one in talk(1) if one.role == "user"][1:] == ["higher", "lower", "lower", "that is it"]


def test_the_opening_is_what_the_environment_made_of_the_prompt() -> None:
    messages = ({"role": "user", "content": [{"type": "text", "text": "Go"}, {"type": "image", "url": "x"}]},)
    assert talk(1, Answer(said={}, messages=messages))[0] == Said(role="user", text='Go\n{"type":"image","url":"x"}')
    assert talk(3, Answer(said={}, failed="no room"))[2] == Said(role="environment", text="", failed="no room")


def test_as_text() -> None:
    lines = as_text(talk(2)).splitlines()
    assert lines == [
        "── system",
        "    You are a librarian. Use the tools.",
        "── user",
        "    When did Avicenna finish <i>The Book of Healing</i>?",
        "── turn 1 · 11 tokens · 5 read · 20 ms",
        '    → search {"query":""}  (10 ms)',
        "    ✗ failed: empty",
        "── turn 2 · 12 tokens",
        "    I do not know.",
    ]
    assert as_text(talk(3)).splitlines()[-1] == f"    ✗ failed: {DOWN}"
    forged = Said(role="a\n── turn 9", text="one\n── turn 9")
    assert [line for line in as_text([forged]).splitlines() if line.startswith("── turn")] == []


def test_long_ones_are_cut_and_say_so() -> None:
    short = shortened(talk(0), 100, most=5)
    assert [(one.role, one.text[:5]) for one in short] == [
        ("system", "You a"),
        ("user", "When "),
        ("…", "4 mor"),
        ("tool", '{"err'),
        ("assistant", "<b>Ne"),
        ("assistant", "The B"),
    ]
    [call] = shortened(talk(0), 100)[2].calls
    assert call.result == f"{LONG_RESULT[:100]} … {len(LONG_RESULT) - 100:,} more characters"
    assert msgspec.json.encode(shortened([Said(role="user", text="\udcff")], 9))
