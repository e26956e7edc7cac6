"""What samples of each row say about a policy: avg@k, pass@k, maj@k, with standard errors; and pairs of policies.

Rows count alike, and standard errors are those of a mean over rows: the samples of a row are not independent of each
other. A score that is missing is left out, never 0; a row without any is left out.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any, TypeAlias

import msgspec

from troupe.messages import EvaluatedRow
from troupe.rewards.builtin import exact_answer_reward

Scores: TypeAlias = Sequence[float | None]
"""Of the samples of a row."""
_BEGIN, _END = "<answer>", "</answer>"
_NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d{0,30})?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")
_LONGEST_ANSWER = 1000
"""Characters; what is longer is compared as it is."""
_CONFIDENCE = 0.95
_FIGURES = ("accuracy", "length", "clipped", "missing")
"""Those that a reward may be called like."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean over rows."""

    mean: float
    se: float | None
    """Standard error; None of a single row."""
    rows: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two policies on the same rows: what the second does better, row by row."""

    rows: int
    """That both have a score of."""
    left_out: int
    """That only one has, or none."""
    better: tuple[Any, ...]
    """Rows whose mean score is higher with the second."""
    worse: tuple[Any, ...]
    difference: float
    """Mean over rows of the second's mean score less the first's."""
    low: float | None
    """The difference's 95 % confidence interval by Student's t over rows; None of a single row."""
    high: float | None
    p: float
    """How often chance alone would make a difference of at least this size if the policies were equally good."""
    test: str
    """How p was found: `sign` (exact; McNemar's, where every row passes or fails) or `t` (paired, over rows)."""

    @property
    def ties(self) -> int:
        """Rows with equal mean scores."""
        return self.rows - len(self.better) - len(self.worse)

    @property
    def is_more_than_noise(self) -> bool:
        """Whether chance alone makes such a difference less than once in twenty times."""
        return self.p < 1 - _CONFIDENCE

    @property
    def counts(self) -> str:
        """The rows in words."""
        left_out = f", {self.left_out} left out (no score)" if self.left_out else ""
        rows = "row" if len(self.better) == 1 else "rows"
        return f"{len(self.better)} {rows} better, {len(self.worse)} worse, {self.ties} equal{left_out}"

    @property
    def verdict(self) -> str:
        """Whether the difference is more than noise, in words."""
        rows = f"{self.rows} row{'' if self.rows == 1 else 's'}"
        if not self.better and not self.worse:
            return f"no difference over {rows}"
        test = "exact sign test" if self.test == "sign" else "paired t-test"
        word = "more than noise" if self.is_more_than_noise else "this may be noise"
        return f"{word}: p = {self.p:.2g}, {test} over {rows}"


def over_rows(values: Sequence[float]) -> Estimate | None:
    """The mean of one value a row; None of none."""
    if not values:
        return None
    se = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), se, len(values))


def average(rows: Iterable[Scores]) -> Estimate | None:
    """avg@k: the mean of the rows' mean scores."""
    return over_rows([fmean(known) for scores in rows if (known := _known(scores))])


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): how likely one of k samples passes, from n ≥ k samples of which c passed; unbiased
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1)."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def pass_at(rows: Iterable[Scores], k: int, passes_from: float = 1.0) -> Estimate | None:
    """pass@k over the rows that have at least k scores; a sample passes with a score of `passes_from`."""
    known = [_known(scores) for scores in rows]
    return over_rows([pass_at_k(len(s), sum(x >= passes_from for x in s), k) for s in known if len(s) >= k])


def majority(rows: Iterable[tuple[Sequence[str], Scores]], passes_from: float = 1.0) -> Estimate | None:
    """maj@k: whether a row's commonest answer passes. `rows`: texts and scores of each row's samples.

    Answers are compared as `answer_in` reads them; where several are as common, the mean of theirs counts.
    """
    values = []
    for texts, scores in rows:
        votes: dict[str, list[bool]] = defaultdict(list)
        for text, score in zip(texts, scores, strict=True):
            if score is not None:
                votes[answer_in(text)].append(score >= passes_from)
        if votes:
            most = max(map(len, votes.values()))
            values.append(fmean(fmean(passed) for passed in votes.values() if len(passed) == most))
    return over_rows(values)


def answer_in(text: str) -> str:
    """The answer that a completion gives, to be compared with others: what the last `\\boxed{…}` holds, else the last
    `<answer>…</answer>`, else what follows the last `####`, else all that is not thought. Numbers of one value are one
    answer."""
    said = text.rpartition("</think>")[2]
    found = _boxed(said)
    if found is None and (end := said.rfind(_END)) >= 0 and (begin := said.rfind(_BEGIN, 0, end)) >= 0:
        found = said[begin + len(_BEGIN) : end]
    if found is None:
        found = said.rpartition("####")[2]
    if len(found) > _LONGEST_ANSWER:
        return found
    answer = " ".join(found.strip().strip("$").split())
    plain = _THOUSANDS.sub("", answer)
    return str(Fraction(plain)) if _NUMBER.fullmatch(plain) else answer


