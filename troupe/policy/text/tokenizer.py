"""Text ↔ token ids, with the ids and texts that Hugging Face's tokenizers gives.

Added tokens are cut out first, the text between them is normalized, and split and merged by one of two BPEs: of bytes
(`byte_pairs`, on tiktoken) for Qwen, Llama 3 and SmolLM2, of characters (`character_pairs`) for Gemma.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias, cast

from troupe.errors import InputError
from troupe.policy.text.added_finder import AddedFinder
from troupe.policy.text.added_tokens import CONFIG_FILE, Tokens, read_tokens
from troupe.policy.text.byte_pairs import BytePairs
from troupe.policy.text.character_pairs import CharacterPairs
from troupe.policy.text.chat import Begun, ChatTemplate, choose_chat_template, load_chat_templates, plain_messages
from troupe.policy.text.decoding import ByteStream, DecodeStream, FallbackStream
from troupe.policy.text.normalizing import normalized
from troupe.policy.text.vocabulary import Vocabulary, Words, read_object
from troupe.policy.text.vocabulary_files import read_vocabulary

OPENED, CLOSED = "<think>", "</think>"
"""What thoughts stand between."""

CALLS = frozenset({"<|python_tag|>", "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<function_call>"})
"""Tokens that begin or end the call of a tool, by the templates of several families: a completion keeps them also where
its tokenizer takes them for special, as Llama 3's and Mistral's do, since without them a call would be mere text."""

TextPrompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text to continue, or the messages of a chat to answer."""

_ARGUMENTS = frozenset({"add_generation_prompt", "continue_final_message", "chat_template"})
_MAY_BE_EMPTY = ("tools", "documents")
_HELPERS = ("range", "namespace", "dict", "cycler", "joiner", "raise_exception", "strftime_now")


