"""Dropout of what an adapter sees while it learns (Srivastava et al. 2014): drawn by a hash of where a number stands.

Which numbers are 0 follows from the run's seed, the pass over the batch, the row's slot (of a prompt's tokens: the
prompt and the step), the place of the token, the matrix and the column: not from how a batch is cut, where it is
computed, or in which order. Matrices that have the same input lose the same of it.

The hash is the end of MurmurHash3, over 32 bits.
"""

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.network.elementwise import compiled
from troupe.policy.network.linear import JOINED
from troupe.policy.network.packing import distinct_prompts

RowKeys = Sequence[tuple[int, int]]
"""Of each row two numbers below 2³²: what its prompt's tokens are drawn by, and its completion's."""

_GOLDEN = 0x9E3779B9
"""2³² over the golden ratio: neighbours get far apart."""


class Dropout(NamedTuple):
    """What is dropped of N tokens."""

    rate: float
    """Part of the numbers that are 0; the others are divided by 1 − rate."""
    keys: mx.array
    """(N,) uint32."""

    def of(self, module: str, x: mx.array) -> mx.array:
        """x (1, N, D), the input of a matrix, without what is dropped. Linear, and its own transpose."""
        least = mx.array(min(round(self.rate * 2**32), 2**32 - 1), mx.uint32)
        salt = mx.array(zlib.crc32(_input_of(module).encode()), mx.uint32)
        kept = mx.array(1.0 / (1.0 - self.rate), x.dtype)
        dropped: mx.array = compiled(_dropped, x.shape)(
            x, self.keys[:, None], mx.arange(x.shape[-1]), salt, least, kept
        )
        return dropped


def _dropped(
    x: mx.array, keys: mx.array, columns: mx.array, salt: mx.array, least: mx.array, kept: mx.array
) -> mx.array:
    h = mixed_bits(keys + salt) + columns.astype(mx.uint32) * mx.array(_GOLDEN, mx.uint32)
    return mx.where(mixed_bits(h) >= least, x * kept, mx.array(0, x.dtype))


def mixed_bits(h: mx.array) -> mx.array:
    """Numbers uint32 → numbers of which each bit depends on all bits."""
    h = (h ^ (h >> 16)) * mx.array(0x85EBCA6B, mx.uint32)
    h = (h ^ (h >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    return h ^ (h >> 16)


def _input_of(module: str) -> str:
    """A name for the input of a matrix: that of the first with the same."""
    for whole, parts in JOINED.items():
        for name in (whole, *parts):
            if module.endswith(f".{name}"):
                return module.removesuffix(name) + parts[0]
    return module


def token_keys(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rows: RowKeys,
    *,
    seed: int,
    pass_number: int = 0,
) -> mx.array:
    """One key a token, as `Packing` lays them out, (N,) uint32; others for every seed and pass over the batch."""
    starts: list[int] = []
    lengths: list[int] = []
    _, sizes = distinct_prompts(prompts)
    row = 0
    for size in sizes:
        starts.append(rows[row][0])
        lengths.append(len(prompts[row]))
        row += size
    starts += [own for _, own in rows]
    lengths += [max(0, len(completion) - 1) for completion in completions]
    # no CRC: those of two seeds differ as those of two rows may, which would then swap what they lose
    salt = int.from_bytes(hashlib.sha256(f"{seed}:{pass_number}".encode()).digest()[:4], "little")
    golden = mx.array(_GOLDEN, mx.uint32)
    parts = [
        mixed_bits(mx.arange(length).astype(mx.uint32) * golden + mx.array(start ^ salt, mx.uint32))
        for start, length in zip(starts, lengths, strict=True)
    ]
    return mx.concatenate(parts)


def prompt_key(prompt_ids: Sequence[int], step: int) -> int:
    """What a prompt's tokens are drawn by. Equal prompts of a step have the same: whether they are neighbours, and
    computed as one, depends on how a batch is cut."""
    return zlib.crc32(f"{step}:{','.join(map(str, prompt_ids))}".encode())


def completion_key(gid: int, sample: int, row: int = 0) -> int:
    """What the tokens of a completion are drawn by, or those of one of its rows."""
    return zlib.crc32((f"{gid}.{sample}.{row}" if row else f"{gid}.{sample}").encode())
