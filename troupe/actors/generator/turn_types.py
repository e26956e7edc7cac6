"""Stands in until the decoding engine has these itself."""

import msgspec

from troupe.messages import FinishReason


class TurnRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    row: tuple[int, ...]
    ids: tuple[int, ...]
    start: int
    room: int
    fresh: bool
    policy: int = 0


class CompletedTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    row: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    sampling_log_probs: tuple[float, ...]
    versions: tuple[int, ...]
    finish_reason: FinishReason
    experts: bytes = b""
