"""Finds added tokens in a text before anything else, as Hugging Face does: the leftmost, and of those the longest."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby, takewhile

from troupe.policy.text.vocabulary import AddedToken

_SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}
"""Unicode's white space; Python's own also has four control characters."""
_DEEPEST = 40  # groups within groups of a pattern
_WORD_CATEGORIES = frozenset({"Nd", "Nl", "Pc"})
_WORD_OTHERS = re.compile("[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")


class AddedFinder:
    """Cuts texts at added tokens. Immutable: threads may share one."""

    def __init__(
        self, added: Sequence[AddedToken], normalize: Callable[[str], str] = str, unread: Collection[int] = ()
    ) -> None:
        """`normalize` makes of a token's content what is looked for; what is `unread` stays part of the text."""
        tokens = {normalize(token.content): token for token in reversed(added) if token.content}
        self._tokens = {content: token for content, token in tokens.items() if content}
        self._unread = frozenset(unread)
        self._find = re.compile(_alternatives(self._tokens)) if self._tokens else None

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of added tokens and the non-empty text between them, in order."""
        begin = 0
        for found in self._find.finditer(text) if self._find else ():
            start, end, token = found.start(), found.end(), self._tokens[found.group()]
            if token.id in self._unread or (token.single_word and _is_within_word(text, start, end)):
                continue
            if token.lstrip:
                start = max(begin, _spaces_start(text, start))
            if token.rstrip:
                end = _spaces_end(text, end)
            if begin < start:
                yield text[begin:start]
            yield token.id
            begin = end
        if begin < len(text):
            yield text[begin:]


def _alternatives(texts: Collection[str], depth: int = 0) -> str:
    """A pattern of all texts, of several the longest: a tree by beginnings, since thousands side by side are slow."""
    if depth == _DEEPEST:
        return "(?:" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")"
    options = []
    for _, group in groupby(sorted(filter(None, texts)), key=lambda text: text[0]):
        begun = list(group)
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(begun[0], begun[-1], strict=False))
        start = "".join(character for character, _ in alike)
        rests = [text[len(start) :] for text in begun]
        options.append(re.escape(start) + (_alternatives(rests, depth + 1) if any(rests) else ""))
    return f"(?:{'|'.join(options)})" + ("?" if "" in texts else "")


def _is_within_word(text: str, start: int, end: int) -> bool:
    return (start > 0 and _is_word(text[start - 1])) or (end < len(text) and _is_word(text[end]))


def _is_word(character: str) -> bool:
    r"""What `\w` is to Rust's regular expressions."""
    category = unicodedata.category(character)
    return category[0] in "LM" or category in _WORD_CATEGORIES or _WORD_OTHERS.match(character) is not None


def _spaces_start(text: str, end: int) -> int:
    """Where the white space begins that ends at `end`."""
    while end and text[end - 1] in _SPACES:
        end -= 1
    return end


def _spaces_end(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACES:
        start += 1
    return start
