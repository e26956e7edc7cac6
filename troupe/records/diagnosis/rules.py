"""The rules: each looks at the newest steps and says what is wrong, with the figures that say so and one remedy.

A bound is chosen so that a run that goes well, also one that has learned all there is to learn, never comes near it. So
most rules ask for two things: the figure itself, and that the reward does not rise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from troupe.records.diagnosis.history import WINDOW, Evaluation, History

NO_SIGNAL = 0.8
"""Part of the groups without signal. A third to a half is common in good runs (DAPO, arXiv:2503.14476, figure 3b); at
four fifths a step learns from a fifth of what it sampled."""
CUT = 0.8
"""Part of the completions that the limit cut. Below it some still end, and the reward can teach them to."""
IN_THOUGHTS = 0.5
"""Part of those that were cut within `<think>` from which on thoughts are what is too long."""
ENTROPY_LOW, ENTROPY_FALL = 0.05, 0.2
"""Nats a token, and part of what the entropy began at: both of a policy that has one answer left. The entropy is what a
reward is bought with (Cui et al. 2025, arXiv:2505.22617): without it a reward that has stopped rising stays."""
ENTROPY_RISE, ENTROPY_ADDED = 2.0, 0.3
"""Times what it began at, and nats above it."""
KL_HIGH = 1.0
"""Nats a token, the median of steps. Policies tuned with a penalty stay below some tenths; the whole of a sentence then
is as likely as a random one for the reference."""
DRIFT, DRIFT_TOKENS = 3.0, 16.0
"""Times longer or shorter, and by at least so many tokens. Lengths that grow with the reward are how reasoning is
learned (arXiv:2501.12948), so only those count that bring none."""
CLIPPED, CLIPPED_SEQUENCE = 0.2, 0.5
"""Part of the tokens. PPO's rule of thumb is 0.1 to 0.2; GSPO clips by whole sequences, 15 % in a good run
(arXiv:2507.18071)."""
EXPOSED, EXPOSED_S = 0.3, 0.5
"""Part of a step in which the device waits for rewards, and seconds of it."""
EPOCHS, FEW_ROWS = 20.0, 64.0
"""Passes over so few rows after which they are known by heart."""
MOVED = 2e-5
"""Part of the 16-bit weights that an update moves. At the usual rate of 1e-6 it is 2e-4 to 1e-3 (SmolLM2-135M, whose
weights are large); ten times below the least of that the policy that samples stays the same for hundreds of steps."""
SKIPPED = 2
"""Updates of a window that were not finite: one may be a batch's own fault."""
LOST = 0.5
"""Part of the spread of rewards by which the reward is below its best: more than data in another order makes of it."""
FELL = 0.1
"""Part of the best evaluation that is a fall, where no standard error is told."""


class Found(NamedTuple):
    """What a rule says."""

    evidence: str
    remedy: str


class Rule(NamedTuple):
    """One line of the table."""

    name: str
    title: str
    look: Callable[[History], Found | None]
    """None where nothing is wrong, or too little is known."""
    hold: int = 5
    """Steps in a row that it has to say so."""


def _nonfinite(of: History) -> Found | None:
    skipped = sum(value > 0 for value in of.values("nonfinite"))
    if skipped < SKIPPED:
        return None
    return Found(f"{skipped} of the last {WINDOW} updates were not finite and were skipped", _other_rate(of, 0.5))


def _entropy_explosion(of: History) -> Found | None:
    now, start = of.mean("entropy"), of.start("entropy")
    if now is None or start is None or now < ENTROPY_RISE * start or now < start + ENTROPY_ADDED or _has_gained(of):
        return None
    coef = of.setting("learner.entropy_coef", 0.0)
    remedy = f"--set learner.entropy_coef={_one_digit(coef / 2)}" if coef > 0 else _other_rate(of, 0.5)
    return Found(f"the entropy rose from {start:.2f} to {now:.2f} nats a token and the reward did not", remedy)


def _kl_explosion(of: History) -> Found | None:
    kl = of.median("kl")
    if kl is None or kl < KL_HIGH or _has_mastered(of):
        return None
    beta = of.setting("learner.beta", 0.0)
    remedy = f"--set learner.beta={_one_digit(4 * beta)}" if beta > 0 else _other_rate(of, 0.5)
    return Found(f"the KL to the reference is {kl:.2f} nats a token", remedy)


