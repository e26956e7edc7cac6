"""What the files of a tokenizer say, as one `Vocabulary`, whatever their format; how tokens and merges are spelt."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from troupe.errors import ModelError
from troupe.policy.text.normalizing import Step

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the byte-level pre-tokenizer splits by where its file leaves `use_regex` on."""

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 split text into words, for folders whose files do not say."""

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
"""Llama 3's: up to three digits are a word."""

_T = TypeVar("_T")
Merge: TypeAlias = str | tuple[str, str]


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is found in the text before anything else, and never split."""

    content: str
    id: int = -1
    single_word: bool = False
    """Found only where no word character touches it."""
    lstrip: bool = False
    """Swallows white space to its left."""
    rstrip: bool = False
    normalized: bool = False
    """Looked for in the normalized text rather than in the text as given."""
    special: bool = False
    """Left out by `decode(skip_special_tokens=True)`."""


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """Byte-level BPE: a text is split into words by a pattern, and their bytes are merged."""

    ids_by_rank: dict[bytes, int | None]
    """Byte string → id in the order of merging: all 256 bytes (None: without a token, is dropped), then merges."""
    pattern: str = QWEN_PATTERN
    """Regular expression of one word."""


class Characters(msgspec.Struct, frozen=True, kw_only=True):
    """BPE of characters: a text is merged as a whole, from its characters' tokens, or those of their bytes."""

    merges: list[Merge]
    bytes_: tuple[int | None, ...]
    """Ids of the 256 bytes, which a character that is no token falls back to where all of its bytes have one."""
    unknown: int | None = None
    """Id of what is no token, nor has bytes; None: it is dropped."""
    fuses_unknown: bool = False
    """Whether several in a row are one."""
    takes_whole: bool = False
    """Whether a text that is a token is that token, whatever the merges make of it (`ignore_merges`)."""


class Decoding(msgspec.Struct, frozen=True, kw_only=True):
    """How a tokenizer of characters decodes."""

    replaced: tuple[tuple[str, str], ...] = ()
    """What stands for what within a token: "▁" for a space."""
    byte_ids: frozenset[int] = frozenset()
    """Tokens that are one byte. A row of them that is no UTF-8 is one U+FFFD for each."""
    stripped: str = ""
    """What is cut off at the beginning, as far as it is there."""

    def content(self, token: str) -> bytes:
        """The bytes that a token is decoded as, but for those of single bytes."""
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a tokenizer say."""

    origin: str
    """The file, for messages."""
    model: Words | Characters
    contents: dict[int, bytes]
    """Id → bytes, of every token but the added ones."""
    names: dict[str, int]
    """Token as the file spells it → id, of every token but the added ones."""
    added: list[AddedToken] = []
    """Those that `tokenizer.json` holds."""
    steps: tuple[Step, ...] = ("NFC",)
    """What a text goes through before it is split, in this order."""
    decoding: Decoding | None = None
    """How contents become a text, where they do not just follow one another."""
    prefix: tuple[int, ...] = ()
    """Ids that go before a text encoded with special tokens."""
    suffix: tuple[int, ...] = ()

    def content(self, added: str) -> bytes:
        """The bytes that an added token is decoded as."""
        if self.decoding is None:
            return added.encode()
        id_ = self.names.get(added, -1)
        return self.contents[id_] if id_ in self.decoding.byte_ids else self.decoding.content(added)


def rank_words(
    file: Path,
    vocab: dict[str, int],
    merges: Iterable[Merge],
    unk_token: str | None = None,
    ignore_merges: bool = False,
) -> tuple[dict[bytes, int | None], dict[int, bytes]]:
    """`Words.ids_by_rank` and `Vocabulary.contents` of a vocabulary spelt in the byte-level alphabet.

    A token that no merge makes is never found in a text, unless `ignore_merges` says that whole words may be tokens.
    """
    contents = {id_: token_bytes(token) for token, id_ in vocab.items()}
    refuse_shared_ids(file, vocab)
    ids = {content: id_ for id_, content in contents.items()}
    unknown = vocab.get(unk_token) if unk_token else None
    single = [bytes([byte]) for byte in range(256)]
    ids_by_rank = {byte: ids.get(byte, unknown) for byte in sorted(single, key=lambda byte: ids.get(byte, -1))}
    for left, right in merged_pairs(file, vocab, merges):
        made = vocab[left + right]
        ids_by_rank.setdefault(contents[made], made)
    if ignore_merges:
        whole = {content: id_ for id_, content in sorted(contents.items()) if content not in ids_by_rank}
        ids_by_rank |= whole
        for content, id_ in whole.items():
            if any(content[:n] in ids_by_rank and content[n:] in ids_by_rank for n in range(1, len(content))):
                raise ModelError(
                    f"{file}: model.ignore_merges is true, and token {id_}, {content.decode(errors='replace')!r}, is "
                    "two other tokens, of which no merge makes it; only tokens that merges make, or that are no two "
                    "others, are supported there"
                )
    return ids_by_rank, contents


def merged_pairs(file: Path, vocab: dict[str, int], merges: Iterable[Merge]) -> Iterator[tuple[str, str]]:
    """What each merge joins. ModelError where that is no token."""
    for number, merge in enumerate(merges, start=1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or "".join(pair) not in vocab:
            raise ModelError(f"{file}: merge {number}, {' '.join(pair)!r}, does not make a token of the vocabulary")
        yield pair[0], pair[1]


def refuse_shared_ids(file: Path, vocab: dict[str, int]) -> None:
    """ModelError where two tokens have one id."""
    if (ids := len(set(vocab.values()))) != len(vocab):
        raise ModelError(f"{file}: {len(vocab)} tokens have only {ids} different ids; each needs its own")


@cache
def _alphabet() -> dict[str, int]:
    """Character → byte: GPT-2's way to spell any byte as one printable character.

    Printable Latin-1 stands for itself, and the other bytes, in order, for the characters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """What a token of the byte-level alphabet stands for."""
    alphabet = _alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # not spelt in the alphabet: a special token that stands in the vocabulary too
        return token.encode()


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises ModelError for anything else."""
    if not file.is_file():
        return None
    return decode_json(file, dict[str, Any])


def decode_json(file: Path, kind: type[_T]) -> _T:
    """A JSON file as `kind`. Raises ModelError where it is not that."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: is damaged or no tokenizer file: {error}; copy the file anew") from error


def read_text(file: Path) -> str:
    """A text file. Raises ModelError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: is not UTF-8 text: {error}; copy the file anew") from error
