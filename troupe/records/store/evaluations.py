"""Evaluations in run.sqlite: what each version of the policy came to on each set, and every completion of them."""

import sqlite3
from typing import Any

import msgspec

from troupe.messages import Evaluated, EvaluatedRow, EvaluatedSample
from troupe.records.store.text import json_text, safe_text

EVALUATIONS = (
    "CREATE TABLE IF NOT EXISTS evaluations (version INTEGER, name TEXT, start INTEGER, time REAL, seconds REAL,"
    " metrics TEXT, PRIMARY KEY (version, name))",
    "CREATE TABLE IF NOT EXISTS evaluation_rows (name TEXT, row INTEGER, prompt TEXT, columns TEXT,"
    " PRIMARY KEY (name, row))",
    "CREATE TABLE IF NOT EXISTS evaluation_samples (version INTEGER, name TEXT, row INTEGER, sample INTEGER, text TEXT,"
    " tokens INTEGER, finish_reason TEXT, score REAL, scores TEXT, PRIMARY KEY (version, name, row, sample))",
)
"""One row a version and set; a row of a set, whatever the version; and a sample. `metrics`, `prompt`, `columns` and
`scores` are JSON, `name` is that of the set."""
EVALUATIONS_MADE_AGAIN = (("evaluations", "version"), ("evaluation_samples", "version"))
_ADD = "INSERT OR REPLACE INTO evaluations VALUES (?,?,(SELECT max(start) FROM starts),?,?,?)"
_ADD_ROW = "INSERT OR REPLACE INTO evaluation_rows VALUES (?,?,?,?)"
_ADD_SAMPLE = "INSERT OR REPLACE INTO evaluation_samples VALUES (?,?,?,?,?,?,?,?,?)"
_SAMPLES = (
    "SELECT s.row, r.prompt, r.columns, s.text, s.tokens, s.finish_reason, s.score, s.scores FROM evaluation_samples s"
    " LEFT JOIN evaluation_rows r ON r.name = s.name AND r.row = s.row"
    " WHERE s.version = ? AND s.name = ? ORDER BY s.row, s.sample"
)

_Statement = tuple[str, tuple[Any, ...]]


def evaluation_statements(evaluated: Evaluated, unix_s: float) -> list[_Statement]:
    """What adds an evaluation; one of the same version and set is replaced."""
    version, name = evaluated.version, safe_text(evaluated.name)
    statements: list[_Statement] = [
        (_ADD, (version, name, unix_s, evaluated.seconds, json_text(dict(evaluated.metrics))))
    ]
    for row in evaluated.rows:
        statements.append((_ADD_ROW, (name, row.row, json_text(row.prompt), json_text(dict(row.columns)))))
        for number, sample in enumerate(row.samples):
            told = (safe_text(sample.text), sample.tokens, safe_text(sample.finish_reason), sample.score)
            statements.append((_ADD_SAMPLE, (version, name, row.row, number, *told, json_text(dict(sample.scores)))))
    return statements


def stored_evaluations(connection: sqlite3.Connection) -> list[Evaluated]:
    """Every evaluation without its rows, by version, then as the sets were evaluated; none of a store of an older
    Troupe."""
    if not _has_evaluations(connection):
        return []
    rows = connection.execute("SELECT version, name, seconds, metrics FROM evaluations ORDER BY version, time, rowid")
    return [
        Evaluated(version=version, name=name, seconds=seconds, metrics=_finite(metrics), rows=())
        for version, name, seconds, metrics in rows
    ]


def stored_rows(connection: sqlite3.Connection, version: int, name: str) -> tuple[EvaluatedRow, ...]:
    """The rows of one evaluation with their samples, in order; none where it is not stored."""
    if not _has_evaluations(connection):
        return ()
    found: dict[int, EvaluatedRow] = {}
    for row, prompt, columns, text, tokens, finish_reason, score, scores in connection.execute(
        _SAMPLES, (version, name)
    ):
        sample = EvaluatedSample(
            text=text,
            tokens=tokens,
            finish_reason=finish_reason,
            score=score,
            scores=msgspec.json.decode(scores, type=dict[str, float | None]),
        )
        if row not in found:
            asked, known = (None if told is None else msgspec.json.decode(told) for told in (prompt, columns))
            found[row] = EvaluatedRow(row=row, prompt=asked, columns=known or {}, samples=())
        found[row] = msgspec.structs.replace(found[row], samples=(*found[row].samples, sample))
    return tuple(found.values())


def _has_evaluations(connection: sqlite3.Connection) -> bool:
    found = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'evaluations'").fetchone()
    return bool(found[0])


def _finite(metrics: str) -> dict[str, float]:
    figures = msgspec.json.decode(metrics, type=dict[str, float | None])
    return {name: value for name, value in figures.items() if value is not None}
