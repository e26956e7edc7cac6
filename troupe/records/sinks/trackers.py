"""Weights & Biases and trackio: packages that keep runs of many projects beside each other.

Each run has one name there however often it is resumed, which a small file in the run folder remembers, with the step
that was told last: a step that a resume makes once more is not told twice. Steps that a killed start had not told yet
are told by the next one, out of metrics.jsonl and evaluations.jsonl.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec

from troupe.messages import Evaluated, GroupClosed, Update
from troupe.records.evaluations import read_evaluations
from troupe.records.layout import METRICS
from troupe.records.sinks.base import MetricsConfig, RunInfo, SinkName, package, wandb_mode
from troupe.records.sinks.digest import Digest, Sample, StepDigest
from troupe.records.sinks.jsonl import steps_between
from troupe.runtime.files import drafted

_PATIENCE = 0.8
"""Part of `sink_timeout_s` after which a tracker gives up by itself, and so can say why."""
_TRACKIO = "0."
"""Versions of trackio in which a run knows its next step."""
_VERSION = "eval/version"
"""By which Weights & Biases draws evaluations."""
_COLUMNS = ("step", "prompt", "completion", "reward", "scores", "tokens")


class Tracked(msgspec.Struct, frozen=True, kw_only=True):
    """Under what name a run is tracked; `wandb.json` or `trackio.json` in its folder."""

    id: str
    step: int = 0
    """The newest step that was told."""
    kept: int = 0
    """The newest step that was there when a start began, or had ended well."""
    evaluated: dict[str, int] = {}
    """Set → its newest version of which an evaluation was told."""


class _Tracker(ABC):
    """What both have in common."""

    name: str
    takes: tuple[type, ...] = (Update, GroupClosed, Evaluated)
    _log_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, run: RunInfo, config: MetricsConfig) -> None:
        self._run, self._config = run, config
        self._path = Path(run.folder) / f"{self.name}.json"
        self._tracked = Tracked(id="")
        self._digest = Digest()
        self._there: Any = None
        """The run in the tracker's own terms."""

    def open(self) -> None:
        """Begin the run there, or go on with it."""
        found = _read(self._path)
        self._tracked = found or Tracked(id=self._new_id())
        self._there = self._begin(self._tracked.id, goes_on=found is not None)
        newest = self._newest_there()
        for step, metrics in steps_between(Path(self._run.folder) / METRICS, newest, self._run.first_step):
            self._tell(StepDigest(step=step, metrics=metrics))
        newest = max(self._run.first_step, newest)
        self._tracked = msgspec.structs.replace(self._tracked, step=newest, kept=newest)
        self._digest = Digest(newest=newest, samples=self._config.completions, every=self._config.completions_every)
        for evaluated in read_evaluations(Path(self._run.folder)):
            if evaluated.version <= self._run.first_step:
                self._take(evaluated)
        _write(self._path, self._tracked)

    def write(self, message: object) -> None:
        """Take a message; a step is told when it has ended, an evaluation once."""
        if isinstance(message, Evaluated):
            self._take(message)
            return
        digest = self._digest.add(message)
        if digest is not None and self._there is not None:
            self._tell(digest)
            self._tracked = msgspec.structs.replace(self._tracked, step=digest.step)

    def flush(self) -> None:
        if self._there is not None:
            _write(self._path, self._tracked)

    def close(self) -> None:
        there, self._there = self._there, None
        if there is not None:
            there.finish()
            _write(self._path, msgspec.structs.replace(self._tracked, kept=self._tracked.step))

    def _new_id(self) -> str:
        return secrets.token_hex(4)

    @abstractmethod
    def _begin(self, name: str, *, goes_on: bool) -> Any:
        """Begin there under a name, or go on with what has it."""

    def _newest_there(self) -> int:
        """The newest step that was told before; where the tracker itself says so, it knows better than our file."""
        return self._tracked.step

    def _take(self, evaluated: Evaluated) -> None:
        if self._there is not None and evaluated.version > self._tracked.evaluated.get(evaluated.name, -1):
            self._tell_evaluation(evaluated)

    def _tell_evaluation(self, evaluated: Evaluated) -> None:
        """Tell of an evaluation, later than of its step."""
        self._tell(StepDigest(step=evaluated.version, metrics=dict(evaluated.metrics)))
        self._note([evaluated])

    def _note(self, told: Sequence[Evaluated]) -> None:
        newest = self._tracked.evaluated | {one.name: one.version for one in told}
        self._tracked = msgspec.structs.replace(self._tracked, evaluated=newest)

    def _tell(self, digest: StepDigest) -> None:
        """Tell of a step that has ended."""
        there = package(cast("SinkName", self.name))
        row: dict[str, Any] = dict(digest.metrics)
        for name, values in digest.histograms.items():
            row[f"histograms/{name}"] = there.Histogram([float(value) for value in values])
        if digest.samples:
            row["completions"] = there.Table(columns=list(_COLUMNS), data=_rows(digest.step, digest.samples))
        self._there.log(row, step=digest.step, **self._log_options)


