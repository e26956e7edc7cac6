"""What was measured of a machine, and the file in the user's folder that holds it.

Runs go by it where it is left to them whether the generator is a thread or a process. It counts only for the machine
and the version of MLX that it was made with.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from troupe.errors import InputError
from troupe.runtime.files import drafted
from troupe.runtime.machine import arithmetic, memory_gb, processors

Place = Literal["thread", "process"]

LONGEST_S = 180.0
"""That measuring takes at the most, about."""
_MARGIN = 1.1
"""By which one way has to overlap better than the other before it is chosen for that."""


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """How much faster decoding and learning are beside each other than in turns: 2 hides one wholly, 1 gains nothing.
    None: not measured."""

    threads: float | None = None
    """Two threads of one process."""
    processes: float | None = None
    """The generator in a process of its own."""

    @property
    def better(self) -> Place | None:
        """Which of them is clearly better; None where neither is, or where either was not measured."""
        if self.threads is None or self.processes is None:
            return None
        if self.processes > _MARGIN * self.threads:
            return "process"
        return "thread" if self.threads > _MARGIN * self.processes else None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; None and what is missing could not be, and `lacking` says why."""

    model: str
    """The shape of the random policy that it was measured with."""
    parameters: int
    dtype: str
    prompt_tokens: int
    new_tokens: int
    """Of every row that was decoded."""
    decode: Mapping[int, float] = {}
    """Rows decoded together → tokens a second, prompts' prefill included; eight rows share a prompt."""
    learner: float | None = None
    """Tokens a second of a step of 8 rows × 512 tokens, all weights trained; rows × tokens are counted."""
    overlap: Overlap = Overlap()
    copy_gb_per_s: float | None = None
    """10⁹ bytes a second, read and written both counted."""
    same_decode: bool | None = None
    """Whether the same rows came to the same tokens and log-probabilities twice, bit for bit."""
    same_learner: bool | None = None
    """Whether the same step came to the same weights twice, bit for bit."""
    lacking: tuple[str, ...] = ()


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, and what was measured of it."""

    format: Literal[1] = 1
    troupe: str
    made: str
    """When, in UTC by ISO 8601."""
    seconds: float
    """How long it took."""
    chip: str
    backend: Literal["cpu", "cuda", "metal"]
    system: str
    mlx: str
    processors: int
    memory_gb: float | None
    """10⁹ bytes of the machine."""
    limit_gb: float | None
    """What arrays may take by MLX's word; None on a CPU."""
    wired: str
    """What of memory can be kept resident (`wired_limit_gb`), in words."""
    largest: Mapping[str, str | None]
    """Way of training → the largest published model that fits, by formula; None: none does."""
    figures: Figures
    environment: Mapping[str, str]
    """What decides the bits of a run here; a file of another machine or another MLX has another."""

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it was made on a machine like this one, with the same MLX."""
        here = memory_gb()
        alike = self.memory_gb == here or None not in (self.memory_gb, here)
        if alike and self.memory_gb is not None and here is not None:
            alike = abs(self.memory_gb - here) < 0.02 * here  # which systems tell a little differently
        return alike and self.processors == processors() and dict(self.environment) == arithmetic()


def machine_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the measurement of this machine lies."""
    base = environment.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".config"
    return folder / "troupe" / "machine.json"


def check_writable(path: Path) -> None:
    """Raise InputError where no file can be written there."""
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; name a file to write the figures to")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path}: it cannot be written: {error.strerror or error}; name another file") from None


def write_measurement(path: Path, measurement: Measurement) -> None:
    """Write the file, whole or not at all. OSError where it cannot be."""
    with drafted(path) as draft:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(measurement), indent=2) + b"\n")


def read_measurement(path: Path) -> Measurement | None:
    """What a file holds; None where there is none, or none that this Troupe can read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measurement)
    except (OSError, msgspec.MsgspecError):
        return None


def overlaps_better(path: Path) -> Place | None:
    """Where the generator overlaps clearly better with the learner by a file of this machine; None: it does not say."""
    measurement = read_measurement(path)
    return measurement.figures.overlap.better if measurement is not None and measurement.is_of_this_machine else None
