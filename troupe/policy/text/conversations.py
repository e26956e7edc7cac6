"""Messages as chat templates want them, and answers that are begun: what transformers does around a template.

A key whose value is null is no key. Thoughts are `reasoning_content`, also where they come as `thinking` or
`reasoning`. A final message that is to be continued is marked, and what is rendered ends at the mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from troupe.errors import InputError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thoughts; the first that is there counts."""

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # the blank at its end tells whether the template trims


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without nulls, thoughts under the name that templates read, and under `thinking`, which gpt-oss reads."""
    plain = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        thoughts = next((kept[key] for key in REASONING if key in kept), None)
        if thoughts is not None:
            kept = {"thinking": thoughts, **kept, "reasoning_content": thoughts}
        plain.append(kept)
    return plain


class Begun(msgspec.Struct, frozen=True):
    """A conversation whose final message is to be continued."""

    messages: list[dict[str, Any]]
    """With the mark behind the text that is continued."""
    text: str
    """That text."""

    @classmethod
    def of(cls, messages: list[dict[str, Any]], asked: bool | str, source: str) -> Begun:
        """Mark the final message's `content`, or the key that `asked` names, for the template `source`.

        Raises InputError where there is no such text, or the template does not read it.
        """
        key = asked if isinstance(asked, str) else "content"
        final = dict(messages[-1]) if messages else {}
        held = final.get(key)
        if held is None:
            raise InputError(f"continue_final_message: the final message has no {key} to continue; write one")
        keys = [name for name in REASONING if final.get(name) == held] if key in REASONING else [key]
        if not any(name in source for name in keys):
            raise InputError(
                f"continue_final_message is {key!r}, which the chat template never reads; name another key"
            )
        text = held
        if isinstance(held, list):
            blocks = [dict(block) if isinstance(block, Mapping) else block for block in held]
            block = next((b for b in reversed(blocks) if isinstance(b, dict) and isinstance(b.get("text"), str)), None)
            text = None if block is None else block["text"]
            if block is not None:
                block["text"] += _MARK
                final[key] = blocks
        if not isinstance(text, str):
            raise InputError(f"continue_final_message: the final message's {key} is no text, so it cannot be continued")
        if isinstance(held, str):
            final |= dict.fromkeys(keys, text + _MARK)
        return cls([*messages[:-1], final], text)

    def cut(self, rendered: str) -> str:
        """What was rendered up to the mark. Raises InputError where the template left the message out."""
        place = rendered.rfind(_MARK.strip())
        if place < 0 or self.text.strip() not in rendered:
            raise InputError(
                "continue_final_message: the final message does not appear in what the chat template makes of the "
                "conversation, so it cannot be continued there"
            )
        begun = rendered[:place]
        return begun if rendered.startswith(_MARK, place) else begun.rstrip()
