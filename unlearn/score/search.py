"""Choose the coefficient by rule, on validation scores only.

Ilharco et al. (2212.04089, section 3) take the coefficient that forgets most while the control task keeps at least
95 % of its accuracy, or loses at most half a point of perplexity. The same rule here, over every kept metric. Where
there are several goals, requests to forget or sets to learn, each counts as the share of it that is left to do, so
that an accuracy and a perplexity weigh the same, and the mean of the shares is what is made small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from unlearn.errors import EvaluationError
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.metrics import Key, is_perplexity
from unlearn.results import Chosen, SweepPoint, TaskScore
from unlearn.text import listing, number, percent

if TYPE_CHECKING:
    from unlearn.vector.task_vector import TaskVector

BROKEN = "its log-likelihoods are no numbers"
TOKENS = 3.0  # that the answer of a choice counts as


def collapsed(scores: Mapping[Key, TaskScore], base: Mapping[Key, TaskScore], kept: Sequence[Key], limit: float) -> str:
    """Why the model counts as broken here, or nothing: the loss of a kept set rose by more than ``limit`` nats."""
    sets = {key[:2] for key in kept}
    worst, where = 0.0, ""
    for key, before in base.items():
        if key[:2] in sets and key in scores and (rise := _rise(before, scores[key])) is not None and rise > worst:
            worst, where = rise, f"{key[0]} {key[1]}"
    if worst <= limit:
        return ""
    return f"the loss on {where} rose by {worst:.1f} nats per token, more than {limit:g}: the model has collapsed"


def _rise(before: TaskScore, after: TaskScore) -> float | None:
    """Of a loss, in nats; None for metrics that are none."""
    was, now = before.score.value, after.score.value
    if not math.isfinite(was):
        return None
    if before.metric == "loss":
        return now - was
    if before.metric == "logprob":
        return (was - now) / TOKENS
    if is_perplexity(before.metric) and was > 0 and 0 < now < math.inf:
        return math.log(now / was)
    return None


_SLACK = 1e-9  # rounding
_LARGEST = 700.0  # nats whose exponential a float holds


def judge(
    coefficient: float, scores: Sequence[TaskScore], base: Sequence[TaskScore], kept: Sequence[Key], spec: ChooseSpec
) -> SweepPoint:
    """The point at one coefficient: all validation scores there, the kept metrics compared with those at 0 (``base``).

    It has one plain phrase for each of the bounds, ``keep`` as a share and ``perplexity`` as a rise, that is broken.
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

    Coefficient 0 and ``bound_met`` False when no coefficient above 0 is within the bounds *and* forgets (learns) more
    than the target model: the model is then left as it is. ``forget_metric`` is the first goal's.
    """
    for point in points:
        _validation(point.scores)
    base = next((p for p in points if p.coefficient == 0), SweepPoint(0.0, (), False))
    known = {p.coefficient: remaining(p, goals, base) for p in points}
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
        goals=tuple(goals),
    )


def remaining(point: SweepPoint, goals: Sequence[Key], base: SweepPoint) -> float:
    """What is left to do at a point, to be made as small as can be: the mean over the goals of :func:`share_left`.

    1 at ``base``, the point at coefficient 0. Goals of which nothing is to be done there are left out. A collapsed
    model without any score has everything left to do.
    """
    if point.collapsed and not point.scores:
        return math.inf
    pairs = [(goal, _find(base, goal), _find(point, goal)) for goal in goals]
    shares = [share_left(goal, was, now) for goal, was, now in pairs]
    known = [share for share in shares if share is not None]
    if not known:
        said = "; ".join(f"{say_key(goal)} is {number(was)}" for goal, was, _ in pairs)
        raise EvaluationError(
            f"there is nothing to {' or '.join(dict.fromkeys(goal[0] for goal in goals))} on the validation items, as "
            f"the model is before any edit: {said}. Take other items, or a metric of likelihoods as choose.metric "
            "(prob, logprob, loss or perplexity, by kind of data)"
        )
    return math.fsum(known) / len(known)


def share_left(goal: Key, before: float, now: float) -> float | None:
    """How much of a goal is left to do: 1 at the score before, 0 when all is done; None where there was nothing to do.

    Of a set to forget, the share of what the model knew that it still knows; of one to learn, the share of what it did
    not know that it still does not. What it knows is a number between 0 and 1: a share of right answers, a
    probability, and where the metric is in nats or a perplexity the likelihood behind it, which is exp(log-probability)
    or 1/perplexity. So of a perplexity to be driven up exp(-log(now/before)) is left.
    """
    was, here = (_nats(goal[2], value) for value in (before, now))
    if was is None or here is None:
        if goal[0] == "forget":
            return now / before if before > 0 else None
        return (1 - now) / (1 - before) if before < 1 else None
    if goal[0] == "forget":
        return math.exp(here - was) if not here - was > _LARGEST else math.inf
    return math.expm1(here) / math.expm1(was) if was < 0 else None


def without_purpose(goal: Key, before: float, chance: float | None) -> str:
    """Why a goal's score before the edit leaves nothing that an edit could show; empty where it does not."""
    if share_left(goal, before, before) is None:
        return f"is {number(before)} before the edit: there is nothing to {goal[0]}, and the choice does without it"
    if goal[0] == "forget" and chance is not None and before <= chance + _SLACK:
        return f"is {number(before)} before the edit, no more than guessing ({number(chance)}): it shows no forgetting"
    return ""


