"""Text ↔ token ids for byte-level BPE, as Qwen's models use it, on tiktoken.

Gives the ids that Hugging Face's tokenizers gives. tiktoken merges by rank, so tokens get ranks in the order of the
merges, and where that is not the order of the ids, ranks are mapped to ids afterwards.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import tiktoken

from troupe.errors import InputError, ModelError
from troupe.policy.text.added_tokens import CONFIG_FILE, Tokens, read_tokens
from troupe.policy.text.chat import Begun, ChatTemplate, choose_chat_template, load_chat_templates, plain_messages
from troupe.policy.text.normal_forms import normalize
from troupe.policy.text.vocabulary import (
    GPT2_PATTERN,
    QWEN_PATTERN,
    AddedToken,
    Vocabulary,
    read_object,
    read_vocabulary,
)

OPENED, CLOSED = "<think>", "</think>"
"""What thoughts stand between."""

TextPrompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text to continue, or the messages of a chat to answer."""

_PANIC = "PanicException"  # of Rust, by name, since its class can be had from nowhere; it is no Exception
_LONGEST_RUN = 500_000  # characters of white space; at a million, the steps that the pattern may take are used up
_SPACES = re.compile(r"\s+")
_SAMPLE = "The 1st word's {end}:\n\n  é 中 x  \t"
_ARGUMENTS = frozenset({"add_generation_prompt", "continue_final_message", "chat_template"})
_MAY_BE_EMPTY = ("tools", "documents")
_HELPERS = ("range", "namespace", "dict", "cycler", "joiner", "raise_exception", "strftime_now")


class Tokenizer:
    """A byte-level BPE tokenizer with its added tokens and chat template. Immutable: threads may share one."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokens: Tokens,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        self._origin = vocabulary.origin
        self._templates = dict(chat_templates or {})
        self._prefix, self._suffix = vocabulary.prefix, vocabulary.suffix
        self._normal_forms = vocabulary.normal_forms
        self._named, added = tokens.ids, tokens.added
        found = [token for token in added if not (tokens.splits_special and token.id in tokens.special)]
        self._split_raw = _added_token_splitter([token for token in found if not token.normalized], str)
        self._split_normalized = _added_token_splitter([token for token in found if token.normalized], self._normalize)
        self._contents = vocabulary.contents | {token.id: token.content.encode() for token in added}
        self._special = tokens.special
        ids = list(vocabulary.ids_by_rank.values())
        self._id_of_rank = None if ids == list(range(len(ids))) else ids
        self._bpe = _byte_pair_encoding(vocabulary)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a model folder. Raises ModelError, naming the file, where that is not possible."""
        folder = Path(path)
        config = read_object(folder / CONFIG_FILE) or {}
        vocabulary = read_vocabulary(folder)
        tokens = read_tokens(folder, config, vocabulary)
        return cls(vocabulary, tokens, load_chat_templates(folder, config, tokens.named))

    @property
    def vocab_size(self) -> int:
        """1 + the largest id, added tokens included. A model may have more logits than this, rounded up for speed."""
        return max(self._contents) + 1

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

        `add_special_tokens` adds what the tokenizer's own post-processor puts around a text; for Qwen3, nothing.
        """
        ids: list[int] = list(self._prefix) if add_special_tokens else []
        for raw in self._split_raw(text):
            if isinstance(raw, int):
                ids.append(raw)
                continue
            for piece in self._split_normalized(self._normalize(raw)):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids.extend(self._encode_ordinary(piece))
        return [*ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        contents = (self._bytes_of(id_, skip_special_tokens) for id_ in _listed(ids))
        return b"".join(contents).decode("utf-8", errors="replace")

    def decode_sampled(self, ids: Iterable[int]) -> str:
        """Text of ids that a model sampled: `decode`, without those that only the model's padded vocabulary has."""
        return self.decode(id_ for id_ in _listed(ids) if id_ in self._contents)

    def batch_encode(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text; rows are not padded."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that takes one id at a time, for one completion."""
        return DecodeStream(lambda id_: self._bytes_of(id_, skip_special_tokens))

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

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]) -> ChatTemplate:
        return choose_chat_template(self._templates, self._origin, bool(tools), kwargs.get("chat_template"))

    def _normalize(self, text: str) -> str:
        for form in self._normal_forms:
            text = normalize(form, text)
        return text

    def _encode_ordinary(self, text: str) -> list[int]:
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

    def _bytes_of(self, id_: int, skip_special: bool) -> bytes:
        if skip_special and id_ in self._special:
            return b""
        try:
            return self._contents[id_]
        except KeyError:
            raise ValueError(
                f"token id {id_} has no text: the ids of {self._origin} lie in [0, {self.vocab_size}); "
                "leave out ids that only the model's padded vocabulary has"
            ) from None