def _held_out_down(of: History) -> Found | None:
    for name, values in of.evaluations():
        if len(values) < 3:
            continue
        best = max(values[:-2], key=lambda one: one.value)
        reward, then = of.mean("reward"), of.reward_at(best.step)
        if reward is None or then is None or reward <= then:
            continue
        if all(_is_below(one, best) for one in values[-2:]):
            last = values[-1]
            patience = of.setting("evaluation.patience", 0)
            return Found(
                f"{name} fell from {best.value:.3f} (step {best.step:,}) to {last.value:.3f} (step {last.step:,}) "
                f"while the reward rose from {then:.3f} to {reward:.3f}",
                _other_rate(of, 0.5) if patience else "--set evaluation.patience=3",
            )
    return None


def _is_below(one: Evaluation, best: Evaluation) -> bool:
    error = FELL * abs(best.value)
    if one.error is not None and best.error is not None:
        error = 2.0 * math.hypot(one.error, best.error)
    return best.value - one.value > max(error, 1e-9)


def _reward_down(of: History) -> Found | None:
    now, start = of.mean("reward"), of.start("reward")
    if now is None or start is None or _has_curriculum(of) or _ignores_rewards(of):
        return None
    best = max(of.peak("reward") or start, start)
    if best - now <= LOST * (of.peak("reward_std") or 0.0) + _chance(of):
        return None
    times = 0.1 if now < start - _chance(of) else 0.5  # below its beginning: broken, not only shaken
    return Found(f"from {best:.3f} at best to {now:.3f}", _other_rate(of, times))


def _entropy_collapse(of: History) -> Found | None:
    now, start = of.mean("entropy"), of.start("entropy")
    if now is None or start is None or now > ENTROPY_LOW or now > ENTROPY_FALL * start or _goes_well(of):
        return None
    coef = of.setting("learner.entropy_coef", 0.0)
    return Found(
        f"the entropy fell from {start:.3f} to {now:.3f} nats a token and the reward has stopped rising",
        f"--set learner.entropy_coef={_one_digit(coef * 2 if coef > 0 else 0.001)}",
    )


def _no_signal(of: History) -> Found | None:
    part = of.mean("frac_reward_zero_std")
    if part is None or part < NO_SIGNAL or _goes_well(of) or _is_taught(of):
        return None
    reward = of.mean("reward")
    told = "" if reward is None else f", at a mean reward of {reward:.3f}"
    remedy = "--set learner.dynamic_sampling=true"
    if of.setting("learner.dynamic_sampling", False):
        remedy = "--set curriculum.enabled=true"
    if _has_curriculum(of) or part > 0.98:  # others in their place would be the same
        remedy = f"--set generation.num_generations={2 * of.setting('generation.num_generations', 8)}"
    return Found(f"in {part:.0%} of the groups all rewards are equal and teach nothing{told}", remedy)


def _cut(of: History) -> Found | None:
    cut, limit = of.mean("completions/clipped_ratio"), of.setting("generation.max_completion_length")
    if cut is None or cut < CUT or not isinstance(limit, int) or _goes_well(of):
        return None
    evidence, times = f"{cut:.0%} of the completions are cut at {limit:,} tokens", 2
    thoughts = of.mean("completions/clipped_in_thoughts")
    if thoughts is not None and thoughts >= IN_THOUGHTS * cut:
        evidence, times = f"{evidence}, {thoughts:.0%} before </think>", 4
    return Found(evidence, f"--set generation.max_completion_length={times * limit}")


def _clipped(of: History) -> Found | None:
    bound = CLIPPED_SEQUENCE if of.setting("learner.importance_sampling_level") == "sequence" else CLIPPED
    part = of.mean("clip_ratio/region_mean")
    if part is None or part < bound:
        return None
    passes = of.setting("learner.num_iterations", 1)
    remedy = f"--set learner.num_iterations={passes // 2}" if passes > 1 else _other_rate(of, 0.5)
    return Found(f"the ratio of {part:.0%} of the tokens is clipped", remedy)


def _unmoved(of: History) -> Found | None:
    part, rates, peak = of.mean("weights/moved"), of.values("learning_rate"), of.peak("learning_rate")
    if part is None or part >= MOVED or not rates or peak is None:
        return None
    if min(rates) < 0.5 * peak or rates[-1] > 1.05 * rates[0]:  # it warms up, or fades out
        return None
    times = min(100.0, max(10.0, 10.0 * MOVED / part if part > 0 else 100.0))
    return Found(f"an update moves {100 * part:.2g}% of the 16-bit weights", _other_rate(of, times))


