"""`tokenizer.json` → a `Vocabulary`: BPE of bytes, as Qwen, Llama 3 and SmolLM2 have it, or of characters, as Gemma.

A model, a part of one, or an option that would change ids or texts and is not known here is refused by name.
"""

from pathlib import Path
from typing import Any

import msgspec

from troupe.errors import ModelError
from troupe.policy.text.tokenizer_parts import (
    Part,
    read_character_decoder,
    read_pattern,
    read_post_processor,
    read_steps,
    refuse_byte_decoders,
    refuse_splits,
    splits_into_bytes,
)
from troupe.policy.text.vocabulary import (
    AddedToken,
    Characters,
    Merge,
    Vocabulary,
    Words,
    decode_json,
    rank_words,
    refuse_shared_ids,
)

_REFUSED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_OF_CHARACTERS = ("fuse_unk", "byte_fallback")
_HARMLESS = frozenset({"type", "vocab", "merges", "unk_token", "ignore_merges", *_REFUSED, *_OF_CHARACTERS})
"""Keys of a model that are read here; any other is refused where it says something."""


class _Bpe(msgspec.Struct):
    vocab: dict[str, int] | list[Any]
    type: str | None = None
    merges: list[Merge] | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _TokenizerJson(msgspec.Struct):
    """Without `truncation` and `padding`, which whoever asks for ids decides."""

    model: _Bpe
    added_tokens: list[AddedToken] = []
    normalizer: Part | None = None
    pre_tokenizer: Part | None = None
    post_processor: Part | None = None
    decoder: Part | None = None


class _Keys(msgspec.Struct):
    model: dict[str, msgspec.Raw]


def read_tokenizer_json(file: Path) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`. Raises ModelError, naming file and part, for what is not supported."""
    content = decode_json(file, _TokenizerJson)
    model = content.model
    kind = model.type or ("BPE" if model.merges is not None else "unnamed")
    if kind != "BPE" or not isinstance(model.vocab, dict):
        raise ModelError(
            f"{file}: the tokenizer's model is {kind}; only BPE is supported, byte-level as Qwen's, Llama 3's and "
            "SmolLM2's, or of characters with byte_fallback as Gemma's"
        )
    _refuse_options(file, model)
    if splits_into_bytes(content.pre_tokenizer):
        return _of_words(file, content, model.vocab)
    if model.byte_fallback:
        return _of_characters(file, content, model.vocab)
    raise ModelError(
        f"{file}: pre_tokenizer has no 'ByteLevel' part and model.byte_fallback is false; of BPE only the byte-level "
        "one and that of characters with byte_fallback are supported"
    )


def _refuse_options(file: Path, model: _Bpe) -> None:
    for option in _REFUSED:
        if value := getattr(model, option):
            raise ModelError(f"{file}: model.{option} is {value!r}, which is not supported; it must be null")
    keys = decode_json(file, _Keys).model
    for option in sorted(keys.keys() - _HARMLESS):
        value = msgspec.json.decode(keys[option])
        if value not in (None, False, 0, "", [], {}):
            raise ModelError(
                f"{file}: model.{option} is {value!r}, which is not known; known are {', '.join(sorted(_HARMLESS))}"
            )


def _of_words(file: Path, content: _TokenizerJson, vocab: dict[str, int]) -> Vocabulary:
    model = content.model
    for option in _OF_CHARACTERS:
        if value := getattr(model, option):
            raise ModelError(f"{file}: model.{option} is {value!r}, which byte-level BPE does not use")
    refuse_byte_decoders(file, content.decoder)
    ids_by_rank, contents = rank_words(file, vocab, model.merges or [], model.unk_token, model.ignore_merges)
    prefix, suffix = read_post_processor(file, content.post_processor)
    return Vocabulary(
        origin=str(file),
        model=Words(ids_by_rank=ids_by_rank, pattern=read_pattern(file, content.pre_tokenizer)),
        contents=contents,
        names=vocab,
        added=content.added_tokens,
        steps=read_steps(file, content.normalizer),
        prefix=prefix,
        suffix=suffix,
    )


def _of_characters(file: Path, content: _TokenizerJson, vocab: dict[str, int]) -> Vocabulary:
    model = content.model
    steps = read_steps(file, content.normalizer)
    refuse_splits(file, content.pre_tokenizer, steps)
    refuse_shared_ids(file, vocab)
    if model.unk_token and model.unk_token not in vocab:
        raise ModelError(f"{file}: model.unk_token {model.unk_token!r} is not in the vocabulary; add it there")
    byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
    decoding, decoded_as_bytes = read_character_decoder(file, content.decoder)
    single = {id_: bytes([byte]) for byte, id_ in enumerate(byte_ids) if id_ is not None} if decoded_as_bytes else {}
    prefix, suffix = read_post_processor(file, content.post_processor)
    return Vocabulary(
        origin=str(file),
        model=Characters(
            merges=model.merges or [],
            bytes_=tuple(byte_ids),
            unknown=vocab.get(model.unk_token) if model.unk_token else None,
            fuses_unknown=model.fuse_unk,
            takes_whole=model.ignore_merges,
        ),
        contents={id_: decoding.content(token) for token, id_ in vocab.items()} | single,
        names=vocab,
        added=content.added_tokens,
        steps=steps,
        decoding=msgspec.structs.replace(decoding, byte_ids=frozenset(single)),
        prefix=prefix,
        suffix=suffix,
    )
