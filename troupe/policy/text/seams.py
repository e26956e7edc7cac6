"""What a chat template puts behind a turn of the assistant: its end, what others say next, and the next turn's header.

It is asked of a short made-up conversation that has the messages at hand at its end, so it costs what they cost,
however long the real one is, and a template that tells earlier turns in another way gives the same. The made-up turn of
the assistant holds a mark. Behind the mark the turn is closed, first by what belongs to a call (`"}}\n</tool_call>`),
then by the token that ends turns; where the one ends and the other begins is seen on the same conversation without
anything behind the turn.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from troupe.errors import ModelError
from troupe.policy.text.chat import ChatTemplate, plain_messages
from troupe.policy.text.tokenizer import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]

TOOL_ROLES = frozenset({"tool", "ipython"})
"""Roles of messages that hold what a tool gave."""

_MARK = "WhatWasSaid"
_ASKED = {"role": "user", "content": "dummy"}
_MOST_CLOSINGS = 1024


class Seam(NamedTuple):
    """What follows on what the assistant said."""

    text: str
    ids: tuple[int, ...]
    has_end: bool
    """Whether the first of the ids ends the turn; some templates have no such token, as GLM-4's."""


class Seams:
    """The seams of one template."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, end_ids: Collection[int], variables: Mapping[str, Any]
    ) -> None:
        """`end_ids`: what a policy may end a turn with; `variables` go to the template."""
        self._tokenizer, self._template, self._variables = tokenizer, template, dict(variables)
        self._added = frozenset(tokenizer.added_tokens.values())
        self._end_texts = [text for text, id_ in tokenizer.added_tokens.items() if id_ in end_ids]
        self._closings: dict[tuple[tuple[str, str], ...], tuple[str, bool]] = {}

    def before(self, new: Messages, stand_ins: Mapping[str, str] | None = None) -> Seam:
        """What stands between a turn of the assistant and its next, where `new` is said in between.

        Raises ModelError where the template cannot render that, or closes a call in another way when something follows.
        """
        calls = _calls(new)
        closing, has_end = self._closing(calls)
        told = self._behind_mark(calls, new)
        if not told.startswith(closing):
            raise ModelError(
                f"{self._template.origin}: the chat template closes a call with {closing!r}, but with "
                f"{told[: len(closing)]!r} where another message follows, so nothing can be put behind it; use a "
                "template that closes calls in one way"
            )
        text = told[len(closing) :]
        ids = tuple(self._tokenizer.encode_restored(text, stand_ins or {}))
        return Seam(text, ids, has_end and bool(ids) and ids[0] in self._added)

    def _closing(self, calls: tuple[tuple[str, str], ...]) -> tuple[str, bool]:
        """What closes the calls of a turn before its end, and whether there is a token that ends it."""
        if calls not in self._closings:
            if len(self._closings) >= _MOST_CLOSINGS:
                self._closings.clear()
            text = self._behind_mark(calls, None)
            place = self._end_of_turn(text)
            self._closings[calls] = (text[:place], True) if place is not None else (text, False)
        return self._closings[calls]

    def _end_of_turn(self, text: str) -> int | None:
        places = [place for end in self._end_texts if (place := text.find(end)) >= 0]
        if not places:
            special = self._tokenizer.special_ids
            names = (name for name, id_ in self._tokenizer.added_tokens.items() if id_ in special)
            places = [place for name in names if name and (place := text.find(name)) >= 0]
        return min(places, default=None)

    def _behind_mark(self, calls: tuple[tuple[str, str], ...], new: Messages | None) -> str:
        """The rendered text behind the mark; `new` None: of the turn alone, without the next one's header."""
        refused: ModelError | None = None
        for begun in self._begun(calls):
            messages = plain_messages([*begun, *(new or ())])
            try:
                told = self._template.render(messages, None, new is not None, **self._variables)
            except ModelError as error:
                refused = refused or error
                continue
            place = told.find(_MARK)
            if place >= 0:
                return told[place + len(_MARK) :]
        raise refused or ModelError(
            f"{self._template.origin}: the chat template leaves out what an assistant has "
            f"{'called' if calls else 'said'}, so nothing can be put behind it; use a template that tells it"
        )

    def _begun(self, calls: tuple[tuple[str, str], ...]) -> Iterator[list[dict[str, Any]]]:
        """The made-up conversation up to the turn, in several ways: templates differ in what arguments they take, and
        some know one call only."""
        if not calls:
            yield [_ASKED, {"role": "assistant", "content": _MARK}]
            return
        for held in (calls, calls[:1]):
            for arguments in ({"text": _MARK}, f'{{"text": "{_MARK}"}}'):
                made: list[dict[str, Any]] = []
                for place, (name, id_) in enumerate(held):
                    marked = place == len(held) - 1
                    call = {
                        "name": name,
                        "arguments": arguments if marked else {} if isinstance(arguments, dict) else "{}",
                    }
                    made.append({"type": "function", "function": call, **({"id": id_} if id_ else {})})
                yield [_ASKED, {"role": "assistant", "content": "", "tool_calls": made}]


def _calls(new: Messages) -> tuple[tuple[str, str], ...]:
    """Names and ids of the calls that the messages answer: of the first, and of all that give an id."""
    answers = [message for message in new if message.get("role") in TOOL_ROLES]
    if not answers or new[0].get("role") not in TOOL_ROLES:
        return ()
    named = [(_name(message.get("name")), str(message.get("tool_call_id") or "")) for message in answers]
    return tuple(dict.fromkeys(call for call in named if call[1])) or (named[0],)


def _name(name: object) -> str:
    return str(name or "tool").replace(_MARK, "tool")
