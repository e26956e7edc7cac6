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
    "CREATE TABLE IF NOT EXISTS evaluation_conditions (version INTEGER, name TEXT, conditions TEXT, asked TEXT,"
    " PRIMARY KEY (version, name))",
)
"""One row a version and set; a row of a set, whatever the version; a sample; and the conditions of a version and set,
with the name that its rows have in `evaluation_rows` (`asked`), another one for other rows. `metrics`, `prompt`,
`columns`, `scores` and `conditions` are JSON, `name` is that of the set."""
EVALUATIONS_MADE_AGAIN = (
    ("evaluations", "version"),
    ("evaluation_samples", "version"),
    ("evaluation_conditions", "version"),
)
_ADD = "INSERT OR REPLACE INTO evaluations VALUES (?,?,(SELECT max(start) FROM starts),?,?,?)"
_ADD_ROW = "INSERT OR REPLACE INTO evaluation_rows VALUES (?,?,?,?)"
_ADD_SAMPLE = "INSERT OR REPLACE INTO evaluation_samples VALUES (?,?,?,?,?,?,?,?,?)"
_ADD_CONDITIONS = "INSERT OR REPLACE INTO evaluation_conditions VALUES (?,?,?,?)"
_JOINED = " LEFT JOIN evaluation_conditions c ON c.version = e.version AND c.name = e.name"
_ASKED = "SELECT asked FROM evaluation_conditions WHERE version = ? AND name = ?"
_SAMPLES = (
    "SELECT s.row, r.prompt, r.columns, s.text, s.tokens, s.finish_reason, s.score, s.scores FROM evaluation_samples s"
    " LEFT JOIN evaluation_rows r ON r.name = ? AND r.row = s.row"
    " WHERE s.version = ? AND s.name = ? ORDER BY s.row, s.sample"
)

_Statement = tuple[str, tuple[Any, ...]]


def evaluation_statements(evaluated: Evaluated, unix_s: float) -> list[_Statement]:
    """What adds an evaluation; one of the same version and set is replaced."""
    version, name = evaluated.version, safe_text(evaluated.name)
    statements: list[_Statement] = [
        (_ADD, (version, name, unix_s, evaluated.seconds, json_text(dict(evaluated.metrics))))
    ]
    asked = name
    if evaluated.conditions:
        asked = safe_text(f"{name} {evaluated.conditions.get('rows', '')}")
        statements.append((_ADD_CONDITIONS, (version, name, json_text(dict(evaluated.conditions)), asked)))
    for row in evaluated.rows:
        statements.append((_ADD_ROW, (asked, row.row, json_text(row.prompt), json_text(dict(row.columns)))))
        for number, sample in enumerate(row.samples):
            told = (safe_text(sample.text), sample.tokens, safe_text(sample.finish_reason), sample.score)
            statements.append((_ADD_SAMPLE, (version, name, row.row, number, *told, json_text(dict(sample.scores)))))
    return statements


def stored_evaluations(connection: sqlite3.Connection) -> list[Evaluated]:
    """Every evaluation without its rows, by version, then as the sets were evaluated; none of a store of an older
    Troupe."""
    if not _has(connection, "evaluations"):
        return []
    conditions, joined = ("c.conditions", _JOINED) if _has(connection, "evaluation_conditions") else ("NULL", "")
    rows = connection.execute(
        f"SELECT e.version, e.name, e.seconds, e.metrics, {conditions} FROM evaluations e{joined}"
        " ORDER BY e.version, e.time, e.rowid"
    )
    return [
        Evaluated(
            version=version,
            name=name,
            seconds=seconds,
            metrics=_finite(metrics),
            rows=(),
            conditions={} if told is None else msgspec.json.decode(told, type=dict[str, str]),
        )
        for version, name, seconds, metrics, told in rows
    ]


def stored_rows(connection: sqlite3.Connection, version: int, name: str) -> tuple[EvaluatedRow, ...]:
    """The rows of one evaluation with their samples, in order; none where it is not stored."""
    if not _has(connection, "evaluations"):
        return ()
    asked = (
        connection.execute(_ASKED, (version, name)).fetchone() if _has(connection, "evaluation_conditions") else None
    )
    asked_as = name if asked is None else asked[0]
    found: dict[int, EvaluatedRow] = {}
    for row, prompt, columns, text, tokens, finish_reason, score, scores in connection.execute(
        _SAMPLES, (asked_as, version, name)
    ):
        sample = EvaluatedSample(
            text=text,
            tokens=tokens,
            finish_reason=finish_reason,
            score=score,
            scores=msgspec.json.decode(scores, type=dict[str, float | None]),
        )
        if row not in found:
            prompted, known = (None if told is None else msgspec.json.decode(told) for told in (prompt, columns))
            found[row] = EvaluatedRow(row=row, prompt=prompted, columns=known or {}, samples=())
        found[row] = msgspec.structs.replace(found[row], samples=(*found[row].samples, sample))
    return tuple(found.values())


def _has(connection: sqlite3.Connection, table: str) -> bool:
    found = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    return bool(found[0])


def _finite(metrics: str) -> dict[str, float]:
    figures = msgspec.json.decode(metrics, type=dict[str, float | None])
    return {name: value for name, value in figures.items() if value is not None}
