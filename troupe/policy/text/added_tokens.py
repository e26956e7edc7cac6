"""Which tokens are found in a text before anything else, with ids and flags: what transformers 5 makes of a folder.

Beside `tokenizer.json`, `tokenizer_config.json` has a say: its `added_tokens_decoder`, the tokens that it names
(`eos_token`, `image_token`, …) and its `extra_special_tokens`; where it has no decoder, `special_tokens_map.json` and
`added_tokens.json` have, too. Which file wins follows from `tokenizer_class`: of Qwen's own class the decoder, and
named tokens lose their other flags; of any other, `tokenizer.json` counts first. Two things differ from transformers:
a declared id is kept where that would count on from the vocabulary instead, and a token that only `tokenizer.json`
has stays.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from troupe.errors import ModelError
from troupe.policy.text.normalizing import Prepended
from troupe.policy.text.vocabulary import AddedToken, Vocabulary, read_object

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that every tokenizer has, in the order in which new tokens get their ids."""

_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_BY_NAME = (_EXTRA, "model_specific_special_tokens")
"""Keys under which tokens may stand by name."""
_DEFAULT = "<|endoftext|>"
"""What Qwen's class takes for `eos_token`, `unk_token` and `pad_token` where the config does not have the key."""

_T = TypeVar("_T")


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The added tokens of a tokenizer."""

    added: tuple[AddedToken, ...] = ()
    """Each with its id and flags; no content and no id twice."""
    special: frozenset[int] = frozenset()
    """Ids that decoding leaves out on request."""
    named: dict[str, str] = {}
    """ "eos_token" → text, …; the names are variables of the chat template."""
    ids: dict[str, int] = {}
    """ "eos_token" → id, …"""
    splits_special: bool = False
    """Whether special tokens that stand in a text are read as any other text."""


def read_tokens(folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> Tokens:
    """The added tokens of a model folder; `config` is the content of its `tokenizer_config.json`.

    A token that is named or listed and in no vocabulary is added with the next id. Raises ModelError naming file, key
    and token, for what is no token, and for two tokens with one id.
    """
    if config.get("add_prefix_space") and not any(isinstance(step, Prepended) for step in vocabulary.steps):
        raise ModelError(f"{folder / CONFIG_FILE}: add_prefix_space: true is not supported; texts begin as they are")
    declared = _Declared(folder, config)
    is_qwen = str(config.get("tokenizer_class") or "Qwen2Tokenizer").removesuffix("Fast") == "Qwen2Tokenizer"
    table = _Table(vocabulary)
    for token in vocabulary.added:
        table.declare(token, vocabulary.origin)
    for token in declared.decoder:
        table.declare(token, str(declared.decoder_file), moves=is_qwen)
    named = declared.named()
    if is_qwen:
        has_default = _DEFAULT in table.tokens or _DEFAULT in vocabulary.names
        defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), AddedToken(_DEFAULT)) if has_default else {}
        named = {**{name: token for name, token in defaults.items() if name not in declared.settings}, **named}
    known = frozenset(table.tokens)
    for name in sorted(named, key=lambda name: NAMED.index(name) if name in NAMED else len(NAMED)):
        table.mark(named[name], None if is_qwen else known, is_named=True)
    for token in declared.extra:
        table.mark(token, None if is_qwen else known, is_named=False)
    if is_qwen:  # the decoder decides; of another class, what was special once stays it
        table.special = {content for content, token in table.tokens.items() if token.special}
    table.refuse_shared_ids()
    return Tokens(
        added=tuple(table.tokens.values()),
        special=frozenset(table.tokens[content].id for content in table.special),
        named={name: token.content for name, token in named.items()},
        ids={name: table.tokens[token.content].id for name, token in named.items() if token.content},
        splits_special=bool(config.get("split_special_tokens")),
    )


class _Declared:
    """What the files beside `tokenizer.json` say."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._file = self.decoder_file = folder / CONFIG_FILE
        self.settings = dict(config)
        self._file_of: dict[str, Path] = {}
        if not self.settings.get(_EXTRA) and _ADDITIONAL in self.settings:
            self.settings[_EXTRA] = self.settings.pop(_ADDITIONAL)
        self._models_own: dict[str, AddedToken] = {}
        self._collect_names()
        held = self._convert(config.get("added_tokens_decoder"), dict[int, _Flags] | None, "added_tokens_decoder")
        if held is None:
            self._read_map(folder / MAP_FILE)
        self._extra_key = _EXTRA if _EXTRA in self.settings else _ADDITIONAL  # of the map, without one in the config
        self.extra = [self._token(token, self._extra_key) for token in self._listed(self._extra_key)]
        if held is None:
            self.decoder_file = folder / ADDED_FILE
            self.decoder = self._read_added(self.decoder_file)
        else:
            self.decoder = [flags.token(id_) for id_, flags in sorted(held.items())]

    def named(self) -> dict[str, AddedToken]:
        """Name → token; a null is left out, as is an empty text."""
        found = {
            name: self._token(value, name)
            for name, value in self.settings.items()
            if value and (name in NAMED or (name.endswith("_token") and isinstance(value, str | dict | AddedToken)))
        }
        return {name: token for name, token in {**found, **self._models_own}.items() if token.content}

    def _collect_names(self) -> None:
        """The extra tokens, where they are given by name."""
        for key in _BY_NAME:
            if isinstance(self.settings.get(key), dict):
                extra = self.settings.pop(key)
                self._models_own |= {str(name): self._token(value, key) for name, value in extra.items()}

    def _read_map(self, file: Path) -> None:
        """Let `special_tokens_map.json` have its say: it wins over the config, and adds to its list."""
        mapped = read_object(file) or {}
        self._file_of |= dict.fromkeys(mapped, file)
        for name, value in mapped.items():
            if name == _EXTRA and isinstance(value, list):
                more = [self._read_flags(name, token) for token in value]
                value = [*self._listed(_EXTRA), *(token for token in more if token not in self._listed(_EXTRA))]
            elif name != _EXTRA:
                value = self._read_flags(name, value)
            self.settings[name] = value
        self._collect_names()

    def _read_added(self, file: Path) -> list[AddedToken]:
        held = self._convert(read_object(file) or {}, dict[str, int], "of a token")
        marked = [*(self.settings.get(name) for name in NAMED), *(self.settings.get(self._extra_key) or [])]
        # transformers compares before it has read the objects of tokenizer_config.json
        special = {token.content if isinstance(token, AddedToken) else str(token) for token in marked if token}
        return [
            AddedToken(content, id=id_, normalized=content not in special, special=content in special)
            for content, id_ in sorted(held.items(), key=lambda item: item[1])
        ]

    def _read_flags(self, key: str, value: Any) -> Any:
        """An object of the map as the special token that it is; other values as they are."""
        return self._token({**value, "special": True}, key) if isinstance(value, dict) else value

    def _listed(self, key: str) -> list[Any]:
        return self._convert(self.settings.get(key), list[Any] | None, key) or []

    def _token(self, value: Any, key: str) -> AddedToken:
        given = value if isinstance(value, AddedToken) else self._convert(value, str | _Flags, key)
        if isinstance(given, AddedToken):
            return given
        return AddedToken(given, special=True) if isinstance(given, str) else given.token()

    def _convert(self, value: Any, kind: type[_T] | Any, key: str) -> Any:
        try:
            return msgspec.convert(value, kind, strict=kind != dict[int, _Flags] | None)
        except msgspec.ValidationError as error:
            file = self._file_of.get(key, self._file)
            raise ModelError(
                f"{file}: key {key} is {str(value)[:80]!r}, where a token, written as a text or an object with its "
                f"content, is expected: {error}; correct it"
            ) from error


