"""A run folder → one picture of the run, whatever state it is in. Changes nothing.

run.sqlite tells most; without it metrics.jsonl tells the curves.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from troupe.errors import InputError, OutputError
from troupe.messages import Finding, Phase, Status
from troupe.records.compare.held_out import held_out_before
from troupe.records.curves import Thinned, Thinner
from troupe.records.diagnosis import Diagnosis, in_a_line
from troupe.records.diagnosis.past import awaiting
from troupe.records.evaluations import read_evaluations
from troupe.records.held_out import HeldOut, held_out_of
from troupe.records.layout import CHANGES, METRICS, RUN_TOML, STORE
from troupe.records.report.run_time import RunTime
from troupe.records.sinks.jsonl import decode_step
from troupe.records.standing import Change, Standing, Summary, describe_standing, read_standing, read_summary
from troupe.records.store.completions import Query, StoredCompletion
from troupe.records.store.members import StoredMember
from troupe.records.store.read import (
    Overview,
    Start,
    StoredCheckpoint,
    StoredIncident,
    StoredRun,
    open_store,
)
from troupe.runtime.files import read_toml

State = Literal[Phase, "finished", "stopped", "crashed", "new"]
"""What a run says of itself, or what its files do. stopped: ended before its last step, on request; crashed: cut off;
new: nothing is done, and nobody is at it."""

INCIDENTS_SHOWN = 60
STATES: dict[str, State] = {
    "complete": "finished",
    "ended": "stopped",
    "cut off": "crashed",
    "not begun": "new",
    "playing": "running",
    "silent": "running",
}


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy wrote in one step."""

    step: int
    completions: dict[str, StoredCompletion]
    """"best", "worst", "random" → completion; those that there are."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the store tells besides the figures; nothing where there is none."""

    overview: Overview | None = None
    newest_unix_s: float | None = None
    """When the newest step was done."""
    incidents: tuple[StoredIncident, ...] = ()
    """The newest first, at most INCIDENTS_SHOWN."""
    machines: dict[int, str] = {}
    """Start → the machine that it ran on."""
    members: tuple[StoredMember, ...] = ()
    """Who did work in a process of its own, start by start."""
    samples: tuple[Samples, ...] = ()
    """Of the first and of the newest step that have completions."""
    held_out: dict[str, HeldOut] = {}

    @property
    def starts(self) -> tuple[Start, ...]:
        """Every start of the run that is known."""
        return () if self.overview is None else self.overview.starts

    @property
    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        """Those that are there, the newest first."""
        return () if self.overview is None else self.overview.checkpoints


class RunPicture(msgspec.Struct, frozen=True, kw_only=True):
    """All that a report shows."""

    folder: str
    state: State
    told: str
    """How the run stands, in a sentence."""
    step: int
    """Learner batches that are done."""
    total_steps: int | None
    """None where nothing says it."""
    config: dict[str, Any]
    """`run.toml` as it is; empty where there is none."""
    config_text: str
    metrics: Thinned
    seconds: float | None
    """From the start of each start to its newest step, all starts together."""
    tokens: float | None
    """Prompt and completion tokens so far."""
    incidents: dict[str, int]
    """Kind → number; of the last start only, where there is no store."""
    stored: Stored
    changes: tuple[Change, ...]
    held_out: dict[str, HeldOut]
    """Set of rows that are not trained on → what versions of the policy came to on it."""
    notes: tuple[str, ...]
    """What could not be read, and why."""
    findings: tuple[Finding, ...] = ()
    """What the figures say is wrong; those that are over come last."""

    @property
    def diagnosis(self) -> str:
        """The findings that hold, in a line; empty where there is none."""
        return in_a_line(self.findings, self.folder if self.goes_on else "")

    @property
    def goes_on(self) -> bool:
        """Whether somebody is there who can be asked for something."""
        return self.state not in ("finished", "stopped", "crashed", "new")

    def values(self, name: str) -> list[float]:
        """What is known of a metric, in order: of each step, or of the steps of each point."""
        curve = self.metrics.curves.get(name)
        return [] if curve is None else [value for value in curve.mean if value is not None]


def read_run(folder: Path, status: Status | None = None, notes: Sequence[str] = ()) -> RunPicture:
    """The picture of the run in a folder. InputError where there is no run; what is damaged is a note.

    `status`: what the run itself says, where it answers. `notes`: those that there are already.
    """
    fate = read_standing(folder)
    notes = list(notes)
    config, config_text = _config(folder, notes)
    diagnosis = awaiting(config, folder)
    stored, metrics, seconds = _stored(folder, notes, diagnosis)
    lines = folder / METRICS
    if (not metrics.steps or metrics.steps[0] > metrics.steps_a_point) and lines.is_file():  # none, or not from step 1
        of_lines = awaiting(config, folder)
        told = _from_lines(lines, notes, of_lines)
        if told.steps and (not metrics.steps or told.steps[-1] >= metrics.steps[-1]):
            metrics, diagnosis = told, of_lines
    summary = read_summary(folder) or Summary()
    newest = metrics.steps[-1] if metrics.steps else 0
    step = max(newest, fate.step, status.step if status else 0)
    overview = stored.overview
    return RunPicture(
        folder=str(folder.absolute()),
        state=_state(fate, status),
        told=_describe(fate, status),
        step=step,
        total_steps=_total_steps(fate, status, config, metrics),
        config=config,
        config_text=config_text,
        metrics=metrics,
        seconds=seconds if overview and overview.steps else metrics.sums.seconds or None,
        tokens=_last(metrics, "num_tokens"),
        incidents=overview.incidents if overview else summary.incidents,
        stored=stored,
        changes=tuple(_changes(folder / CHANGES)),
        held_out=stored.held_out
        or held_out_of(read_evaluations(folder))
        or (held_out_before(summary) if summary.steps >= step else {}),
        notes=tuple(notes),
        findings=diagnosis.all_findings,
    )


