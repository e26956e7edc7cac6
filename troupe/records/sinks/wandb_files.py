"""What wandb has on the disk of a run that is tracked offline.

Its process writes whole blocks only and ends with ours, so after a kill the newest steps that it was told may not be
there. The file is a log of records in the form of LevelDB: blocks of 32 KiB after a header of 7 bytes that counts as
part of the first; a record is one or several pieces, each with a checksum, a length and a kind; none crosses a block.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 15
_HEADER = 7
_WHOLE, _FIRST, _LAST = 1, 2, 4  # kinds of pieces; 3 is one between
_BLOCKS_AT_ONCE = 32


def newest_offline_step(folder: Path, run_id: str) -> int | None:
    """The newest step in the logs of a run in its folder; None where there are none, or they cannot be read."""
    try:
        logs = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
        return max((_newest_step(log) for log in logs), default=None)
    except Exception:  # the format is wandb's own affair, and may change
        return None


def records(log: Path, first_block: int = 0) -> Iterator[Any]:
    """The records that begin in a block or after it, as wandb's messages. A last one that was cut is left out."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    with log.open("rb") as file:
        file.seek(first_block * _BLOCK)
        data = file.read()
    position, parts, begun = 0 if first_block else _HEADER, b"", False
    while position + _HEADER <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEADER : position + _HEADER + length]
        if not kind or len(piece) < length:
            return
        position += _HEADER + length
        if kind in (_WHOLE, _FIRST):
            parts, begun = b"", True
        parts += piece
        if kind in (_WHOLE, _LAST) and begun:
            yield record.FromString(parts)
            begun = False


def _newest_step(log: Path) -> int:
    """Looked for from the end."""
    block = -(-log.stat().st_size // _BLOCK)
    while block > 0:
        block = max(0, block - _BLOCKS_AT_ONCE)
        steps: list[int] = [r.history.step.num for r in records(log, block) if r.WhichOneof("record_type") == "history"]
        if steps:
            return max(steps)
    return 0