class Tokenizer:
    """A BPE tokenizer with its added tokens and chat template. Immutable: threads may share one."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokens: Tokens,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        self._origin = vocabulary.origin
        self._templates = dict(chat_templates or {})
        self._prefix, self._suffix = vocabulary.prefix, vocabulary.suffix
        self._steps, self._decoding = vocabulary.steps, vocabulary.decoding
        self._named, self._special = tokens.ids, tokens.special
        self._hidden = tokens.special - {token.id for token in tokens.added if token.content in CALLS}
        self.added_tokens: Mapping[str, int] = {token.content: token.id for token in tokens.added}
        """Text → id of the tokens that are found in a text before anything else."""
        unread = tokens.special if tokens.splits_special else frozenset()
        raw = [token for token in tokens.added if not token.normalized]
        self._split_raw = AddedFinder(raw, unread=unread).split
        late = [token for token in tokens.added if token.normalized]
        self._split_normalized = AddedFinder(late, self._normalize, unread).split
        self._contents = vocabulary.contents | {
            token.id: vocabulary.content(self._normalize(token.content) if token.normalized else token.content)
            for token in tokens.added
        }
        if isinstance(vocabulary.model, Words):
            self._pairs: BytePairs | CharacterPairs = BytePairs(vocabulary.model, vocabulary.origin)
        else:
            self._pairs = CharacterPairs(vocabulary.model, vocabulary.names, vocabulary.origin)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a model folder. Raises ModelError, naming the file, where that is not possible."""
        folder = Path(path)
        config = read_object(folder / CONFIG_FILE) or {}
        vocabulary = read_vocabulary(folder)
        tokens = read_tokens(folder, config, vocabulary)
        return cls(vocabulary, tokens, load_chat_templates(folder, config, tokens.named))

    def dated(self, day: date) -> Tokenizer:
        """The same, but its chat templates take `day` for today."""
        other = copy(self)
        other._templates = {name: template.dated(day) for name, template in self._templates.items()}
        return other

    @property
    def asks_for_today(self) -> bool:
        """Whether a chat template writes today's date."""
        return any(template.asks_for_today for template in self._templates.values())

    @property
    def vocab_size(self) -> int:
        """1 + the largest id, added tokens included. A model may have more logits than this, rounded up for speed."""
        return max(self._contents) + 1

    def differs_from(self, other: Tokenizer) -> str:
        """Why ids of this tokenizer do not mean the same for another, in words; empty where they do. How texts are
        split does not count."""
        own, others = self._contents, other._contents
        if own == others:
            return ""
        id_ = min(id_ for id_ in own.keys() | others.keys() if own.get(id_) != others.get(id_))
        mine, its = (f"stands for {found[id_]!r}" if id_ in found else "is not there" for found in (own, others))
        return f"id {id_} {mine} here, and {its} there"

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a completion."""
        return self._named.get("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows up."""
        return self._named.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; Qwen3 has none."""
        return self._named.get("bos_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return self._special

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Added tokens written in the text become their ids, special ones too.

        `add_special_tokens` adds what the tokenizer itself puts around a text: the begin of a text for Llama 3 and
        Gemma, nothing for Qwen3 and SmolLM2.
        """
        ids = self.encode_restored(text, {})
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_restored(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a text in which words stand for others, which are read as mere text: no added token is looked for in
        them. Nothing is put around it."""
        ids: list[int] = []
        for raw in self._split_raw(text):
            if isinstance(raw, int):
                ids.append(raw)
                continue
            for piece in self._split_normalized(self._normalize(raw)):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids.extend(self._pairs.encode(_restored(piece, stand_ins)))
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        return self._decode(_listed(ids), self._special if skip_special_tokens else frozenset())

    def decode_sampled(self, ids: Iterable[int]) -> str:
        """Text of ids that a model sampled: `decode`, without those that only the model's padded vocabulary has, and
        with the special tokens that make a text a call (`CALLS`)."""
        return self._decode((id_ for id_ in _listed(ids) if id_ in self._contents), self._hidden)

    def _decode(self, ids: Iterable[int], hidden: frozenset[int]) -> str:
        if self._decoding is None:
            return b"".join(self._bytes_of(id_, hidden) for id_ in ids).decode("utf-8", errors="replace")
        stream = self._stream(hidden)
        return "".join([*map(stream.push, ids), stream.finish()])

    def batch_encode(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text; rows are not padded."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that takes one id at a time, for one completion."""
        return self._stream(self._special if skip_special_tokens else frozenset())

    def sampled_stream(self) -> DecodeStream:
        """A decoder of one completion that a model samples: its pieces join to what `decode_sampled` gives."""
        return self._stream(self._hidden)

    def _stream(self, hidden: frozenset[int]) -> DecodeStream:
        if self._decoding is None:
            return ByteStream(lambda id_: self._bytes_of(id_, hidden))
        return FallbackStream(lambda id_: self._bytes_of(id_, hidden), self._decoding)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """Prompt text of a conversation by the model's own template; `encode` it with `add_special_tokens=False`.

        `tools` are JSON schemas; `kwargs` such as `enable_thinking` go to the template, but `chat_template="name"`
        picks one of several, and with `continue_final_message` (true, or the key of a message) the text ends within the
        final message, as the model is to go on with it. Messages are read as `chat.py` says.

        Raises ModelError where there is no template, or it refuses the messages; InputError for a variable that it
        never refers to, and for a final message that cannot be continued.
        """
        asked = kwargs.pop("continue_final_message", None) or False
        if not isinstance(asked, bool | str):
            raise InputError(f"continue_final_message is {asked!r}; give true, false or a key of the final message")
        if asked and add_generation_prompt:
            raise InputError(
                "continue_final_message and add_generation_prompt exclude each other: the prompt ends either within "
                "the final message or where a new one begins; set one of them to false"
            )
        template = self._template_for(tools, kwargs)
        if unknown := self.unknown_variables(tools=tools, **kwargs):
            raise InputError(self.explain_unknown(unknown[0], tools=tools, **kwargs))
        kwargs.pop("chat_template", None)
        plain = plain_messages(messages)
        if not asked:
            return template.render(plain, tools, add_generation_prompt, **kwargs)
        begun = Begun.of(plain, asked, template.source)
        return begun.cut(template.render(begun.messages, tools, add_generation_prompt, **kwargs))

    def unknown_variables(self, tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any) -> list[str]:
        """Those of the arguments of `apply_chat_template` that its template never refers to, so that they would do
        nothing. ModelError where there is no template."""
        known = self._template_for(tools, kwargs).variables | _ARGUMENTS
        given = {"tools": tools, **kwargs}
        return [name for name, value in given.items() if name not in known and (value or name not in _MAY_BE_EMPTY)]

    def explain_unknown(self, name: str, tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any) -> str:
        """What is to be said of one of them."""
        template = self._template_for(tools, kwargs)
        known = sorted(template.variables - {"messages", *_HELPERS})
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"it refers to {', '.join(known) or 'none'}; leave it out"
        return f"{template.origin}: the chat template never refers to {name}; {remedy}"

    def chat_template(self, has_tools: bool = False, name: str | None = None) -> ChatTemplate:
        """The one that renders a conversation with tools, or without; or the one called `name`. ModelError where there
        is none."""
        return choose_chat_template(self._templates, self._origin, has_tools, name)

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]) -> ChatTemplate:
        return self.chat_template(bool(tools), kwargs.get("chat_template"))

    def _normalize(self, text: str) -> str:
        return normalized(self._steps, text)

    def _bytes_of(self, id_: int, hidden: frozenset[int]) -> bytes:
        if id_ in hidden:
            return b""
        try:
            return self._contents[id_]
        except KeyError:
            raise ValueError(
                f"token id {id_} has no text: the ids of {self._origin} lie in [0, {self.vocab_size}); "
                "leave out ids that only the model's padded vocabulary has"
            ) from None


def opened_thought(tokenizer: Tokenizer, prompt: TextPrompt, ids: Sequence[int]) -> str:
    """What a prompt has written of the completion's thoughts: from its last `<think>` on, where that is still open.

    Of a text that is at its very end alone, and white space; of a chat anywhere in the turn that is begun, behind the
    last special token. Mostly "".
    """
    if isinstance(prompt, str):
        return prompt[prompt.rfind(OPENED) :] if prompt.rstrip().endswith(OPENED) else ""
    special = tokenizer.special_ids
    start = len(ids)
    while start and (ids[start - 1] not in special or tokenizer.decode([ids[start - 1]], False) in (OPENED, CLOSED)):
        start -= 1
    text = tokenizer.decode(ids[start:], skip_special_tokens=False)
    begun = text[text.rfind(OPENED) :] if OPENED in text else ""
    return begun if begun.strip() == OPENED or (start and CLOSED not in begun) else ""


def _restored(piece: str, stand_ins: Mapping[str, str]) -> str:
    for mark, text in stand_ins.items():
        piece = piece.replace(mark, text)
    return piece


def _listed(ids: Iterable[int]) -> Iterable[int]:
    """Arrays as a list of Python integers, because their elements are not hashable by value."""
    to_list = getattr(ids, "tolist", None)
    return cast("list[int]", to_list()) if to_list else ids
