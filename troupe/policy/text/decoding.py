"""Bytes of tokens → text, all at once or token by token: both give the same."""

import codecs
from collections.abc import Callable
from typing import Protocol

from troupe.policy.text.vocabulary import Decoding


class DecodeStream(Protocol):
    """Text of tokens as they come. The pieces join to what `decode` gives; half a character waits for its rest."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often one word, "" in the middle of a character. Errors as `decode`."""

    def finish(self) -> str:
        """What is left at the end: "", or U+FFFD where the last character never got its rest."""


class ByteStream:
    """A stream where all bytes follow one another; what is no UTF-8 becomes U+FFFD."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class FallbackStream:
    """A stream where tokens are text, and some single bytes.

    Bytes in a row are UTF-8 as a whole, or else one U+FFFD each: so they wait for the first token that is none.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], decoding: Decoding) -> None:
        self._bytes_of = bytes_of
        self._byte_ids, self._stripped = decoding.byte_ids, decoding.stripped
        self._waiting = b""

    def push(self, token_id: int) -> str:
        content = self._bytes_of(token_id)
        if token_id in self._byte_ids:
            self._waiting += content
            return ""
        return self._begun(self._flush() + content.decode()) if content else ""

    def finish(self) -> str:
        return self._begun(self._flush())

    def _flush(self) -> str:
        waiting, self._waiting = self._waiting, b""
        try:
            return waiting.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(waiting)

    def _begun(self, text: str) -> str:
        """Cut off what the beginning of all is stripped of."""
        while self._stripped and text:
            if not text.startswith(self._stripped[0]):
                self._stripped = ""
            else:
                text, self._stripped = text[1:], self._stripped[1:]
        return text
