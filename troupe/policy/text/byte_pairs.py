"""Byte-level BPE on tiktoken: texts are split into words by a regular expression, and the bytes of a word are merged.

tiktoken merges by rank, so tokens get ranks in the order of the merges, and where that is not the order of the ids,
ranks are mapped to ids afterwards. It joins any two tokens that make a third, where the file has a list of pairs: for
merges that training has made that is the same. Bytes without a token are dropped before the others are merged, as
Hugging Face does; tiktoken needs all 256, so words that have such a byte are merged here.
"""

import re
from collections.abc import Mapping
from itertools import pairwise

import regex  # type: ignore[import-untyped]  # which tiktoken needs
import tiktoken

from troupe.errors import InputError, ModelError
from troupe.policy.text.tokenizer_parts import JOINED, WHOLE_TEXT
from troupe.policy.text.vocabulary import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN, Words

_LEAVE_NOTHING = frozenset({QWEN_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, WHOLE_TEXT, *JOINED.values()})
"""Patterns that match somewhere in any text."""

_PANIC = "PanicException"  # of Rust, by name, since its class can be had from nowhere; it is no Exception
_LONGEST_RUN = 500_000  # characters of white space; at a million, the steps that the pattern may take are used up
_SPACES = re.compile(r"\s+")
_SAMPLE = "The 1st word's {end}:\n\n  é 中 x  \t"


class BytePairs:
    """Ids of texts without added tokens. Immutable: threads may share one."""

    def __init__(self, words: Words, origin: str) -> None:
        """Raises ModelError, naming `origin`, where tiktoken cannot split by the pattern."""
        self._origin = origin
        ids = list(words.ids_by_rank.values())
        self._id_of_rank = None if ids == list(range(len(ids))) else ids
        self._bpe = _encoding(words, origin)
        self._words = words
        self._dropped = bytes(byte for byte in range(256) if words.ids_by_rank.get(bytes([byte]), byte) is None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises InputError for a text that the pattern cannot split."""
        if len(text) >= _LONGEST_RUN:
            longest = max((found.end() - found.start() for found in _SPACES.finditer(text)), default=0)
            if longest >= _LONGEST_RUN:
                raise InputError(
                    f"the text has {longest} characters of white space in a row, and fewer than {_LONGEST_RUN} can be "
                    "split into words; shorten it"
                )
        try:
            ranks = self._bpe.encode_ordinary(text)
        except BaseException as error:
            raise _unsplit(error, text, self._origin) from None
        table = self._id_of_rank
        if table is None:
            return ranks
        ids = [table[rank] for rank in ranks]
        return self._without_dropped(text) if None in ids else [id_ for id_ in ids if id_ is not None]

    def _without_dropped(self, text: str) -> list[int]:
        ids_by_rank = self._words.ids_by_rank
        ranks = {content: rank for rank, content in enumerate(ids_by_rank)}
        ids: list[int | None] = []
        for found in regex.finditer(_whole(self._words.pattern), text):
            word = found.group().encode("utf-8", errors="replace").translate(None, self._dropped)
            ids += [ids_by_rank[part] for part in _merged(word, ranks)]
        return [id_ for id_ in ids if id_ is not None]


def _encoding(words: Words, origin: str) -> tiktoken.Encoding:
    pattern = _whole(words.pattern)
    ranks = {content: rank for rank, content in enumerate(words.ids_by_rank)}
    refused = f"{origin}: split pattern {words.pattern!r} is not supported"
    try:
        encoding = tiktoken.Encoding(origin, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        if pattern not in _LEAVE_NOTHING:
            encoding.encode_ordinary(_SAMPLE)
    except ValueError as error:
        raise ModelError(f"{refused}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise ModelError(f"{refused}: it finds words of no characters, or takes too many steps") from None
    return encoding


def _whole(pattern: str) -> str:
    """The pattern, and where it does not match: tiktoken drops that, Hugging Face keeps it as a piece of its own."""
    return pattern if pattern in _LEAVE_NOTHING else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _merged(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The tokens of a word: of two neighbours that make a token those of the lowest rank first."""
    parts = [word[place : place + 1] for place in range(len(word))]
    while True:
        joined = [left + right for left, right in pairwise(parts)]
        place = min(range(len(joined)), key=lambda place: ranks.get(joined[place], len(ranks)), default=-1)
        if place < 0 or joined[place] not in ranks:
            return parts
        parts[place : place + 2] = [joined[place]]


def _unsplit(error: BaseException, text: str, origin: str) -> BaseException:
    """What stands for an error of the tokenizer's Rust code; another one is itself."""
    if type(error).__name__ != _PANIC:
        return error
    return InputError(
        f"the text of {len(text)} characters cannot be split into words by the pattern of {origin}: it takes too many "
        "steps, as on a very long run of one kind of character; shorten it"
    )
