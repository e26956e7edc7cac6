"""What a chaotic run is made of and what goes wrong in it: drawn from a seed, run by `tests/support/chaos.py`."""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec

import troupe  # noqa: F401 - before MLX
from troupe.actors.schedule import OnStale

Mode = Literal["pinned", "free"]
REQUESTS = {"checkpoint": 4, "exchange": 2, "pause": 4, "resume": 4, "step": 4, "drain": 1, "stop": 1}
"""What is asked of a run, and how often."""
MODES: tuple[Mode, ...] = ("pinned", "free")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is run, and what goes wrong."""

    seed: int
    prompts: int
    """P"""
    generations: int
    """G"""
    steps: int
    rows: int
    max_staleness: int
    mode: Mode
    on_stale: OnStale
    attempts: int
    """Of dynamic sampling; 0 is without."""
    checkpoint_every: int
    overlap: bool
    """Whether learning goes on beside a checkpoint."""
    concurrency: int
    retries: int
    levels: int
    """Different scores of a reward: few make many groups without signal."""
    with_actor: bool
    """Whether a RewardActor scores too."""
    bad_rewards: float
    """Share of completions or groups whose score never comes, one way or another."""
    bad_updates: float
    """Share of steps whose gradient is not finite."""
    delay_s: float = 0.0
    """Scale of every wait; 0 is none."""
    bad_disk: float = 0.0
    """Share of checkpoints that cannot be written; the last one always can."""
    bad_sinks: float = 0.0
    """Share of writes that fail."""
    hiccups: float = 0.0
    """Share of reward calls that fail the first time and not the second."""
    outage: tuple[float, float] | None = None
    """(from, to): while no reward answers, and the breaker is armed. What is scored then depends on time."""
    bounds: Literal["asked", "wide", "narrow"] = "asked"
    """Of channels; narrow are only those that need not hold all live groups."""
    faults: float = 0.0
    """Share of an actor's moves that raise, up to `MOST_FAULTS`."""
    deadly: float = 0.0
    """Share of the learner's moves that raise, which ends the run."""
    requests: tuple[tuple[float, str], ...] = ()
    """(when, what) is asked of the supervisor."""
    watchdog_s: float = 0.0
    curriculum: bool = False
    """Whether rows are drawn by their pass rates."""
    evaluate_every: int = 0
    """Steps from one evaluation to the next; 0: nothing is evaluated."""

    def asks(self, what: str) -> bool:
        """Whether it is asked of the supervisor."""
        return what in {asked for _, asked in self.requests}

    @property
    def is_reproducible(self) -> bool:
        """Whether timing must not change what is learned."""
        return self.mode == "pinned" and self.outage is None

    def calm(self) -> Plan:
        """The same drive without anything that depends on time; what follows from the completions stays."""
        quiet: dict[str, Any] = dict.fromkeys(
            ("delay_s", "bad_disk", "bad_sinks", "hiccups", "faults", "deadly", "watchdog_s"), 0.0
        )
        return msgspec.structs.replace(self, **quiet, outage=None, bounds="asked", requests=())


def draw_plan(seed: int) -> Plan:
    """A drive at random."""
    dice = random.Random(seed)
    delay_s = dice.choice([0.01, 1.0, 20.0])
    mode = dice.choice(MODES)
    free = mode == "free"  # tokens get old where many short steps pass a slow group
    steps, retries = dice.randint(2, 8) if free else dice.randint(1, 4), dice.randint(0, 2)
    length_s = delay_s * steps * 4
    outage = None
    if dice.random() < 0.15:
        from_s = dice.random() * length_s
        outage = (from_s, from_s + dice.random() * 500)
    return Plan(
        seed=seed,
        prompts=dice.choice([1, 1, 1, 2] if free else [1, 2, 2, 3]),
        generations=dice.randint(2, 3),
        steps=steps,
        rows=dice.randint(1, 9),
        max_staleness=dice.choice([0, 1, 1, 2, 3] if free else [0, 0, 1, 1, 2, 3]),
        mode=mode,
        on_stale=dice.choice(["drop", "requeue", "requeue", "correct"]),
        attempts=dice.choice([0, 0, 1, 3]),
        checkpoint_every=dice.randint(1, 4),
        overlap=dice.random() < 0.7,
        concurrency=dice.choice([1, 2, 64]),
        retries=retries,
        levels=dice.choice([2, 3, 7]),
        with_actor=dice.random() < 0.4,
        bad_rewards=0.0 if outage else dice.choice([0.0, 0.1, 0.6]),  # a reward that never answers is waited for ever
        bad_updates=dice.choice([0.0, 0.2]),
        delay_s=delay_s,
        bad_disk=dice.choice([0.0, 0.5]),
        bad_sinks=dice.choice([0.0, 0.1, 1.0]),
        hiccups=dice.choice([0.0, 0.3]) if retries else 0.0,
        faults=dice.choice([0.0, 0.02, 0.1]),
        deadly=dice.choice([0.0] * 19 + [0.05]),
        outage=outage,
        bounds=dice.choice(["asked", "wide", "narrow"]),
        watchdog_s=dice.choice([0.0, 0.0, 0.0, 600.0]),
        requests=tuple(
            sorted(
                (dice.random() * length_s, dice.choices(list(REQUESTS), list(REQUESTS.values()))[0])
                for _ in range(dice.choice([0, 0, 1, 5]))
            )
        ),
        evaluate_every=dice.choice([0, 0, 1, 2]),
    )
