"""Control tokens that somebody writes as text stay text: a tool's result that says "<|im_end|>" ends no turn.

Templates put what was said between their own control tokens, and only of the rendered whole ids are made. So what is
written like a control token is replaced before rendering by a stand-in, a word that occurs nowhere else, and
`Tokenizer.encode_restored` reads the stand-in as what it stands for. Where nothing is written so, nothing changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from troupe.policy.text.added_finder import AddedFinder
from troupe.policy.text.tokenizer import CALLS, Tokenizer
from troupe.policy.text.vocabulary import AddedToken

Messages: TypeAlias = Sequence[Mapping[str, Any]]

_STEM = "StandIn"


class ControlTokens:
    """Those of a tokenizer and a chat template. Immutable."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """A token controls where it is special, or where `template`, the source, writes it. White space never does."""
        special = tokenizer.special_ids
        control = {
            text: id_
            for text, id_ in tokenizer.added_tokens.items()
            if text.strip() and (id_ in special or text in template)
        }
        self._texts = {id_: text for text, id_ in control.items()}
        self._of_others = _finder(control)
        self._of_policy = _finder({t: id_ for t, id_ in control.items() if id_ in special and t not in CALLS})

    def hide(self, messages: Messages, given: int = 0) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The messages with stand-ins, and what each stands for. The first `given` messages stay as they are.

        Of the policy's own messages only special tokens are hidden: its thoughts and calls are written with others.
        """
        found: dict[str, str] = {}
        free = [dict(message) for message in messages]
        if any(self._writes_control(message) for message in free[given:]):
            stem = _STEM
            while any(stem in text for text in _texts(free)):
                stem += "X"
            for place in range(given, len(free)):
                finder = self._finder_of(free[place])
                free[place] = self._hidden(free[place], finder, stem, found)
        return free, found

    def _writes_control(self, message: Mapping[str, Any]) -> bool:
        finder = self._finder_of(message)
        return any(isinstance(piece, int) for text in _texts(message) for piece in finder.split(text))

    def _finder_of(self, message: Mapping[str, Any]) -> AddedFinder:
        return self._of_policy if message.get("role") == "assistant" else self._of_others

    def _hidden(self, value: Any, finder: AddedFinder, stem: str, found: dict[str, str]) -> Any:
        if isinstance(value, str):
            pieces = list(finder.split(value))
            names = {piece: f"{stem}{piece}Z" for piece in pieces if isinstance(piece, int)}
            found |= {name: self._texts[id_] for id_, name in names.items()}
            return "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
        if isinstance(value, Mapping):
            return {
                self._hidden(key, finder, stem, found): self._hidden(held, finder, stem, found)
                for key, held in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hidden(held, finder, stem, found) for held in value]
        return value


def _finder(tokens: Mapping[str, int]) -> AddedFinder:
    return AddedFinder([AddedToken(text, id_) for text, id_ in tokens.items()])


def _texts(value: Any) -> Iterator[str]:
    """All texts in messages, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _texts(key)
            yield from _texts(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts(held)