def compared(first: Mapping[Any, Scores], second: Mapping[Any, Scores]) -> Comparison | None:
    """Two policies, each with a row's name → its scores; None where they share no row that both have a score of.

    Where every difference is of one size, as of samples that pass or fail, p is that of the exact sign test on the rows
    that differ; else that of the paired t-test on the rows' mean scores. Both are two-sided.
    """
    means = [{row: fmean(known) for row, scores in one.items() if (known := _known(scores))} for one in (first, second)]
    shared = [row for row in means[0] if row in means[1]]
    if not shared:
        return None
    differences = {row: means[1][row] - means[0][row] for row in shared}
    better = tuple(row for row in shared if differences[row] > 0)
    worse = tuple(row for row in shared if differences[row] < 0)
    estimate = over_rows(list(differences.values()))
    assert estimate is not None
    degrees, se = len(shared) - 1, estimate.se or 0.0
    sizes = {abs(difference) for difference in differences.values() if difference}
    by_sign = len(sizes) <= 1 or not se
    margin = None if estimate.se is None else _t_quantile(_CONFIDENCE, degrees) * se
    return Comparison(
        rows=len(shared),
        left_out=len(first.keys() | second.keys()) - len(shared),
        better=better,
        worse=worse,
        difference=estimate.mean,
        low=None if margin is None else estimate.mean - margin,
        high=None if margin is None else estimate.mean + margin,
        p=sign_test(len(better), len(worse)) if by_sign else t_test(estimate.mean / se, degrees),
        test="sign" if by_sign else "t",
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so many wins and losses where either is as likely; exact."""
    total, ways, tail = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (total - i) // (i + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**total)))


def t_test(t: float, degrees: int) -> float:
    """Two-sided p of Student's t with so many degrees of freedom."""
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def figures_of(
    name: str, rows: Sequence[EvaluatedRow], *, passes_from: float = 1.0, pass_at_ks: Sequence[int] | None = None
) -> dict[str, float]:
    """The metrics `eval/NAME/…` of an evaluated set: `figures` under its name."""
    found = figures(rows, passes_from=passes_from, pass_at_ks=pass_at_ks)
    return {f"eval/{name}/{key}": value for key, value in found.items()}


def figures(
    rows: Sequence[EvaluatedRow], *, passes_from: float = 1.0, pass_at_ks: Sequence[int] | None = None
) -> dict[str, float]:
    """What rows come to; what nothing is known of is left out.

    `avg@K`, `pass@k`, `maj@K` and `accuracy` each have a standard error beside them (`…_se`). K is the number of
    samples of a row; k is 1, 2, 4, … and K, or `pass_at_ks`. `length` is tokens, `clipped` and `missing` are shares of
    the samples: cut at the limit, and without a score. Each reward has its mean, as `reward_figure` names it.
    """
    most = max((len(row.samples) for row in rows), default=0)
    ks = powers_up_to(most) if pass_at_ks is None else pass_at_ks
    scores = [[sample.score for sample in row.samples] for row in rows]
    estimates = {f"avg@{most}": average(scores)}
    estimates |= {f"pass@{k}": pass_at(scores, k, passes_from) for k in ks}
    answered = [row for row in rows if row.columns.get("answer") is not None]
    if answered and most > 1:
        votes = [([s.text for s in row.samples], [s.score for s in row.samples]) for row in answered]
        estimates[f"maj@{most}"] = majority(votes, passes_from)
    estimates["accuracy"] = average(_exactly(row) for row in answered)
    found = {}
    for key, estimate in estimates.items():
        if estimate is not None:
            found[key] = estimate.mean
            found |= {} if estimate.se is None else {f"{key}_se": estimate.se}
    samples = [sample for row in rows for sample in row.samples]
    if samples:
        found["length"] = fmean(sample.tokens for sample in samples)
        found["clipped"] = fmean(sample.finish_reason == "length" for sample in samples)
        found["missing"] = fmean(sample.score is None for sample in samples)
    for reward, mean in reward_means(rows).items():
        if mean is not None:
            found[reward_figure(reward)] = mean
    return found


def reward_figure(reward: str) -> str:
    """What a reward's mean is called among the figures of rows: its name, but for one that a figure has."""
    return f"reward/{reward}" if reward in _FIGURES else reward


def reward_means(rows: Iterable[EvaluatedRow]) -> dict[str, float | None]:
    """Reward → its mean over the samples that it scored; None where it scored none."""
    columns: dict[str, list[float]] = {}
    for sample in (sample for row in rows for sample in row.samples):
        for reward, score in sample.scores.items():
            columns.setdefault(reward, []).extend(_known([score]))
    return {reward: fmean(known) if known else None for reward, known in columns.items()}


def scores_by_row(rows: Iterable[EvaluatedRow], reward: str | None = None) -> dict[int, Scores]:
    """Row → scores of its samples, as `compared` takes them; `reward`: None for the weighted sum."""
    return {
        row.row: [sample.score if reward is None else sample.scores.get(reward) for sample in row.samples]
        for row in rows
    }


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def _exactly(row: EvaluatedRow) -> Scores:
    texts, answers = [sample.text for sample in row.samples], [row.columns["answer"]] * len(row.samples)
    scores: Scores = exact_answer_reward(texts, answers)
    return scores


def _known(scores: Scores) -> list[float]:
    return [score for score in scores if score is not None and math.isfinite(score)]


def _boxed(text: str) -> str | None:
    """What stands between the braces of the last `\\boxed{…}`."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _t_quantile(confidence: float, degrees: int) -> float:
    """Between −t and t lies so much of Student's t."""
    low, high = 0.0, 1.0
    while t_test(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, degrees) > 1 - confidence else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    size = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    fraction = 0.0
    for m in range(200, 0, -1):  # from its end: the terms beyond are too small to count
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = even / (1 + odd / (1 + fraction))
    first = -(a + b) * x / (a + 1)
    return size / (1 + first / (1 + fraction))