class _Flags(msgspec.Struct):
    """A token as an object."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def token(self, id_: int = -1) -> AddedToken:
        normalized = not self.special if self.normalized is None else self.normalized
        return AddedToken(**{**msgspec.structs.asdict(self), "id": id_, "normalized": normalized})


class _Table:
    """The added tokens so far, by content."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens: dict[str, AddedToken] = {}
        self.special: set[str] = set()
        """Contents of those that were special at any time."""
        self._vocabulary = vocabulary

    def declare(self, token: AddedToken, file: str, *, moves: bool = False) -> None:
        """Take a token of a file, in place of one with its content. Its id is the vocabulary's where that has it, else
        the one before unless it `moves`, else its own."""
        before = self.tokens.get(token.content)
        id_ = self._vocabulary.names.get(token.content, token.id if before is None or moves else before.id)
        if id_ < 0:
            raise ModelError(f"{file}: token {token.content!r} has the id {id_}; ids count from 0")
        self._put(token, id_)

    def mark(self, token: AddedToken, known: frozenset[str] | None, *, is_named: bool) -> None:
        """Make a token special; one that is new gets the vocabulary's id, or the next one.

        `known` are contents whose flags stay, and which need a name to become special; None: no flag but that stays.
        """
        before = self.tokens.get(token.content)
        if known is None:
            token = AddedToken(token.content, special=True)
        else:
            token = before if before is not None and token.content in known else token
            token = msgspec.structs.replace(token, special=token.special or is_named)
        id_ = self._vocabulary.names.get(token.content, self._next()) if before is None else before.id
        self._put(token, id_)

    def _put(self, token: AddedToken, id_: int) -> None:
        if token.content:
            self.tokens[token.content] = msgspec.structs.replace(token, id=id_)
            if token.special:
                self.special.add(token.content)

    def refuse_shared_ids(self) -> None:
        holders: dict[int, str] = {}
        for content, token in self.tokens.items():
            other = holders.setdefault(token.id, content)
            if content not in self._vocabulary.names and token.id in self._vocabulary.contents:
                other = self._vocabulary.contents[token.id].decode(errors="replace")
            if other != content:
                raise ModelError(
                    f"{self._vocabulary.origin}: the tokens {other!r} and {content!r} both have the id {token.id}, in "
                    f"this file or in {CONFIG_FILE}; give each its own"
                )

    def _next(self) -> int:
        return 1 + max((*self._vocabulary.contents, *(token.id for token in self.tokens.values())), default=-1)