class WandbSink(_Tracker):
    """Weights & Biases; in offline mode everything lies in the run folder."""

    name = "wandb"
    _log_options: ClassVar[Mapping[str, Any]] = {"commit": True}

    def __init__(self, run: RunInfo, config: MetricsConfig) -> None:
        super().__init__(run, config)
        self._evaluated: list[Evaluated] = []
        """What the next step is told with: of one that was told, no more can be."""

    def close(self) -> None:
        if self._there is not None and self._evaluated:
            if self._tracked.step >= self._run.total_steps:
                super()._tell(StepDigest(step=self._tracked.step + 1, metrics=self._figures()))
            else:  # who resumes goes on with that step
                self._there.summary.update(self._figures())
            self._note(self._evaluated)
        super().close()

    def _tell_evaluation(self, evaluated: Evaluated) -> None:
        self._evaluated.append(evaluated)

    def _tell(self, digest: StepDigest) -> None:
        super()._tell(msgspec.structs.replace(digest, metrics=digest.metrics | self._figures()))
        self._note(self._evaluated)
        self._evaluated = []

    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for one in self._evaluated:
            figures |= {**one.metrics, _VERSION: float(one.version)}
        return figures

    def _begin(self, name: str, *, goes_on: bool) -> Any:
        there = self._join(name)
        there.define_metric("eval/*", step_metric=_VERSION)
        return there

    def _join(self, name: str) -> Any:
        wandb = package("wandb")
        return wandb.init(
            project=self._config.wandb_project,
            entity=self._config.wandb_entity,
            name=self._config.wandb_name or self._run.name,
            id=name,
            resume="allow",
            dir=self._run.folder,
            config=self._run.config,
            mode=wandb_mode(self._config),
            settings=wandb.Settings(
                console="off",  # it would stand between the run and its terminal
                silent=True,
                save_code=False,
                disable_git=True,
                # else it holds up the end of the process where its server does not answer
                init_timeout=_PATIENCE * self._config.sink_timeout_s,
                finish_timeout=_PATIENCE * self._config.sink_timeout_s,
                finish_timeout_raises=True,
            ),
        )

    def _newest_there(self) -> int:
        if self._there.offline:  # its process writes late, and may not have written what a killed start told
            return self._tracked.kept
        return self._there.starting_step - 1 if self._there.resumed else super()._newest_there()


class TrackioSink(_Tracker):
    """trackio, which keeps its runs in a folder of its own (TRACKIO_DIR)."""

    name = "trackio"

    def _new_id(self) -> str:
        return self._config.trackio_name or f"{self._run.name}-{secrets.token_hex(2)}"

    def _begin(self, name: str, *, goes_on: bool) -> Any:
        for module in ("", "run", "utils"):  # what it tells by printing would come into the midst of the display
            package("trackio", module).print = _say_nothing
        return package("trackio").init(
            project=self._config.trackio_project,
            name=name,
            config=self._run.config,
            resume="allow" if goes_on else "never",
            embed=False,
        )

    def _newest_there(self) -> int:
        # it writes twice a second, so a kill may cost it steps; of a version that we do not know it costs points
        is_known = str(getattr(package("trackio"), "__version__", "")).startswith(_TRACKIO)
        following = getattr(self._there, "_next_step", None) if is_known else None
        return max(0, following - 1) if isinstance(following, int) else super()._newest_there()


def _say_nothing(*_: object, **__: object) -> None:
    pass


def _rows(step: int, samples: Sequence[Sample]) -> list[list[Any]]:
    return [
        [step, _clean(s.prompt), _clean(s.text), s.reward, msgspec.json.encode(s.scores).decode(), s.tokens]
        for s in samples
    ]


def _clean(text: str) -> str:
    """Half a surrogate pair, which a dataset may hold, is in no file."""
    return text.encode(errors="backslashreplace").decode()


def _read(path: Path) -> Tracked | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tracked)
    except (FileNotFoundError, msgspec.DecodeError):  # the sink is new, or its file was cut by a crash
        return None


def _write(path: Path, tracked: Tracked) -> None:
    with drafted(path) as draft:
        draft.write_bytes(msgspec.json.encode(tracked) + b"\n")
