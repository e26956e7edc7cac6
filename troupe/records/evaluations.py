"""`evaluations.jsonl`: what versions of a run's policy came to on each set, a line each; written whole every time."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from troupe.messages import Evaluated
from troupe.records.layout import EVALUATIONS
from troupe.runtime.files import drafted


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    version: int
    name: str
    seconds: float = 0.0
    metrics: dict[str, float]
    conditions: dict[str, str] = {}

    @classmethod
    def of(cls, evaluated: Evaluated) -> "_Line":
        told = {name: getattr(evaluated, name) for name in cls.__struct_fields__}
        return cls(**told)

    @property
    def evaluated(self) -> Evaluated:
        return Evaluated(rows=(), **msgspec.structs.asdict(self))


def write_evaluations(run: Path, evaluations: Iterable[Evaluated]) -> None:
    """Put all into the file of a run, whole and on the disk or not at all. OSError where the disk fails."""
    with drafted(run / EVALUATIONS, durable=True) as draft:
        draft.write_bytes(b"".join(msgspec.json.encode(_Line.of(each)) + b"\n" for each in evaluations))


def cut_evaluations(run: Path, kept: Sequence[Evaluated]) -> None:
    """Leave only these in the file of a run: the others are of steps that are made again, and might be taken for those
    of the new ones. OSError where the disk fails."""
    if len(read_evaluations(run)) != len(kept):
        write_evaluations(run, kept)


def read_evaluations(run: Path) -> tuple[Evaluated, ...]:
    """What the file of a run has, without rows, in the order of versions; nothing where it is missing or harmed."""
    try:
        text = (run / EVALUATIONS).read_bytes()
        return tuple(msgspec.json.decode(line, type=_Line).evaluated for line in text.splitlines())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ()