def blind(metric: str, higher_is_better: bool, before: float, chance: float | None, keep: float | None) -> str:
    """Why a kept metric can show no harm, by its score before the edit; empty where it can, or where nothing binds it.

    A share of 0 is 0, so that no fall breaks its bound, and who guesses before cannot be seen to guess after.
    """
    if is_perplexity(metric) or not higher_is_better or not keep:
        return ""
    if before == 0:
        return "is 0 before the edit, so that nothing can break its bound: it cannot show harm"
    if chance is not None and before <= chance + _SLACK:
        return (
            f"is {number(before)} before the edit, no more than guessing gives ({number(chance)}): it cannot show harm"
        )
    return ""


def doubted(
    scores: Sequence[TaskScore], goals: Sequence[Key], kept: Sequence[Key], keep: float | None
) -> dict[Key, str]:
    """The goals and kept metrics that scores before the edit make pointless, and why."""
    found: dict[Key, str] = {}
    for s in scores:
        why = without_purpose(s.key, s.score.value, s.chance) if s.key in goals else ""
        why = why or (blind(s.metric, s.higher_is_better, s.score.value, s.chance, keep) if s.key in kept else "")
        found |= {s.key: why} if why else {}
    return found


def require_grounds(base: SweepPoint, goals: Sequence[Key], kept: Sequence[Key], spec: ChooseSpec) -> Mapping[Key, str]:
    """What :func:`doubted` finds at coefficient 0, where it leaves the rule something to choose by."""
    remaining(base, goals, base)
    found = doubted(base.scores, goals, kept, spec.keep)
    if kept and all(key in found for key in kept):
        raise EvaluationError(
            "nothing that is to be kept could show harm on the validation items, so that any coefficient would pass: "
            f"{'; '.join(f'{say_key(key)} {found[key]}' for key in kept)}. Add a retain or utility set that the model "
            "does better on (kinds qa and text are scored by likelihoods), or leave these out"
        )
    return found


def may_be_chosen(point: SweepPoint) -> bool:
    """Whether the rule's bounds hold at a point."""
    return point.within_bound and not point.collapsed


def rule(spec: ChooseSpec, goals: Sequence[Key], kept: Sequence[Key]) -> str:
    """The rule in words, for reports."""
    wanted = []
    for role, verb in (("forget", "forgetting"), ("learn", "learning")):
        of = [f"{name} ({metric})" for set_, name, metric in goals if set_ == role]
        wanted += [f"{verb} of {listing(of)}"] if of else []
    goal = f"most {listing(wanted)} on validation items"
    if len(goals) > 1:
        goal += ", on average over what is left of each beside λ = 0"
    if not kept:
        return goal + "; nothing was asked to be kept"
    bounds = []
    if any(not is_perplexity(k[2]) for k in kept):
        bounds.append(f"at least {percent(spec.keep)} of the target model's score")
    if any(is_perplexity(k[2]) for k in kept):
        bounds.append(f"at most +{spec.perplexity:g} perplexity")
    return f"{goal}, while every kept metric stays within its bound: {' or '.join(bounds)}"


