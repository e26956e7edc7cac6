"""A run in the hands of a script: own figures, a checkpoint of the best, a lower learning rate, an early end, and what
to do when it fails.

    python examples/supervisor.py --output runs/supervised

Trains the demo's policy. Every fifth step prints a line; a step with the best reward so far asks for a checkpoint; when
the reward has not risen for a while the learning rate is halved; when it is high enough the run is asked to end, long
before its last step. Takes half a minute on two CPU cores.

    python examples/supervisor.py --output runs/shaken --fail-at 12

The same, but something breaks after step 12: the run is cancelled, and goes on from its newest checkpoint.

All requests (`set`, `checkpoint`, `drain`, …) return at once; what comes of them is seen in later updates. `run.set`
is written down with the step from which it holds, so that whoever resumes makes the same change at the same step.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path
from typing import Literal

import anyio

import troupe
from troupe.cli.demo import DEMO_CONFIG
from troupe.errors import InputError
from troupe.messages import Update

Request = Literal["checkpoint", "slower", "end"]
ATTEMPTS = 3


class Coach:
    """Says after each step what to ask of the run. Knows rewards, and nothing of runs."""

    def __init__(self, good_enough: float = 0.9, patience: int = 12, window: int = 5) -> None:
        """`good_enough`: mean reward over `window` steps at which the run may end; `patience`: steps without a new best
        after which the learning rate is halved."""
        self._good_enough, self._patience = good_enough, patience
        self._recent: deque[float] = deque(maxlen=window)
        self._best, self._since_best = float("-inf"), 0
        self._ended = False

    def after(self, reward: float) -> Request | None:
        """What to ask for after a step of this reward. A mean over some steps: one step alone is mostly luck."""
        self._recent.append(reward)
        if self._ended or len(self._recent) < (self._recent.maxlen or 0):
            return None
        mean = sum(self._recent) / len(self._recent)
        if mean >= self._good_enough:
            self._ended = True
            return "end"
        if mean > self._best + 0.02:
            self._best, self._since_best = mean, 0
            return "checkpoint"
        self._since_best += 1
        if self._since_best >= self._patience:
            self._since_best = 0
            return "slower"
        return None


async def run_once(config: troupe.RunConfig, coach: Coach, resume: bool, fail_at: int | None) -> troupe.RunResult:
    """One start of the run, until it has ended."""
    lr = config.learner.lr
    async with troupe.Supervisor(config, resume=resume) as run:
        for notice in run.notices:
            print("note:", notice)
        async for update in run.updates():  # all steps from now on; the loop ends when the run has
            if update.step == fail_at:
                raise ConnectionError("something broke")  # an error in the body cancels the run
            if update.step % 5 == 0:
                print(line(update), flush=True)
            match coach.after(update.metrics["reward"]):
                case "checkpoint":
                    run.checkpoint()
                case "slower":
                    lr /= 2
                    run.set("learner.lr", lr)
                    print(f"step {update.step:>3}  no better for a while: learning rate {lr:.1e} from the next step on")
                case "end":
                    run.drain()
                    print(f"step {update.step:>3}  good enough: the steps already begun are finished, then it ends")
    return run.result  # leaving the block raised what made the run fail, if something did


def line(update: Update) -> str:
    """The figures that matter to us. `troupe inspect` and metrics.jsonl have all of them."""
    m = update.metrics
    return (
        f"step {update.step:>3}  reward {m['reward']:.3f}  groups without signal {m['frac_reward_zero_std']:.0%}"
        f"  entropy {m['entropy']:.3f}  {m['step_time']:.2f} s"
    )


def main() -> int:
    """The exit code: 0 done, 2 bad input, 3 it failed again and again."""
    parser = argparse.ArgumentParser(description="Train the demo's policy under the eyes of a script.")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="run folder")
    parser.add_argument("--max-steps", type=int, default=100, help="that the run has at most; default: %(default)s")
    parser.add_argument("--good-enough", type=float, default=0.9, help="mean reward to end at; default: %(default)s")
    parser.add_argument("--fail-at", type=int, metavar="STEP", help="break once after this step, to see what happens")
    options = parser.parse_args()
    settings = [
        {"output": options.output, "learner": {"max_steps": options.max_steps}},
        "checkpoint.every=5",
        "metrics.sinks=['jsonl', 'sqlite']",  # the console's place is taken by our own lines
    ]
    fail_at: int | None = options.fail_at
    begun = Path(options.output, "run.toml").exists()  # called again after a crash or Ctrl-C, it goes on
    for attempt in range(1, ATTEMPTS + 1):
        try:
            config = troupe.load_config(DEMO_CONFIG, settings)
            result = anyio.run(run_once, config, Coach(options.good_enough), begun or attempt > 1, fail_at)
        except InputError as error:  # a key, a file, a reward: to be mended by hand, so trying again is no use
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception as error:  # anything else: the newest checkpoint is whole
            print(f"start {attempt} of {ATTEMPTS} failed: {error}; going on from the newest checkpoint", flush=True)
            fail_at = None
            continue
        trained = result.closed_groups.get("trained", 0)
        print(f"{result.steps} of {result.total_steps} steps; {trained} groups trained in this start")
        print(f"held-out accuracy {result.accuracy_before:.1%} before, {result.accuracy_after:.1%} after")
        print(f"policy: {Path(result.folder) / 'final'}")
        return 0
    return 3


if __name__ == "__main__":
    sys.exit(main())
