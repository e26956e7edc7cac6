"""What a checkpoint consists of in memory, and the `[checkpoint]` section."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import mlx.core as mx
import msgspec

from troupe.messages import CurriculumState, Unfinished
from troupe.policy import NetworkConfig, Weights

FORMAT = 3
"""Of the folders that are written. 1 had no number, no `unfinished.msgpack`, and a state of five fields; 2 did not say
which ids end a text, which scores a fault took, and with what the run was made."""

MANIFEST = "MANIFEST.json"
CONFIG_FILE, MODEL_FILE, OPTIMIZER_FILE = "config.json", "model.safetensors", "optimizer.safetensors"
STATE_FILE, REFERENCE_FILE, UNFINISHED_FILE = "state.json", "reference.safetensors", "unfinished.msgpack"
MADE_FILE, ROWS_FILE, AVERAGE_FILE = "made.json", "rows.msgpack", "teacher.safetensors"
BEHIND_FILE = re.compile(r"behind-(\d{8,})\.safetensors")
TEMPORARY_PREFIX, REPLACED_PREFIX = ".writing-", ".replaced-"


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[checkpoint]` section."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 50
    """Steps between two checkpoints; one is written at the end in any case."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    """How many of the newest checkpoints stay; older ones are removed after a newer one is whole."""
    keep_best: bool = True
    """Whether the best checkpoint by `metric_for_best` stays, too, however old it is."""
    metric_for_best: Annotated[str, msgspec.Meta(min_length=1)] = "reward"
    """Name of a metric; its mean over the steps since the checkpoint before is what counts (`metric_for_best_model` in
    transformers). A checkpoint that has no such metric, or not a number, is never the best; of equals the newer is."""
    greater_is_better: bool = True
    """Whether large values of that metric are good (transformers' name, too)."""
    overlap: bool | None = None
    """Learn on while a checkpoint is written, which holds the optimizer's state twice; otherwise the next step waits
    with learning. None: yes, unless a run's memory limit asks for less."""


class RewardState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which code stood behind a reward's name."""

    version: int = 0
    """How often it was exchanged."""
    spec: str | None = None
    """As the config names it; None where it was given in Python."""


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run must know, besides arrays, to go on where a checkpoint was cut."""

    format: Annotated[int, msgspec.Meta(ge=1)] = FORMAT
    """Of the folder. A Troupe that knows only older ones refuses it."""
    version: Annotated[int, msgspec.Meta(ge=0)]
    """Completed learner batches."""
    seed: int
    dataset: str
    """Fingerprint of the prompts: going on with other prompts would not be the same run."""
    num_tokens: int = 0
    """Prompt and completion tokens of the run so far."""
    mode: Literal["pinned", "free"] = "pinned"
    """The schedule that `unfinished.msgpack` is of."""
    model: str = ""
    """Fingerprint of the model folder that the run began with."""
    skipped_in_a_row: int = 0
    """Steps, up to the last one, whose update was skipped because it was not finite."""
    rewards: dict[str, RewardState] = {}
    metrics: dict[str, float] = {}
    """Means over the steps since the checkpoint before."""
    stop_ids: tuple[int, ...] | None = None
    """Ids that end a completion, ascending; None: older Troupes took those of `Policy.eos_ids_by_one_file`."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """How the run was made up to a checkpoint, for whoever resumes it to compare; empty where it is not known. A file
    of its own, of which a Troupe that does not know it or a part of it takes no notice."""

    config: dict[str, Any] = {}
    """The resolved config that the newest step was made with, as a table."""
    machine: dict[str, str] = {}
    """What of the machine decided the bits."""
    lacking: dict[str, int] = {}
    """Name of a durable sink → how many steps of the run its file lacked already."""
    teacher: str = ""
    """Fingerprint of the teacher; empty where there was none."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in memory; arrays are evaluated."""

    config: NetworkConfig | None
    """None: an adapter was trained, which does not hold its base."""
    weights: Weights
    optimizer_state: dict[str, mx.array]
    behind: Mapping[int, Weights]
    """Older policy versions by number; empty where generation needs only the newest."""
    state: RunState
    reference: Weights | None = None
    """The reference policy where it follows the policy."""
    average: Weights | None = None
    """The weights of a policy that teaches itself, where they follow it."""
    made: Made = Made()
    unfinished: Unfinished = Unfinished()
    """Prompts in it have lost their text and columns: slot and row say what they are."""
    curriculum: CurriculumState | None = None
    """Where rows are chosen by what came of them."""
