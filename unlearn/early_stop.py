"""Rule a coefficient out on a part of the validation items, where a kept metric is out of bounds beyond doubt.

Whether a bound holds is a question about all N items, and n of them, drawn at random, often answer it. Every bound on
a mean is linear in the items: with floor = keep * mean(v(0)), the mean of v(c) is below it exactly if the mean of
d = v(c) - keep * v(0) is below 0, both taken on the same items. A perplexity p = exp(sum nll / sum tokens) exceeds its
limit exactly if d = nll(0) + log(limit / p(0)) * tokens - nll(c) is below 0 on average: sum nll(0) is log(p(0)) times
the tokens. So d is known of n items and its mean over N is asked for: a one-sided z-test with the standard error of a
sample without replacement, sd * sqrt((1 - n/N) / n) (Cochran, Sampling Techniques, section 2.6), at a level of one in
two thousand.

Only breaking can be settled so, never keeping: a wrong verdict can cost forgetting, but no bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from unlearn.metrics import Key, is_perplexity
from unlearn.recipe import ChooseSpec
from unlearn.report import TaskScore
from unlearn.search import say_key

FEW = 20  # items below which nothing is concluded
DOUBT = 3.29  # standard errors; one-sided level 1/2000
_SLACK = 1e-9  # equal scores must not fail by rounding

# By item number: (value, 1), or for a perplexity over tokens (log-likelihood, tokens).
Values = Mapping[int, tuple[float, float]]


def beyond_doubt(
    here: Mapping[Key, Values],
    base: Mapping[Key, Values],
    scores: Sequence[TaskScore],
    kept: Sequence[Key],
    spec: ChooseSpec,
) -> tuple[str, ...]:
    """Which bounds are broken, judged by some of the items.

    Args:
        here: Values of a random part of the items at some coefficient.
        base: Values of all items at coefficient 0.
        scores: All validation scores at coefficient 0.
        kept: Keys of the metrics that must stay.
        spec: The bounds.

    Returns:
        One phrase for each metric that is out of bounds beyond doubt, like those of :func:`unlearn.search.judge`. None
        for metrics whose score is not the mean of their items, or with fewer than :data:`FEW` items here.
    """
    found = []
    for score in _testable(base, scores, kept):
        now, before = here.get(score.key, {}), base[score.key]
        if len(now) < FEW or not now.keys() <= before.keys():
            continue
        if _surely_negative(_margins(now, before, score, spec), len(before), _SLACK * max(abs(score.score.value), 1.0)):
            was, value = (_total(score.metric, [v[item] for item in now]) for v in (before, now))
            moved = "fell" if score.higher_is_better else "rose"
            told = f"{moved} to {value:.4g} from {was:.4g} (on {len(now)} of {len(before)} items)"
            found.append(f"{say_key(score.key)} {told}")
    return tuple(found)


def worth_a_look(base: Mapping[Key, Values], scores: Sequence[TaskScore], kept: Sequence[Key], share: float) -> bool:
    """Whether ``share`` of the items could rule anything out."""
    return any(len(base[score.key]) * share >= FEW for score in _testable(base, scores, kept))


def _testable(base: Mapping[Key, Values], scores: Sequence[TaskScore], kept: Sequence[Key]) -> Iterator[TaskScore]:
    """Kept metrics whose score at 0 is what :func:`_total` makes of their items."""
    for score in scores:
        values = base.get(score.key)
        if score.key in kept and values:
            total = _total(score.metric, list(values.values()))
            if math.isclose(total, score.score.value, rel_tol=1e-6, abs_tol=_SLACK):
                yield score


def _total(metric: str, values: Sequence[tuple[float, float]]) -> float:
    """The score of some items; infinite where a perplexity overflows."""
    mean = math.fsum(value for value, _ in values) / math.fsum(weight for _, weight in values)
    if not is_perplexity(metric):
        return mean
    try:
        return math.exp(-mean)
    except OverflowError:
        return math.inf


def _margins(now: Values, before: Values, score: TaskScore, spec: ChooseSpec) -> list[float]:
    """Per item a number whose mean over all items is below 0 exactly if the bound is broken; none without a bound."""
    was = score.score.value
    if is_perplexity(score.metric):
        rise = math.log((was + spec.perplexity) / was)
        return [value - before[item][0] + rise * weight for item, (value, weight) in now.items()]
    if score.higher_is_better and was >= 0:
        return [now[item][0] - spec.keep * before[item][0] for item in now]
    if spec.keep == 0:
        return []
    # a loss, or a negative score, keeps its share by not growing more than 1/keep times as large
    sign = 1.0 if score.higher_is_better else -1.0
    return [sign * (now[item][0] - before[item][0] / spec.keep) for item in now]


def _surely_negative(margins: Sequence[float], total: int, slack: float) -> bool:
    """Whether the mean of ``total`` numbers, of which ``margins`` were drawn at random, is below 0 beyond doubt."""
    count = len(margins)
    if count < FEW:
        return False
    error = statistics.stdev(margins) * math.sqrt((1 - count / total) / count)
    return statistics.fmean(margins) + DOUBT * error < -slack
