"""The files of a byte-level BPE tokenizer → one `Vocabulary`, whatever their format.

Reads `tokenizer.json`, or `vocab.json` with `merges.txt`, or a `*.tiktoken` rank file, and refuses by name what
tiktoken could not reproduce.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import msgspec

from troupe.errors import ModelError
from troupe.policy.text.normal_forms import NormalForm

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Qwen3 split text into words, for folders whose files do not say."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the byte-level pre-tokenizer splits by where its file leaves `use_regex` on."""

WHOLE_TEXT = r"[\s\S]+"
"""No split at all."""


_T = TypeVar("_T")
_Merge = str | tuple[str, str]
_Part = dict[str, Any]


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


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a tokenizer say."""

    origin: str
    """The file, for messages."""
    ids_by_rank: dict[bytes, int | None]
    """Byte string → id in the order of merging: all 256 bytes (None: without a token, is dropped), then merges."""
    contents: dict[int, bytes]
    """Id → bytes, of every token but the added ones."""
    names: dict[str, int]
    """Token as the file spells it → id, of every token but the added ones."""
    added: list[AddedToken] = []
    """Those that `tokenizer.json` holds."""
    pattern: str = QWEN_PATTERN
    """Regular expression of one word."""
    normal_forms: tuple[NormalForm, ...] = ("NFC",)
    """Unicode normal forms, applied in this order."""
    prefix: tuple[int, ...] = ()
    """Ids that go before a text encoded with special tokens."""
    suffix: tuple[int, ...] = ()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder.

    `tokenizer.json` comes first, then `vocab.json` + `merges.txt`, then the rank file. Raises ModelError naming the
    file that is missing, malformed, or of another kind than byte-level BPE.
    """
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder)
    rank_files = sorted(folder.glob("*.tiktoken"))
    if len(rank_files) == 1:
        return _read_rank_file(rank_files[0])
    raise ModelError(
        f"{folder}: found {len(rank_files)} *.tiktoken files and no tokenizer.json, nor vocab.json with merges.txt; "
        "copy the tokenizer files of the model into this folder"
    )


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises ModelError for anything else."""
    if not file.is_file():
        return None
    return _decode(file, dict[str, Any])


class _Bpe(msgspec.Struct):
    vocab: dict[str, int] | list[Any]
    type: str | None = None
    merges: list[_Merge] | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _TokenizerJson(msgspec.Struct):
    model: _Bpe
    added_tokens: list[AddedToken] = []
    normalizer: _Part | None = None
    pre_tokenizer: _Part | None = None
    post_processor: _Part | None = None
    decoder: _Part | None = None


def _read_tokenizer_json(file: Path) -> Vocabulary:
    content = _decode(file, _TokenizerJson)
    model = content.model
    kind = model.type or ("BPE" if model.merges is not None else "unnamed")
    if kind != "BPE" or not isinstance(model.vocab, dict):
        raise ModelError(f"{file}: the tokenizer's model is {kind}; only byte-level BPE, as Qwen3 has it, is supported")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"):
        if value := getattr(model, option):
            raise ModelError(f"{file}: model.{option} is {value!r}, which byte-level BPE of Qwen3's kind does not use")
    for part in _parts(content.decoder, "decoders"):
        if part.get("type") != "ByteLevel":
            raise ModelError(f"{file}: decoder {part.get('type')!r} is not supported, only 'ByteLevel'")
    prefix, suffix = _post_processor(file, content.post_processor)
    ids_by_rank, contents = _rank(file, model.vocab, model.merges or [], model.unk_token, model.ignore_merges)
    return Vocabulary(
        origin=str(file),
        ids_by_rank=ids_by_rank,
        contents=contents,
        names=model.vocab,
        added=content.added_tokens,
        pattern=_split_pattern(file, content.pre_tokenizer),
        normal_forms=_normal_forms(file, content.normalizer),
        prefix=prefix,
        suffix=suffix,
    )


def _read_vocab_and_merges(folder: Path) -> Vocabulary:
    file, merges_file = folder / "vocab.json", folder / "merges.txt"
    lines = _text(merges_file).split("\n")
    merges: list[_Merge] = [line for line in lines if line and not line.startswith("#version")]
    names = _decode(file, dict[str, int])
    ids_by_rank, contents = _rank(merges_file, names, merges)
    return Vocabulary(origin=str(file), ids_by_rank=ids_by_rank, contents=contents, names=names)


def _read_rank_file(file: Path) -> Vocabulary:
    rank_of: dict[bytes, int] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            rank_of[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{file}, line {number}: {line[:80]!r} is no 'base64 rank' pair: {error}") from error
    if len(set(rank_of.values())) != len(rank_of):
        raise ModelError(f"{file}: two tokens share one rank; each line needs a rank of its own")
    missing = [byte for byte in range(256) if bytes([byte]) not in rank_of]
    if missing:
        raise ModelError(f"{file}: byte 0x{missing[0]:02X} has no rank; a rank file needs all 256 single bytes")
    contents = {rank: token for token, rank in rank_of.items()}
    return Vocabulary(
        origin=str(file),
        ids_by_rank={token: rank for rank, token in sorted(contents.items())},
        contents=contents,
        names={token.decode(errors="replace"): rank for token, rank in rank_of.items()},
    )


def _rank(
    file: Path,
    vocab: dict[str, int],
    merges: Iterable[_Merge],
    unk_token: str | None = None,
    ignore_merges: bool = False,
) -> tuple[dict[bytes, int | None], dict[int, bytes]]:
    """`Vocabulary.ids_by_rank` and `.contents` of a vocabulary spelt in the byte-level alphabet.

    A token that no merge makes is never found in a text, unless `ignore_merges` says that whole words may be tokens.
    """
    contents = {id_: _token_bytes(token) for token, id_ in vocab.items()}
    if len(contents) != len(vocab):
        raise ModelError(f"{file}: {len(vocab)} tokens have only {len(contents)} different ids; each needs its own")
    ids = {content: id_ for id_, content in contents.items()}
    unknown = vocab.get(unk_token) if unk_token else None
    single = [bytes([byte]) for byte in range(256)]
    ids_by_rank = {byte: ids.get(byte, unknown) for byte in sorted(single, key=lambda byte: ids.get(byte, -1))}
    for number, merge in enumerate(merges, start=1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        made = "".join(pair)
        if len(pair) != 2 or made not in vocab:
            raise ModelError(f"{file}: merge {number}, {' '.join(pair)!r}, does not make a token of the vocabulary")
        ids_by_rank.setdefault(contents[vocab[made]], vocab[made])
    if ignore_merges:
        ids_by_rank |= {content: id_ for id_, content in sorted(contents.items()) if content not in ids_by_rank}
    return ids_by_rank, contents


@cache
def _alphabet() -> dict[str, int]:
    """Character → byte: GPT-2's way to spell any byte as one printable character.

    Printable Latin-1 stands for itself, and the other bytes, in order, for the characters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _token_bytes(token: str) -> bytes:
    alphabet = _alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # not spelt in the alphabet: a special token that stands in the vocabulary too
        return token.encode()