class DecodeStream:
    """Text of tokens as they come. The pieces join to what `decode` gives; half a character waits for its rest."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; often one word, "" in the middle of a character. Errors as `decode`."""
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """What is left at the end: "", or U+FFFD where the last character never got its rest."""
        return self._utf8.decode(b"", final=True)


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


def _listed(ids: Iterable[int]) -> Iterable[int]:
    """Arrays as a list of Python integers, because their elements are not hashable by value."""
    to_list = getattr(ids, "tolist", None)
    return cast("list[int]", to_list()) if to_list else ids


def _added_token_splitter(
    added: list[AddedToken], normalize: Callable[[str], str]
) -> Callable[[str], Iterator[str | int]]:
    """A function that cuts a text into the ids of added tokens and the non-empty text between them.

    Of tokens that begin at the same place the longest wins.
    """
    tokens = sorted((token for token in added if token.content), key=lambda token: -len(token.content))
    patterns = [_added_token_pattern(token, normalize(token.content)) for token in tokens]
    # `re` skips fast to where some token may begin, but not past groups: so one pattern finds, and one names.
    finder = re.compile("|".join(patterns)) if patterns else None
    namer = re.compile("|".join(f"({pattern})" for pattern in patterns))

    def split(text: str) -> Iterator[str | int]:
        begin = 0
        for found in finder.finditer(text) if finder else ():
            if found.start() > begin:
                yield text[begin : found.start()]
            named = cast("re.Match[str]", namer.match(text, found.start()))
            yield tokens[cast("int", named.lastindex) - 1].id
            begin = found.end()
        if begin < len(text):
            yield text[begin:]

    return split


def _added_token_pattern(token: AddedToken, content: str) -> str:
    pattern = re.escape(content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


def _byte_pair_encoding(vocabulary: Vocabulary) -> tiktoken.Encoding:
    # tiktoken drops what the pattern does not match; Hugging Face keeps it as a piece of its own.
    pattern = vocabulary.pattern
    if pattern not in (QWEN_PATTERN, GPT2_PATTERN):
        pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    ranks = {content: rank for rank, content in enumerate(vocabulary.ids_by_rank)}
    try:
        encoding = tiktoken.Encoding(vocabulary.origin, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        if pattern not in (QWEN_PATTERN, GPT2_PATTERN):
            encoding.encode_ordinary(_SAMPLE)
    except ValueError as error:
        raise ModelError(
            f"{vocabulary.origin}: split pattern {vocabulary.pattern!r} is not supported: {error}"
        ) from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise ModelError(
            f"{vocabulary.origin}: split pattern {vocabulary.pattern!r} is not supported: it finds words of no "
            "characters, or takes too many steps"
        ) from None
    return encoding


def _unsplit(error: BaseException, text: str, origin: str) -> BaseException:
    """What stands for an error of the tokenizer's Rust code; another one is itself."""
    if type(error).__name__ != _PANIC:
        return error
    return InputError(
        f"the text of {len(text)} characters cannot be split into words by the pattern of {origin}: it takes too many "
        "steps, as on a very long run of one kind of character; shorten it"
    )
