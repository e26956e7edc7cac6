"""What a sink is, the `[metrics]` section that chooses among them, and whether those chosen can work here."""

import importlib
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec

from troupe.errors import ConfigError, remedy
from troupe.messages import Evaluated, Incident

SinkName = Literal["console", "jsonl", "trace", "sqlite", "tensorboard", "wandb", "trackio", "prometheus"]
_PACKAGES: dict[SinkName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[metrics]` section."""

    sinks: tuple[SinkName, ...] = ("console", "jsonl", "trace", "sqlite")
    """Where to: `console` shows progress, `jsonl` writes metrics.jsonl, `trace` writes trace.json, `sqlite` writes
    run.sqlite, which has every completion; `tensorboard` writes event files, `wandb` and `trackio` track the run with
    the packages of these names, `prometheus` serves the newest figures."""
    sink_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Seconds that one write may take before the sink is switched off, and that all sinks have at the end of a run to
    write what they have not written yet."""
    store_log_probs: bool = False
    """Whether run.sqlite has the log-prob of every token, too (4 bytes a token)."""
    store_token_figures: bool = False
    """Whether run.sqlite has of every token learned from its entropy and importance ratio, too (8 bytes a token). With
    several ranks, of those that the first one learns."""
    completions: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Completions of a step that `tensorboard`, `wandb` and `trackio` are given as text, from the best to the worst."""
    completions_every: Annotated[int, msgspec.Meta(ge=1)] = 10
    """Steps from one that they are given completions of to the next."""
    wandb_project: Annotated[str, msgspec.Meta(min_length=1)] = "troupe"
    """Project that the run is tracked in."""
    wandb_entity: str | None = None
    """User or team that the project belongs to; None: the default one of who is logged in."""
    wandb_name: str | None = None
    """None: the name of the run folder."""
    wandb_mode: Literal["online", "offline"] | None = None
    """`offline` writes into the run folder, for `wandb sync`. None: what WANDB_MODE says, or else online."""
    trackio_project: Annotated[str, msgspec.Meta(min_length=1)] = "troupe"
    """Project that the run is tracked in."""
    trackio_name: str | None = None
    """None: the name of the run folder, with four letters that tell it from others of that name."""
    prometheus_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 9469
    """Of this machine only (127.0.0.1), where the sink `prometheus` serves `/metrics`."""

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.sinks if self.sinks.count(name) > 1})
        if twice:  # two would write into one file
            raise ValueError(f"metrics.sinks has {', '.join(twice)} more than once; name each sink once")


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink may tell about the run as a whole."""

    name: str
    folder: str
    total_steps: int
    first_step: int
    """Steps done before this start; 0 unless resumed."""
    program: str = ""
    """The version of Troupe."""
    machine: str = ""
    """What it runs on, in words."""
    past: tuple[tuple[int, float], ...] = ()
    """(step, reward) of some of the steps done before, as far as they are known."""
    evaluated: tuple[Evaluated, ...] = ()
    """What evaluations of earlier starts came to, without rows."""
    config: dict[str, Any] = {}
    """The resolved config, as run.toml has it."""

    @property
    def typed(self) -> str:
        """The folder as one would type it in the working directory."""
        folder = Path(self.folder)
        with suppress(OSError, ValueError):  # the working directory is gone, or elsewhere
            return str(folder.relative_to(Path.cwd()))
        return str(folder)


class Sink(Protocol):
    """One place for metrics. All calls come from one thread, which is the sink's own; `close` may come without `open`,
    and twice."""

    name: str
    takes: tuple[type, ...]
    """The types of messages that it is given."""

    def open(self) -> None:
        """Get ready; called once before the first message."""

    def write(self, message: object) -> None:
        """Take one message."""

    def flush(self) -> None:
        """No other message is here at the moment: what was taken should be where others can see it."""

    def close(self) -> None:
        """Flush and release."""


@runtime_checkable
class DurableSink(Sink, Protocol):
    """A sink for what must not get lost: a disk that fails for a while is waited for.

    `write` only takes over; `flush` puts what was taken where a crash of this process cannot lose it. An OSError of
    `open`, `flush` or `settle` means "not now": nothing is lost, and `flush`, which then also does what `open` left
    undone, is called again after a pause.
    """

    notes: deque[Incident]
    """What it came across that somebody should know of; taken by the caller."""

    def settle(self) -> None:
        """Put everything flushed where a power failure cannot lose it."""


def check_sinks(config: MetricsConfig) -> None:
    """Whether each sink that is asked for can work here, as far as that can be known before work starts.

    ConfigError with the remedy. Somebody who is not logged in is never asked for it later.
    """
    for name in config.sinks:
        if name in _PACKAGES:
            package(name)
        if name in _CHECKS:
            _CHECKS[name](config)


def package(sink: SinkName, module: str = "") -> Any:
    """The package that a sink writes with, or a module in it. ConfigError where it cannot be imported."""
    name = _PACKAGES[sink]
    try:
        return importlib.import_module(f"{name}.{module}" if module else name)
    except ImportError as error:
        raise ConfigError(
            f"metrics.sinks has {sink!r}, but the package {name} cannot be imported ({error}); "
            f"{remedy(sink)}, or leave the sink out"
        ) from None


def wandb_mode(config: MetricsConfig) -> str:
    """What the config says, or else the environment."""
    return config.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def _check_wandb(config: MetricsConfig) -> None:
    if wandb_mode(config) == "online" and not package("wandb").login(prompt=False, verify=False):
        raise ConfigError(
            "metrics.sinks has 'wandb', but nobody is logged in to Weights & Biases here; log in with `wandb login` "
            'or WANDB_API_KEY, or keep the run on this machine with metrics.wandb_mode = "offline"'
        )


def _check_prometheus(config: MetricsConfig) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", config.prometheus_port))
        except OSError as error:
            raise ConfigError(
                f"metrics.prometheus_port is {config.prometheus_port}, where nothing can be served ({error.strerror}); "
                "give another port, perhaps another run has this one"
            ) from None


_CHECKS: dict[SinkName, Callable[[MetricsConfig], None]] = {"wandb": _check_wandb, "prometheus": _check_prometheus}