def _state(fate: Standing, status: Status | None) -> State:
    if status is not None and status.phase != "ended" and status.phase != "failed":
        return status.phase
    return STATES[fate.fate]


def _describe(fate: Standing, status: Status | None) -> str:
    if status is None:
        return describe_standing(fate)
    if status.restarting is not None:
        return f"it has failed and is started again (attempt {status.restarting.attempt}): {status.restarting.reason}"
    if status.held or status.rewards_down:
        down = [f"the reward {name} is down: {why}" for name, why in status.rewards_down.items()]
        return "; ".join([*status.held, *down])
    return f"{status.phase} at step {status.step} of {status.total_steps}"


def _config(folder: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    path = folder / RUN_TOML
    try:
        return read_toml(path), path.read_text(encoding="utf-8")
    except (InputError, OSError, ValueError) as error:
        notes.append(str(error))
        return {}, ""


def _stored(folder: Path, notes: list[str], diagnosis: Diagnosis) -> tuple[Stored, Thinned, float]:
    """What the store tells, the figures in it, and for how many seconds the run went on."""
    if not (folder / STORE).is_file():
        notes.append(
            f"There is no {STORE}, so completions, incidents, starts and checkpoints are not shown; runs have one "
            "where metrics.sinks names 'sqlite'."
        )
    else:
        try:
            with open_store(folder) as run:
                return _read_store(run, notes, diagnosis)
        except OutputError as error:
            notes.append(str(error))
    return Stored(), Thinned(), 0.0


def _read_store(run: StoredRun, notes: list[str], diagnosis: Diagnosis) -> tuple[Stored, Thinned, float]:
    overview = run.overview()
    thinner = Thinner(overview.steps)
    time = RunTime({start.start: start.unix_s for start in overview.starts})
    newest: float | None = None
    for step in run.steps():
        thinner.add(step.step, step.metrics)
        diagnosis.add(step.step, step.metrics)
        time.add(step.step, step.start, step.unix_s, step.metrics.get("step_time"))
        newest = step.unix_s
    if time.note is not None:
        notes.append(time.note)
    stored = Stored(
        overview=overview,
        newest_unix_s=newest,
        incidents=tuple(run.newest_incidents(INCIDENTS_SHOWN)),
        machines=run.machines(),
        members=tuple(run.members()),
        samples=tuple(_samples(run)),
        held_out=_held_out(run),
    )
    return stored, thinner.result(), time.seconds


def _samples(run: StoredRun) -> Iterator[Samples]:
    for step in run.steps_with_completions():
        chosen: dict[str, StoredCompletion] = {}
        for choice in ("best", "worst"):
            for completion in run.completions(Query(choice=choice, count=1, step=step)):
                chosen[choice] = completion
        taken = {(found.gid, found.sample) for found in chosen.values()}
        for completion in run.completions(Query(choice="random", count=1 + len(taken), step=step)):
            if (completion.gid, completion.sample) not in taken:
                chosen["random"] = completion
                break
        yield Samples(step=step, completions=chosen)


def _from_lines(path: Path, notes: list[str], diagnosis: Diagnosis) -> Thinned:
    """The curves from metrics.jsonl; a last line that is being written, or was cut, is left out."""
    try:
        with path.open("rb") as file:
            thinner = Thinner(sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")))
            file.seek(0)
            for line in file:
                if (told := decode_step(line)) is not None:
                    thinner.add(*told)
                    diagnosis.add(*told)
    except OSError as error:
        notes.append(f"{path}: cannot be read: {error}")
        return Thinned()
    return thinner.result()


def _held_out(run: StoredRun) -> dict[str, HeldOut]:
    """With the rows of the newest version, and of the first that can be compared with it."""
    found = {}
    for name, held_out in held_out_of(run.evaluations()).items():
        first, newest = held_out.since, held_out.newest
        found[name] = msgspec.structs.replace(
            held_out,
            rows=run.evaluated_rows(newest, name),
            first_rows=run.evaluated_rows(first, name) if first != newest else (),
        )
    return found


def _changes(path: Path) -> Iterator[Change]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Change)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # cut while it was written, or damaged
            continue


def _total_steps(fate: Standing, status: Status | None, config: dict[str, Any], metrics: Thinned) -> int | None:
    """From who knows: the run itself, or its files."""
    if status is not None and status.total_steps:
        return status.total_steps
    return planned_steps(fate, config, metrics.steps[-1] if metrics.steps else 0, _last(metrics, "epoch"))


def planned_steps(fate: Standing, config: dict[str, Any], step: int, epoch: float | None) -> int | None:
    """How many steps a run will have, by its config, its summary, or how far through the epochs its newest step is."""
    learner = config.get("learner")
    learner = learner if isinstance(learner, dict) else {}
    warm = config.get("warm_start")
    before = warm.get("steps", 0) if isinstance(warm, dict) and warm.get("path") else 0
    before = before if isinstance(before, int) else 0
    if isinstance(most := learner.get("max_steps"), int):
        return before + most
    if fate.total_steps is not None:
        return fate.total_steps
    epochs = learner.get("epochs")
    if isinstance(epochs, int) and epoch and step > before:
        return before + math.ceil(round(epochs * (step - before) / epoch, 6))
    return None


def _last(metrics: Thinned, name: str) -> float | None:
    """The newest value of a metric that only grows."""
    curve = metrics.curves.get(name)
    values = () if curve is None else curve.high or curve.mean
    return values[-1] if values else None
