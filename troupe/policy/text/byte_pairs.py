"""Byte-level BPE on tiktoken: texts are split into words by a regular expression, and the bytes of a word are merged.

tiktoken merges by rank, so tokens get ranks in the order of the merges, and where that is not the order of the ids,
ranks are mapped to ids afterwards. It joins any two tokens that make a third, where the file has a list of pairs: for
merges that training has made that is the same.
"""

import re

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
        return [id_ for id_ in (table[rank] for rank in ranks) if id_ is not None]


def _encoding(words: Words, origin: str) -> tiktoken.Encoding:
    # tiktoken drops what the pattern does not match; Hugging Face keeps it as a piece of its own.
    pattern = words.pattern
    if pattern not in _LEAVE_NOTHING:
        pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
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


def _unsplit(error: BaseException, text: str, origin: str) -> BaseException:
    """What stands for an error of the tokenizer's Rust code; another one is itself."""
    if type(error).__name__ != _PANIC:
        return error
    return InputError(
        f"the text of {len(text)} characters cannot be split into words by the pattern of {origin}: it takes too many "
        "steps, as on a very long run of one kind of character; shorten it"
    )
