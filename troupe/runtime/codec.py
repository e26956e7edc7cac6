"""Messages as frames between our own processes: msgpack, which a decoder of the types that may come checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from troupe.runtime.frames import FrameError

encode = msgspec.msgpack.Encoder().encode
"""One message as one frame."""


class MessageError(FrameError):
    """A frame that holds nothing that may come here."""


def decoder(messages: Any, between: str) -> Callable[[bytes], Any]:
    """A function from a frame to a message of these types (a struct or a union of structs); MessageError, which names
    `between` whom it was sent, for anything else."""
    decode = msgspec.msgpack.Decoder(messages).decode

    def decode_checked(frame: bytes) -> Any:
        try:
            return decode(frame)
        except msgspec.MsgspecError as error:
            raise MessageError(f"a frame of {len(frame)} bytes between {between} is no message: {error}") from None

    return decode_checked
