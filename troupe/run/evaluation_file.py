"""Completions of an evaluation in a file that an interrupted one goes on with: a line that says what it is of, and then
one line a completion."""

import fcntl
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from troupe.actors.evaluator.decoding import pieces
from troupe.dataset import PromptDataset
from troupe.errors import OutputError
from troupe.messages import EvaluatedRow, EvaluatedSample
from troupe.policy.load import resolve_base
from troupe.policy.model_files import model_fingerprint
from troupe.records.store.text import json_text, safe_text
from troupe.rewards.identity import reward_identity
from troupe.run.evaluate import Questions

_LONGEST = 60
_OF_THE_MACHINE = (
    "run",
    "processes",
    "concurrency",
    "start_timeout_s",
    "breaker_failures",
    "breaker_max_wait_s",
)
"""Keys of [environment] that say how it is run, and not what episodes come to."""


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a completion's line; prompt and columns stand there, too."""

    model: str
    row: int
    sample: int
    text: str
    tokens: int
    finish_reason: str
    score: float | None
    scores: dict[str, float | None]


class EvaluationFile:
    """A JSON Lines file of every completion, in the order of models, rows and samples. `with` it is open, and locked.

    Lines are written whole, those of the rows that were completed together at once. What a kill has cut is taken back,
    and made again.
    """

    def __init__(self, path: Path, models: Sequence[str], questions: Questions, identity: Mapping[str, Any]) -> None:
        """`models`: their names in the lines. `identity`: what the evaluation is of, as `identity_of` tells it."""
        self._path, self._models, self._questions, self._identity = path, models, questions, identity
        self._file: FileIO | None = None
        self.done: dict[str, list[EvaluatedRow]] = {}
        """Model → its first rows, as far as they are there."""

    def __enter__(self) -> "EvaluationFile":
        """OutputError where the file cannot be written, is in use, or is of something else."""
        with ExitStack() as begun:
            try:
                if self._path.exists() and not self._path.is_file():
                    raise OutputError(f"{self._path}: is no file; give one")
                file = FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
                self._file = begun.enter_context(file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._go_on(file)
            except BlockingIOError:
                raise OutputError(f"{self._path}: another evaluation writes it; give another file") from None
            except OSError as error:
                reason = error.strerror or error
                raise OutputError(f"{self._path}: cannot be written: {reason}; give another file") from None
            begun.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, model: str, rows: Sequence[EvaluatedRow]) -> None:
        """Write the completions of some more rows. OutputError where that fails; what was written before stays."""
        lines = bytearray()
        for row in rows:
            asked = {"prompt": row.prompt, "columns": dict(row.columns)}
            for number, sample in enumerate(row.samples):
                told = {"model": model, "row": row.row, "sample": number, **msgspec.structs.asdict(sample), **asked}
                lines += json_text(told | {"text": safe_text(sample.text)}).encode() + b"\n"
        self._write(lines)

    def _go_on(self, file: FileIO) -> None:
        whole, offset = file.readall(), 0
        lines = [line for line in whole.splitlines(keepends=True) if line.endswith(b"\n")]
        if not lines and (not whole or whole.startswith(b'{"evaluation":')):
            file.truncate(0)
            file.seek(0)
            self._write(json_text({"evaluation": self._identity}).encode() + b"\n")
            return
        self._check(lines[0] if lines else whole)
        offset = len(lines[0])
        lines, size = lines[1:], self._questions.settings.num_samples
        for model in self._models:
            rows = self._whole_rows(model, lines)
            self.done[model] = rows
            offset += sum(map(len, lines[: len(rows) * size]))
            lines = lines[len(rows) * size :]
            if len(rows) < len(self._questions.rows):
                break
        file.truncate(offset)
        file.seek(offset)

    def _check(self, line: bytes) -> None:
        try:
            found = msgspec.json.decode(line)["evaluation"]
            differing = [key for key in {**found, **self._identity} if found.get(key) != self._identity.get(key)]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise OutputError(f"{self._path}: holds something else than an evaluation; give another file") from None
        if differing:
            key = differing[0]
            was, now = (_shortened(json_text(one.get(key))) for one in (found, self._identity))
            raise OutputError(
                f"{self._path}: holds an evaluation with other {', '.join(differing)} ({key} {was}, not {now}); give "
                "another file, or remove it"
            )

    def _whole_rows(self, model: str, lines: Sequence[bytes]) -> list[EvaluatedRow]:
        """The first rows of a model whose lines are all there, up to the end of a piece."""
        dataset, size, rows = self._questions.rows, self._questions.settings.num_samples, list[EvaluatedRow]()
        for row in range(min(len(dataset), len(lines) // size)):
            samples = _samples_of(model, row, lines[row * size : (row + 1) * size])
            if samples is None:
                break
            asked = dataset[row]
            rows.append(EvaluatedRow(row=row, prompt=asked.prompt, columns=asked.columns, samples=samples))
        ends = [places.stop for places in pieces(len(dataset), size) if places.stop <= len(rows)]
        return rows[: max(ends, default=0)]

    def _write(self, data: bytes | bytearray) -> None:
        assert self._file is not None
        left = memoryview(bytes(data))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot be written any more: {error.strerror or error}; make room, and give the same "
                "command again, which goes on"
            ) from None


def identity_of(models: Sequence[tuple[str, Path | None]], questions: Questions, dtype: str | None) -> dict[str, Any]:
    """What an evaluation is of, so that one of something else is not taken for it. `models`: each with the adapter that
    lies beside it. Raises ModelError."""
    return {
        "models": [_model_identity(path, adapter) for path, adapter in models],
        "rows": _rows_identity(questions.rows),
        "samples": questions.settings.num_samples,
        "rewards": [reward_identity(reward) for reward in questions.rewards],
        "seed": questions.seed,
        "dtype": dtype,
        "generation": _told(questions.generation, "num_generations"),
        "data": _told(questions.data, "path", "eval_path"),
        "scoring": {"weights": questions.scoring.weights},
        "environment": None if questions.world is None else _told(questions.world.config, *_OF_THE_MACHINE),
    }


def _model_identity(path: str, adapter: Path | None) -> str:
    located = resolve_base(path, adapter)
    digest = hashlib.sha256(model_fingerprint(located.folder).encode())
    if located.adapter is not None:
        for file in sorted(located.adapter.glob("adapter*")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _rows_identity(rows: PromptDataset) -> str:
    return f"{len(rows)} rows, {rows.fingerprint[:16]}"


def _told(settings: msgspec.Struct, *without: str) -> dict[str, Any]:
    """Settings as they come out of JSON."""
    told: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    return {key: value for key, value in told.items() if key not in without}


def _samples_of(model: str, row: int, lines: Sequence[bytes]) -> tuple[EvaluatedSample, ...] | None:
    """The samples of a row; None where the lines are not its."""
    samples = []
    for number, line in enumerate(lines):
        try:
            found = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if (found.model, found.row, found.sample) != (model, row, number):
            return None
        fields = {name: getattr(found, name) for name in EvaluatedSample.__struct_fields__}
        samples.append(EvaluatedSample(**fields))
    return tuple(samples)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
