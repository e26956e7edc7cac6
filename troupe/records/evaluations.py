"""`evaluations.jsonl`: what versions of a run's policy came to on each set, a line each; written whole every time."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from troupe.messages import Evaluated
from troupe.records.layout import EVALUATIONS
from troupe.runtime.files import drafted


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    name: str
    seconds: float = 0.0
    metrics: dict[str, float]


def write_evaluations(run: Path, evaluations: Iterable[Evaluated]) -> None:
    """Put all into the file of a run, whole and on the disk or not at all. OSError where the disk fails."""
    with drafted(run / EVALUATIONS, durable=True) as draft:
        lines = [_Line(version=e.version, name=e.name, seconds=e.seconds, metrics=dict(e.metrics)) for e in evaluations]
        draft.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def cut_evaluations(run: Path, kept: Sequence[Evaluated]) -> None:
    """Leave only these in the file of a run: the others are of steps that are made again, and might be taken for those
    of the new ones. OSError where the disk fails."""
    if len(read_evaluations(run)) != len(kept):
        write_evaluations(run, kept)


def read_evaluations(run: Path) -> tuple[Evaluated, ...]:
    """What the file of a run has, without rows, in the order of versions; nothing where it is missing or harmed."""
    try:
        text = (run / EVALUATIONS).read_bytes()
        lines = [msgspec.json.decode(line, type=_Line) for line in text.splitlines()]
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ()
    return tuple(
        Evaluated(version=line.version, name=line.name, metrics=line.metrics, rows=(), seconds=line.seconds)
        for line in lines
    )
