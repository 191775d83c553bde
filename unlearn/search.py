"""Choose the coefficient by rule, on validation scores only.

Ilharco et al. (2212.04089, section 3) take the coefficient that forgets most while the control task keeps at least
95 % of its accuracy, or loses at most half a point of perplexity. The same rule here, over every kept metric. Where
there are several goals, requests to forget or sets to learn, it is what is left of them on average that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unlearn.collapse import collapsed
from unlearn.errors import EvaluationError
from unlearn.metrics import Key, is_perplexity
from unlearn.recipe import ChooseSpec
from unlearn.report import Chosen, SweepPoint, TaskScore
from unlearn.wording import listing


def judge(
    coefficient: float, scores: Sequence[TaskScore], base: Sequence[TaskScore], kept: Sequence[Key], spec: ChooseSpec
) -> SweepPoint:
    """Compare the kept metrics at one coefficient with the target model's own.

    Args:
        coefficient: Where ``scores`` were taken.
        scores: All validation scores there.
        base: All validation scores at coefficient 0.
        kept: Keys of the metrics that must stay.
        spec: The bounds: ``keep`` as a share, ``perplexity`` as a rise.

    Returns:
        The point, with one plain phrase per broken bound.

    Raises:
        EvaluationError: a kept metric is missing, or a score was taken on test items.
    """
    here, before = _validation(scores), _validation(base)
    broken = []
    for key in kept:
        if key not in here or key not in before:
            raise EvaluationError(
                f"the kept metric {say_key(key)} has no validation score at coefficient {coefficient:g}"
            )
        problem = _broken(here[key], before[key], spec)
        if problem:
            broken.append(f"{say_key(key)} {problem}")
    gone = collapsed(here, before, kept, spec.collapse)
    return SweepPoint(coefficient, tuple(scores), not broken, tuple(broken), collapsed=gone)


def choose(points: Sequence[SweepPoint], goals: Sequence[Key], kept: Sequence[Key], spec: ChooseSpec) -> Chosen:
    """The coefficient above 0 that forgets (learns) most among those within every bound; the smaller one on a tie.

    Returns:
        Coefficient 0 and ``bound_met`` False when no coefficient above 0 is within the bounds *and* forgets (learns)
        more than the target model: the model is then left as it is. ``forget_metric`` is the first goal's.

    Raises:
        EvaluationError: a goal's metric is missing at some coefficient, or a score was taken on test items.
    """
    for point in points:
        _validation(point.scores)
    known = {p.coefficient: left(p, goals) for p in points}
    if 0.0 not in known:
        raise EvaluationError(_unscored(goals[0], 0.0))
    passing = [p for p in points if p.coefficient > 0 and may_be_chosen(p) and known[p.coefficient] < known[0.0]]
    best = min(passing, key=lambda p: (known[p.coefficient], p.coefficient), default=None)
    return Chosen(
        coefficient=best.coefficient if best else 0.0,
        bound_met=best is not None,
        rule=rule(spec, goals, kept),
        forget_metric=goals[0][2],
        keep=spec.keep,
        perplexity=spec.perplexity,
        kept=tuple(kept),
    )


def left(point: SweepPoint, goals: Sequence[Key]) -> float:
    """What is left to do at a point, to be made as small as can be: the mean over the goals.

    Of a forget set it is what the model still knows, its score; of a set to learn, the score negated. Where a metric is
    better when lower, the other way round. A collapsed model without any score has everything left to do.

    Raises:
        EvaluationError: the point has no score of a goal's metric.
    """
    if point.collapsed and not point.scores:
        return math.inf
    return math.fsum(_left(point, goal) for goal in goals) / len(goals)


def may_be_chosen(point: SweepPoint) -> bool:
    """Whether the rule's bounds hold at a point."""
    return point.within_bound and not point.collapsed


def rule(spec: ChooseSpec, goals: Sequence[Key], kept: Sequence[Key]) -> str:
    """The rule in words, for reports."""
    wanted = []
    for role, verb in (("forget", "forgetting"), ("learn", "learning")):
        of = [f"{name} ({metric})" for set_, name, metric in goals if set_ == role]
        wanted += [f"{verb} of {listing(of)}"] if of else []
    goal = f"most {listing(wanted)} on validation items" + (", on average" if len(goals) > 1 else "")
    if not kept:
        return goal + "; nothing was asked to be kept"
    bounds = []
    if any(not is_perplexity(k[2]) for k in kept):
        bounds.append(f"at least {spec.keep:.0%} of the target model's score")
    if any(is_perplexity(k[2]) for k in kept):
        bounds.append(f"at most +{spec.perplexity:g} perplexity")
    return f"{goal}, while every kept metric stays within its bound: {' or '.join(bounds)}"


def say_key(key: Key) -> str:
    """A metric in a sentence: set, name, metric."""
    return f"{key[0]} {key[1]} {key[2]}"


def _left(point: SweepPoint, goal: Key) -> float:
    for score in point.scores:
        if score.key == goal:
            down = (goal[0] == "forget") == score.higher_is_better
            return score.score.value if down else -score.score.value
    raise EvaluationError(_unscored(goal, point.coefficient))


def _unscored(goal: Key, coefficient: float) -> str:
    return f"the {goal[0]} metric {say_key(goal)} has no validation score at coefficient {coefficient:g}"


def _broken(here: TaskScore, before: TaskScore, spec: ChooseSpec) -> str:
    """Why a kept metric is out of bounds, or nothing."""
    now, was = here.score.value, before.score.value
    if not (math.isfinite(now) and math.isfinite(was)):
        return f"is {now} (was {was})"
    slack = 1e-9 * max(abs(was), 1.0)  # equal scores must not fail by rounding
    if is_perplexity(here.metric):
        return f"rose to {now:.4g} from {was:.4g}" if now > was + spec.perplexity + slack else ""
    if here.higher_is_better:
        # a negative score (a log-probability) keeps its share by not growing more than 1/keep times as large
        floor = was * spec.keep if was >= 0 else (was / spec.keep if spec.keep else -math.inf)
        return f"fell to {now:.4g} from {was:.4g}" if now < floor - slack else ""
    ceiling = was / spec.keep if spec.keep else math.inf
    return f"rose to {now:.4g} from {was:.4g}" if now > ceiling + slack else ""


def _validation(scores: Sequence[TaskScore]) -> dict[Key, TaskScore]:
    """Scores by key; a coefficient chosen on test items would be no evidence, so those are an error here."""
    wrong = [s for s in scores if s.split != "validation"]
    if wrong:
        culprit = wrong[0]
        raise EvaluationError(
            f"the coefficient is chosen on validation items, but {say_key(culprit.key)} is on {culprit.split} ones"
        )
    return {s.key: s for s in scores}