def _parts(part: _Part | None, sequence_key: str) -> list[_Part]:
    """A component as a flat list: a "Sequence" is its members, null is none."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [inner for member in part.get(sequence_key, []) for inner in _parts(member, sequence_key)]
    return [part]


def _normal_forms(file: Path, normalizer: _Part | None) -> tuple[NormalForm, ...]:
    known = get_args(NormalForm)
    forms = tuple(str(part.get("type")) for part in _parts(normalizer, "normalizers"))
    for form in forms:
        if form not in known:
            raise ModelError(f"{file}: normalizer {form!r} is not supported, only {', '.join(known)}")
    return cast("tuple[NormalForm, ...]", forms)


def _split_pattern(file: Path, pre_tokenizer: _Part | None) -> str:
    """The one pattern that texts are split by. tiktoken takes one, so of several the file is refused."""
    patterns = []
    parts = _parts(pre_tokenizer, "pretokenizers")
    if "ByteLevel" not in [part.get("type") for part in parts]:
        raise ModelError(f"{file}: pre_tokenizer has no 'ByteLevel' part; only byte-level BPE is supported")
    for part in parts:
        match part:
            case {"type": "ByteLevel"} if not part.get("add_prefix_space"):
                if part.get("use_regex", True):
                    patterns.append(GPT2_PATTERN)
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(regex)}} if not part.get("invert"):
                patterns.append(regex)
            case {"type": "Split", "behavior": "Isolated", "pattern": {"String": str(text)}} if not part.get("invert"):
                patterns.append(re.escape(text))
            case _:
                raise ModelError(
                    f"{file}: pre_tokenizer part {part} is not supported; use one Split of behavior 'Isolated' "
                    "and ByteLevel without add_prefix_space"
                )
    if len(patterns) > 1:
        raise ModelError(f"{file}: pre_tokenizer splits {len(patterns)} times; at most one split is supported")
    return patterns[0] if patterns else WHOLE_TEXT


def _post_processor(file: Path, processor: _Part | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a single text."""
    before: list[int] = []
    after: list[int] = []
    for part in _parts(processor, "processors"):
        if part.get("type") == "ByteLevel":
            continue
        if part.get("type") != "TemplateProcessing":
            raise ModelError(
                f"{file}: post_processor {part.get('type')!r} is not supported, "
                "only 'ByteLevel' and 'TemplateProcessing'"
            )
        try:
            template = msgspec.convert(part, _TemplateProcessing)
            side = before
            for piece in template.single:
                if "SpecialToken" in piece:
                    side.extend(template.special_tokens[piece["SpecialToken"]["id"]].ids)
                else:
                    side = after
        except (msgspec.ValidationError, KeyError) as error:
            raise ModelError(f"{file}: post_processor TemplateProcessing is malformed: {error!r}") from error
    return tuple(before), tuple(after)


class _TemplateToken(msgspec.Struct):
    ids: list[int]


class _TemplateProcessing(msgspec.Struct):
    single: list[dict[str, dict[str, Any]]]
    special_tokens: dict[str, _TemplateToken]


def _decode(file: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: is damaged or no tokenizer file: {error}; copy the file anew") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: is not UTF-8 text: {error}; copy the file anew") from error