def _lengths(of: History) -> Found | None:
    now, start = of.mean("completions/mean_length"), of.start("completions/mean_length")
    if now is None or start is None or abs(now - start) < DRIFT_TOKENS or _has_gained(of):
        return None
    told = f"completions went from {start:,.0f} to {now:,.0f} tokens and the reward did not rise"
    if now >= DRIFT * start:
        is_fair = of.setting("learner.loss_type") == "dr_grpo"
        return Found(told, _other_rate(of, 0.5) if is_fair else "--set learner.loss_type=dr_grpo")
    return Found(told, _other_rate(of, 0.5)) if now <= start / DRIFT else None


def _few_rows(of: History) -> Found | None:
    epochs = max(of.values("epoch"), default=0.0)
    rows = of.step * of.setting("learner.batch_size", 0) / epochs if epochs else 0.0
    if not of.is_full or epochs < EPOCHS or not 0 < rows <= FEW_ROWS:
        return None
    told = "the only row" if round(rows) == 1 else f"each of the {rows:.0f} rows"
    return Found(f"{told} has been prompted {epochs:.0f} times", "--set data.path=MORE_ROWS.jsonl")


def _reward_time(of: History) -> Found | None:
    waited, step_s = of.mean("time/reward/exposed_s"), of.mean("step_time")
    if waited is None or not step_s or waited < max(EXPOSED * step_s, EXPOSED_S):
        return None
    remedy = f"--set rewards.concurrency={2 * of.setting('rewards.concurrency', 16)}"
    if of.setting("schedule.max_staleness") == 0:
        remedy = "--set schedule.max_staleness=1"
    return Found(f"of {step_s:.1f} s a step the device waits {waited:.1f} s for rewards", remedy)


def _has_gained(of: History) -> bool:
    """Whether the reward is above what the run began at, by more than chance; also where rows get harder on the way,
    or rewards are not learned from, so that nobody can say."""
    now, start = of.mean("reward"), of.start("reward")
    return (
        _has_curriculum(of)
        or _ignores_rewards(of)
        or (now is not None and start is not None and now - start > _chance(of))
    )


def _has_mastered(of: History) -> bool:
    """Whether the reward has risen so far that completions hardly differ any more."""
    spread, peak = of.mean("reward_std"), of.peak("reward_std")
    return _has_gained(of) and spread is not None and peak is not None and spread <= 0.5 * peak


def _goes_well(of: History) -> bool:
    """Whether the reward still rises, by more than chance, or has come as far as it can; also where too little is known
    to say."""
    now, before = of.mean("reward"), of.before("reward")
    before = of.start("reward") if before is None else before
    if now is None or before is None or _ignores_rewards(of):
        return True
    return now - before > _chance(of) or _has_mastered(of)


def _has_curriculum(of: History) -> bool:
    """Whether the rows that are drawn are harder the better the policy is."""
    return bool(of.setting("curriculum.enabled", False))


def _is_taught(of: History) -> bool:
    """Whether a teacher is learned from, too, who tells completions of equal rewards apart."""
    is_there = any(of.setting(f"teacher.{key}") for key in ("path", "models", "model_kind"))
    return is_there and of.setting("teacher.coef", 1.0) > 0.0


def _ignores_rewards(of: History) -> bool:
    """Whether a teacher alone is learned from."""
    return _is_taught(of) and of.setting("teacher.reward_coef", 1.0) == 0.0


def _chance(of: History) -> float:
    """By how much the means of two windows may differ for no reason: twice the standard error, prompts being what
    counts."""
    spread = of.peak("reward_std") or 0.0
    return 2.0 * spread * math.sqrt(2.0 / (WINDOW * max(1, of.setting("learner.batch_size", 1))))


def _other_rate(of: History, times: float) -> str:
    """The learning rate that the run has, times something."""
    rate = of.peak("learning_rate") or of.setting("learner.lr") or 1e-6
    return f"--set learner.lr={_one_digit(rate * times)}"


def _one_digit(value: float) -> str:
    return f"{value:.1g}"


RULES = (
    Rule("nonfinite", "updates skipped", _nonfinite, hold=1),
    Rule("entropy_explosion", "the policy becomes noise", _entropy_explosion),
    Rule("kl_explosion", "far from the reference", _kl_explosion),
    Rule("held_out_down", "learned by heart", _held_out_down),
    Rule("reward_down", "the reward falls", _reward_down),
    Rule("entropy_collapse", "nothing left to try", _entropy_collapse),
    Rule("no_signal", "no signal", _no_signal),
    Rule("cut", "cut at the limit", _cut),
    Rule("clipped", "steps too large", _clipped),
    Rule("unmoved", "weights stay", _unmoved),
    Rule("lengths", "lengths drift", _lengths),
    Rule("few_rows", "few rows", _few_rows),
    Rule("reward_time", "rewards hold up the device", _reward_time),
)
"""The most serious first."""