def say_key(key: Key) -> str:
    """A metric in a sentence: set, name, metric."""
    return f"{key[0]} {key[1]} {key[2]}"


def bound_of(
    metric: str, higher_is_better: bool, before: float, keep: float | None, perplexity: float | None
) -> float | None:
    """The value that a kept metric may not pass; None where there is no bound (``keep`` 0), or none is known."""
    if is_perplexity(metric):
        return None if perplexity is None else before + perplexity
    if not keep:
        return None
    # a negative score (a log-probability) keeps its share by not growing more than 1/keep times as large
    return before * keep if higher_is_better and before >= 0 else before / keep


def holds(
    metric: str, higher_is_better: bool, before: float, after: float, keep: float | None, perplexity: float | None
) -> bool:
    """Whether a kept metric is within its bound: the one verdict, of the rule and of every report.

    A score that is no number is within no bound.
    """
    if not (math.isfinite(after) and math.isfinite(before)):
        return False
    bound = bound_of(metric, higher_is_better, before, keep, perplexity)
    if bound is None:
        return True
    slack = _SLACK * max(abs(before), 1.0)  # equal scores must not fail by rounding
    falls = higher_is_better and not is_perplexity(metric)
    return after >= bound - slack if falls else after <= bound + slack


def _find(point: SweepPoint, goal: Key) -> float:
    for score in point.scores:
        if score.key == goal:
            return score.score.value
    raise EvaluationError(
        f"the {goal[0]} metric {say_key(goal)} has no validation score at coefficient {point.coefficient:g}"
    )


def _nats(metric: str, value: float) -> float | None:
    """The log-likelihood behind a score; None for metrics that are shares."""
    if is_perplexity(metric):
        return -math.log(value) if value > 0 else math.nan
    return {"loss": -value, "logprob": value}.get(metric)


def _broken(here: TaskScore, before: TaskScore, spec: ChooseSpec) -> str:
    """Why a kept metric is out of bounds, or nothing."""
    now, was = here.score.value, before.score.value
    if holds(here.metric, here.higher_is_better, was, now, spec.keep, spec.perplexity):
        return ""
    if not (math.isfinite(now) and math.isfinite(was)):
        return f"is {now} (was {was})"
    return f"{'rose' if now > was else 'fell'} to {now:.4g} from {was:.4g}"


def _validation(scores: Sequence[TaskScore]) -> dict[Key, TaskScore]:
    """Scores by key; a coefficient chosen on test items would be no evidence, so those are an error here."""
    wrong = [s for s in scores if s.split != "validation"]
    if wrong:
        culprit = wrong[0]
        raise EvaluationError(
            f"the coefficient is chosen on validation items, but {say_key(culprit.key)} is on {culprit.split} ones"
        )
    return {s.key: s for s in scores}


# -- the same choice without scoring all of the grid

_CONTINUOUS = ("prob", "logprob", "loss", "perplexity")


def may_tie(metric: str) -> bool:
    """Whether two coefficients may well have the same forget score: shares of right answers do, likelihoods do not."""
    return not metric.endswith(_CONTINUOUS)


def bisect(
    grid: Sequence[float],
    base: SweepPoint,
    score: Callable[[float], SweepPoint],
    remaining: Callable[[SweepPoint], float],
    *,
    ties: bool,
) -> tuple[SweepPoint, ...]:
    """Score what the choice from a grid (coefficients above 0, ascending) needs; returns ``base`` and these points.

    Args:
        base: The point at coefficient 0.
        score: The judged point at a coefficient.
        remaining: What the model still knows of the forget set at a point; larger is more.
        ties: Whether equal values are to be expected, so that the smallest coefficient of equal ones is looked for.
    """
    budget = max(len(grid) / 2, math.ceil(math.log2(len(grid) + 1)))
    found = {0: base}
    while (index := _next(found, len(grid), budget, remaining, ties)) is not None:
        found[index] = score(grid[index - 1])
    return tuple(found[index] for index in sorted(found))


