"""Writing `unfinished.msgpack`: the groups under way when a checkpoint was cut."""

from __future__ import annotations

from typing import Any

import msgspec

from troupe.messages import ScoredGroup, Unfinished

_ENCODER = msgspec.msgpack.Encoder(enc_hook=repr)


class _Remarks(msgspec.Struct):
    """What rewards logged about a group, as it is read again."""

    extra: dict[str, tuple[Any, ...]] = {}
    logged: dict[str, float] = {}


def encode_unfinished(unfinished: Unfinished) -> bytes:
    """As msgpack. Prompts go without text and columns: the dataset can say them once more, and they may hold anything.

    What rewards logged beside the scores comes back as far as msgpack has such a thing.
    """
    fields = {name: getattr(unfinished, name) for name in unfinished.__struct_fields__}
    for name in ("scored", "collected"):  # one by one, so that other threads get a turn
        fields[name] = [msgspec.Raw(_encode_group(group)) for group in fields[name]]
    return _ENCODER.encode(fields)


def _encode_group(group: ScoredGroup) -> bytes:
    replace = msgspec.structs.replace
    prompt = replace(group.group.prompt, prompt="", columns={})
    bare = replace(group, group=replace(group.group, prompt=prompt), extra={}, logged={})
    for remarks in ({"extra": group.extra, "logged": group.logged}, {"logged": group.logged}):
        try:
            plain = msgspec.msgpack.decode(_ENCODER.encode(remarks), type=_Remarks)
            return _ENCODER.encode(replace(bare, extra=plain.extra, logged=plain.logged))
        except Exception:  # whatever an object does when it is looked at: remarks are not worth a checkpoint
            continue
    return _ENCODER.encode(bare)
