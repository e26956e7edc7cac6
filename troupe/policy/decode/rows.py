"""Rows of a decode on the host's side: what each has sampled so far, where it lies in the batch, and its dice."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from troupe.policy.decode.requests import Completion, FinishReason
from troupe.policy.decode.stopping import StopWatch

NOISE_BLOCK = 16
"""Uniform numbers that one hash of 64 bytes gives."""


class Row:
    """One sample while it grows."""

    def __init__(self, request: int, key: bytes, limit: int, watch: StopWatch, policy: int = 0, start: int = 0) -> None:
        """`limit`: most tokens it may have; `start`: how many its random stream has given already."""
        self.request = request
        self.policy = policy
        self.key = key
        self.limit = limit
        self.watch = watch
        self.start = start
        self.begun = 0
        """Tokens that it had when its batch was begun."""
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.sampling_log_probs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._experts = bytearray()

    def push(
        self, token_id: int, log_prob: float, sampling_log_prob: float, version: int, experts: bytes = b""
    ) -> bool:
        """Take the next token → whether it is the last. `experts`: those of the token before."""
        self.token_ids.append(token_id)
        self._experts += experts
        self.log_probs.append(log_prob)
        self.sampling_log_probs.append(sampling_log_prob)
        self.versions.append(version)
        self.finish_reason = self.watch.push(token_id)
        if self.finish_reason is None and len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        return self.finish_reason is not None

    @property
    def made(self) -> int:
        """Tokens that it has since its batch was begun."""
        return len(self.token_ids) - self.begun

    @property
    def experts(self) -> bytes:
        """Where recorded, those of its tokens but the last."""
        return bytes(self._experts)

    def take_experts(self) -> bytes:
        """The same; from now on only those of later tokens are told."""
        taken, self._experts = self.experts, bytearray()
        return taken

    def completion(self) -> Completion:
        """What it came to, when it has ended."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            sampling_log_probs=tuple(self.sampling_log_probs),
            versions=tuple(self.versions),
            finish_reason=self.finish_reason,
            experts=self.experts,
        )


def arrange(slots: list[list[Row]]) -> list[list[Row]]:
    """Lay unfinished rows out anew: slots of one width, each with rows of one request, as few rows as possible.

    There are never more slots than before, so prompts never take more memory. A slot that lacks rows is filled up
    with copies of its last. Without unfinished rows, or without gain, the result is what was given.
    """
    live: dict[int, list[Row]] = {}
    for slot in slots:
        for row in dict.fromkeys(slot):
            if row.finish_reason is None:
                live.setdefault(row.request, []).append(row)
    best, best_width = len(slots) * len(slots[0]), 0
    for width in range(max(map(len, live.values()), default=0), 0, -1):
        count = sum(-(-len(rows) // width) for rows in live.values())
        if count <= len(slots) and count * width < best:
            best, best_width = count * width, width
    if best_width == 0:
        return slots
    laid = [rows[i : i + best_width] for rows in live.values() for i in range(0, len(rows), best_width)]
    return [slot + slot[-1:] * (best_width - len(slot)) for slot in laid]


def row_key(request_key: Sequence[int], sample: int) -> bytes:
    """What names the random stream of one sample: 16 bytes, distinct for distinct (request key, sample)."""
    text = ",".join(map(str, (*request_key, sample)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def noise_block(keys: Sequence[bytes], block: int, purpose: bytes = b"") -> mx.array:
    """Uniform numbers k/2²⁴ in [0, 1) for token positions block·16 … block·16+15 of rows → float32 (rows, 16).

    Other purposes (at most 16 bytes) give independent numbers.
    """
    return noise_from(keys, [block * NOISE_BLOCK] * len(keys), purpose)


def noise_from(keys: Sequence[bytes], starts: Sequence[int], purpose: bytes = b"") -> mx.array:
    """The same for sixteen positions of each row, from one of its own on."""
    taken = b"".join(_numbers(key, start, purpose) for key, start in zip(keys, starts, strict=True))
    numbers = mx.array(cast(Any, memoryview(array("I", taken))))  # by the buffer protocol, as uint32
    return (numbers >> 8).astype(mx.float32).reshape(len(keys), NOISE_BLOCK) * 2.0**-24


def _numbers(key: bytes, start: int, purpose: bytes) -> bytes:
    """Sixteen numbers of 4 bytes, of one block or of two that follow each other."""
    block, skipped = divmod(start, NOISE_BLOCK)
    blocks = range(block, block + (2 if skipped else 1))
    data = b"".join(hashlib.blake2b(n.to_bytes(8, "little"), key=key, person=purpose).digest() for n in blocks)
    return data[4 * skipped : 4 * (skipped + NOISE_BLOCK)]