def _next(
    found: Mapping[int, SweepPoint], size: int, budget: float, remaining: Callable[[SweepPoint], float], ties: bool
) -> int | None:
    """Which coefficient (1 to ``size``) to score next, None when the choice is found or the budget used up."""
    passing = [i for i, point in found.items() if i and may_be_chosen(point)]
    spare = budget - len(found)  # after one more; what was scored at 0 does not count
    if spare < 0:
        return None
    last = max(passing, default=0)
    broken = min((i for i in found if i > last), default=size + 1)
    best = min(
        (i for i in passing if remaining(found[i]) < remaining(found[0])),
        key=lambda i: (remaining(found[i]), i),
        default=0,
    )
    below = max((i for i in found if i < best), default=0)  # forgets less than best
    gap = best - below if ties else 0
    # Being one step off below is good enough; what that takes must be left when the bound is settled.
    if broken - last > 1 and spare >= _halvings(gap):
        return (last + broken) // 2
    if gap > 1:
        return (below + best) // 2
    return None


def _halvings(gap: int) -> int:
    """Probes that narrow a gap down to two."""
    return max(0, math.ceil(math.log2(gap / 2))) if gap else 0


# -- coefficients of several vectors, found together

ROUNDS = 3  # over all parts; every round costs at most two scorings per part

Name = TypeVar("Name", bound=str | tuple[str, ...])
JointScore = Callable[[tuple[float, ...]], SweepPoint]


@dataclass(frozen=True, slots=True)
class Tried:
    """One combination and what it gave. ``coefficients`` are in the order of the sorted names."""

    coefficients: tuple[float, ...]
    point: SweepPoint


def balance(
    names: Sequence[Name],
    grid: Sequence[float],
    score: JointScore,
    better: Callable[[SweepPoint, SweepPoint], bool],
    diagonal: Sequence[float] | None = None,
) -> tuple[dict[Name, float], tuple[Tried, ...]]:
    """Find the parts' relative weights. The order in which the names are given makes no difference.

    The start is the diagonal's best passing point, or all at the smallest coefficient where none passes. No part is
    ever given 0: a request that is not granted should be withdrawn, not dropped without a word.

    Args:
        grid: Coefficients above 0, ascending.
        score: Judges one coefficient per part, in the order of the sorted names. No combination is asked for twice.
        better: ``better(a, b)``: whether the rule prefers a to b, both of them within the bounds.
        diagonal: Coefficients of the grid to try for all parts alike; all of them when not given.

    Returns:
        A weight above 0 for every name, the largest 1, and every combination that was tried, in order.
    """
    parts = sorted(names)
    assert parts, "nothing to weigh"
    assert len(set(parts)) == len(parts), "a name is given twice"
    tried: dict[tuple[int, ...], SweepPoint] = {}

    def at(steps: tuple[int, ...]) -> SweepPoint:
        if steps not in tried:
            tried[steps] = score(tuple(grid[i] for i in steps))
        return tried[steps]

    def improves(steps: tuple[int, ...], than: tuple[int, ...]) -> bool:
        point, best = at(steps), at(than)
        return may_be_chosen(point) and (not may_be_chosen(best) or better(point, best))

    here = (0,) * len(parts)
    for index, coefficient in enumerate(grid):
        along = (index,) * len(parts)
        if (diagonal is None or coefficient in diagonal) and improves(along, here):
            here = along
    for _ in range(ROUNDS):
        before = here
        for i in range(len(parts)):
            for step in (1, -1):
                there = (*here[:i], here[i] + step, *here[i + 1 :])
                if 0 <= there[i] < len(grid) and improves(there, here):
                    here = there
                    break
        if here == before:
            break
    largest = grid[max(here)]
    weights = {name: grid[step] / largest for name, step in zip(parts, here, strict=True)}
    return weights, tuple(Tried(tuple(grid[i] for i in steps), point) for steps, point in tried.items())


def direction(parts: Mapping[Name, TaskVector], weights: Mapping[Name, float]) -> TaskVector:
    """The sum of the parts by weight: the same bits in whatever order they are given."""
    from unlearn.vector.task_vector import TaskVector  # brings torch, which the rule itself does without

    return TaskVector.sum(parts[name] * weights[name] for name in sorted(parts))
