"""Curriculum: which rows each step has, where they are chosen by what came of them before. A ledger: it outlives the
actors, and a checkpoint keeps it.

The rows of a pinned step k are chosen in the moment in which version max(0, k − max_staleness) is there, of what all
steps before that version came to: before any of its prompts may be issued, and whatever has been issued by then. So
they follow from the seed alone. Those of a free step are chosen when its first prompt is issued.
"""

from collections.abc import Sequence

from troupe.dataset import CurriculumConfig, PromptDataset
from troupe.dataset.pools import POOLS, Pools
from troupe.messages import CurriculumState, Pool, Slot, StepRows


class Curriculum:
    """The Learner tells what came of a step, in the moment in which it counts; the Prompter asks for rows."""

    def __init__(
        self,
        config: CurriculumConfig,
        dataset: PromptDataset,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        ahead: int | None,
        attempts: int = 0,
        begins: int = 0,
    ) -> None:
        """`ahead`: steps that are prompted while an earlier one is not learned yet, in the pinned schedule; None: the
        free one. `attempts`: how often a group may be replaced by one of another row. `begins`: the first step that has
        rows of it."""
        self.config = config
        self._rows = len(dataset)
        self._batch_size = batch_size
        self._ahead = ahead
        self._attempts = attempts
        self._begins = begins
        self._pools = Pools(dataset.order(seed, 0, shuffle=shuffle), config, seed=seed, shuffle=shuffle)
        self._chosen: dict[int, StepRows] = {}
        self.end: int | None = None
        """The first step that is not begun, because every row is retired; None: there is none."""
        self._has_told = False
        self._choose_ahead(begins)

    @property
    def is_retired(self) -> bool:
        """Whether no row is left that is not mastered."""
        return self._pools.counts["retired"] == self._rows

    def news(self) -> str:
        """That every row is retired, and what happens then, in a sentence; empty where it is not so, or was told."""
        if not self.is_retired or self._has_told:
            return ""
        self._has_told = True
        goes_on = "the run goes on with those of the lowest pass rates"
        if self.end is not None:
            goes_on = f"the run ends after step {self.end}"
        return (
            f"every one of the {self._rows} rows is retired (curriculum.retire_at {self.config.retire_at:g}); {goes_on}"
        )

    def why_over(self, version: int) -> str:
        """Why no step comes after a version, in a sentence; empty where it is not the curriculum that says so."""
        if self.end is None or version < self.end:
            return ""
        why = f"every one of the {self._rows} rows is retired (curriculum.stop_when_retired)"
        return f"{why}, so the run ended with step {version:,}"

    def row(self, slot: Slot) -> int:
        """The row of a slot of a step that is not learned yet."""
        chosen = self._chosen.get(slot.step) or self._choose(slot.step)
        if not slot.attempt:
            return chosen.rows[slot.place]
        # groups that were sampled anew because they were stale have counted, too
        index = (slot.attempt - 1) * self._batch_size + slot.place
        others = chosen.replacements or chosen.rows
        return others[index % len(others)]

    def learned(self, version: int, rates: Sequence[tuple[int, float | None]], oldest: int) -> dict[str, float]:
        """Take in what the groups that ended with the step before `version` came to, in the order of their slots: row
        and pass rate. Gives the step's metrics. `oldest`: the first step that rows may still be asked of."""
        came_from = [self._pools.pool(row) for row, _ in rates]
        for row, rate in rates:
            self._pools.record(row, rate, version - 1)
        self._chosen = {step: chosen for step, chosen in self._chosen.items() if step >= oldest}
        if self.config.stop_when_retired and self.is_retired and self.end is None:
            self.end = max(version, *(step + 1 for step in self._chosen), 0)
        self._choose_ahead(version)
        return self._metrics(came_from)

    def state(self) -> CurriculumState:
        """What a checkpoint keeps."""
        pools = self._pools
        return CurriculumState(
            records=tuple(pools.records[row] for row in sorted(pools.records)),
            chosen=tuple(self._chosen[step] for step in sorted(self._chosen)),
            away=tuple(sorted(pools.away)),
            turns=dict(pools.turns),
            end=self.end,
        )

    def restore(self, state: CurriculumState, version: int) -> None:
        """Go on from what the checkpoint of a version kept."""
        self._pools.restore(state.records, state.away, state.turns)
        self._chosen = {chosen.step: chosen for chosen in state.chosen}
        self.end = state.end if self.config.stop_when_retired else None
        self._choose_ahead(max(version, self._begins))

    def _choose_ahead(self, version: int) -> None:
        if self._ahead is not None:
            for step in range(version, version + self._ahead + 1):
                if step not in self._chosen and (self.end is None or step < self.end):
                    self._choose(step)

    def _choose(self, step: int) -> StepRows:
        self._pools.recall(step)
        rows = self._pools.draw(self._batch_size, step)
        others = self._pools.replacements(self._attempts * self._batch_size, step, set(rows))
        chosen = StepRows(step=step, rows=tuple(rows), replacements=tuple(others))
        self._chosen[step] = chosen
        return chosen

    def _metrics(self, came_from: Sequence[Pool]) -> dict[str, float]:
        counts = self._pools.counts
        rows = {f"curriculum/{pool}": float(counts[pool]) for pool in POOLS}
        shares = {f"curriculum/share_{pool}": came_from.count(pool) / max(1, len(came_from)) for pool in POOLS}
        return {**rows, "curriculum/unseen": float(self._rows - len(self._pools.records)), **shares}
