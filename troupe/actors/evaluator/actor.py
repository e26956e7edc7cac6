"""Evaluator: has versions of the policy answer rows that it is not trained on, while training goes on."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import anyio
import msgspec

from troupe.actors.evaluator.decoding import Decoder, EvalSet, RowPrompts
from troupe.actors.evaluator.ledger import EvaluationLedger
from troupe.actors.evaluator.rows import evaluated_row
from troupe.actors.generator.parts import PartAsked
from troupe.errors import RewardError
from troupe.messages import Evaluate, Evaluated, EvaluatedRow, Incident, Prompt, RolloutGroup
from troupe.messages.evaluations import row_of
from troupe.rewards import GroupScores
from troupe.rewards.estimates import figures_of
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class SetWork(NamedTuple):
    """A set, its rows as prompts, and who completes them."""

    of: EvalSet
    prompts: RowPrompts
    decoder: Decoder
    conditions: Callable[[], Mapping[str, str]] = dict
    """Those of now, as `Evaluated` has them."""


class Evaluator(Actor):
    """Receives Evaluate; sends Evaluated, one a set, and PartAsked where the generator's crew decodes.

    Pieces of the rows are decoded while the one before is scored, in order. A set is done with when its result was told
    to the sinks, has been written by those that last, and stands in the ledger's file; so who goes on after a kill
    neither repeats nor loses one. Scores that cannot be had are missing, which is an incident and never a 0.
    """

    name = "evaluator"

    def __init__(
        self,
        inbox: Mailbox,
        evaluated: Channel[Evaluated],
        *,
        sets: Callable[[], Sequence[SetWork]],
        ledger: EvaluationLedger,
        written: Callable[[], Awaitable[object]],
        record: Callable[[], Awaitable[None]],
        aside: Callable[[Callable[[], dict[str, float]]], Awaitable[dict[str, float]]] = anyio.to_thread.run_sync,
        parts: Channel[PartAsked] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`sets`: makes them, once. `written`: comes back when the sinks have written what they were given.
        `record`: has the ledger's file written; OSError where the disk fails. `aside`: counts figures while the loop
        goes on. `parts`: what decoders ask the crew by."""
        super().__init__(inbox, [evaluated] if parts is None else [evaluated, parts], report)
        self._evaluated = evaluated
        self._sets = sets()
        self._ledger = ledger
        self._written, self._record, self._aside = written, record, aside
        self._doing = ""
        self._done = self._total = 0

    @property
    def activity(self) -> str:
        """What is evaluated."""
        return self._doing

    @property
    def progress(self) -> str:
        """How many rows are completed."""
        return f"rows {self._done:,} / {self._total:,}" if self._doing else ""

    async def handle(self, message: Evaluate) -> None:
        """Evaluate every set that has no result of the version yet."""
        lacks = self._ledger.lacks(message.version)
        for work in self._sets:
            if work.of.name in lacks:
                with self.report.span(f"evaluate {work.of.name}", step=message.version):
                    await self._evaluate(work, message)
        self._ledger.end(message.version)

    async def _evaluate(self, work: SetWork, message: Evaluate) -> None:
        began_s, of, conditions = time.perf_counter(), work.of, work.conditions()
        self._doing = f"evaluating {of.name} of step {message.version:,}"
        self._done, self._total = 0, len(of.dataset)
        try:
            rows = await self._answer(work, message)
        finally:
            self._doing = ""
        counting = partial(figures_of, of.name, rows, passes_from=of.settings.passes_from)
        figures = await self._aside(counting)  # seconds where there are tens of thousands of long texts
        result = Evaluated(
            version=message.version,
            name=of.name,
            metrics=figures,
            rows=tuple(rows),
            seconds=time.perf_counter() - began_s,
            conditions=conditions,
        )
        await self._evaluated.send(result)
        await self._evaluated.settled()
        await self._written()
        self._ledger.add(result)
        try:
            await self._record()
        except OSError as error:
            what = f"the evaluation of {of.name} at step {message.version} could not be recorded: {error}"
            await self._tell("evaluation_unrecorded", f"{what}; whoever resumes from before makes it again")

    async def _answer(self, work: SetWork, message: Evaluate) -> list[EvaluatedRow]:
        """All rows, completed and scored."""
        rows: list[EvaluatedRow] = []
        at_once = work.decoder.at_once
        room, decoding = anyio.Semaphore(at_once + 1), anyio.Semaphore(at_once)
        before = anyio.Event()  # the piece before is scored
        before.set()

        async def answer(piece: list[Prompt], before: anyio.Event, scored: anyio.Event) -> None:
            try:
                groups = await work.decoder.complete(piece, message, self._count)
            finally:
                decoding.release()
            await before.wait()
            await self._score(work, groups, rows, message.version)
            scored.set()
            room.release()

        async with anyio.create_task_group() as tasks:
            for piece in work.prompts.pieces(message.version):
                await room.acquire()
                await decoding.acquire()
                scored = anyio.Event()
                tasks.start_soon(answer, piece, before, scored)
                before = scored
        return rows

    async def _score(self, work: SetWork, groups: list[RolloutGroup], rows: list[EvaluatedRow], version: int) -> None:
        results: Sequence[GroupScores | None] = [None] * len(groups)
        with self.report.span("score", step=version):
            try:
                results = await work.of.rewards.score_groups(groups, tell=partial(self._tell_of, work.of))
            except RewardError as error:
                if not self._ledger.results:  # as bad as in the run's first step
                    raise
                await self._tell("evaluation_failed", f"evaluation of {work.of.name}: {error}; its scores are missing")
        work.decoder.forget(groups)
        rows += [evaluated_row(group, result) for group, result in zip(groups, results, strict=True)]

    def _count(self) -> None:
        self._done += 1

    def _tell_of(self, of: EvalSet, incident: Incident) -> None:
        row = "" if incident.gid is None else f", row {row_of(incident.gid)}"
        message = f"evaluation of {of.name}{row}: {incident.message}"
        self.report.incident_nowait(msgspec.structs.replace(incident, gid=None, message=message))

    async def _tell(self, kind: str, message: str) -> None:
        await self.report.incident(Incident(actor=self.name, kind=kind, message=message))
