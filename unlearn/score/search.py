"""Choose the coefficient by rule, on validation scores only.

Ilharco et al. (2212.04089, section 3) take the coefficient that forgets most while the control task keeps at least
95 % of its accuracy, or loses at most half a point of perplexity. The same rule here, over every kept metric. Of
several goals, sets to forget or to learn, each counts as the share of it that is left to do, and the mean of the shares
is minimised, so that an accuracy and a perplexity weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from unlearn.errors import EvaluationError
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.schema import Key, is_perplexity
from unlearn.results import Chosen, SweepPoint, TaskScore
from unlearn.text import listing, number, percent

BROKEN = "its log-likelihoods are no numbers"
TOKENS = 3.0  # that the answer of a choice counts as
_SLACK = 1e-9  # rounding
_LARGEST = 700.0  # nats whose exponential a float holds
_CONTINUOUS = ("prob", "logprob", "loss", "perplexity")


def collapsed(scores: Mapping[Key, TaskScore], base: Mapping[Key, TaskScore], kept: Sequence[Key], limit: float) -> str:
    """Why the model counts as broken here, or nothing: the loss of a kept set rose by more than ``limit`` nats."""
    sets = {key[:2] for key in kept}
    rises = {key: _rise(was, scores[key]) for key, was in base.items() if key[:2] in sets and key in scores}
    worst = max(rises, key=lambda key: rises[key], default=None)
    if worst is None or rises[worst] <= max(limit, 0.0):
        return ""
    return (
        f"the loss on {worst[0]} {worst[1]} rose by {rises[worst]:.1f} nats per token, more than {limit:g}: the model "
        "has collapsed"
    )


def _rise(before: TaskScore, after: TaskScore) -> float:
    """Of a loss, in nats; 0 for other metrics."""
    was, now = before.score.value, after.score.value
    if not math.isfinite(was) or math.isnan(now):
        return 0.0
    if before.metric == "loss":
        return now - was
    if before.metric == "logprob":
        return (was - now) / TOKENS
    if is_perplexity(before.metric) and was > 0 and 0 < now < math.inf:
        return math.log(now / was)
    return 0.0


def judge(
    coefficient: float, scores: Sequence[TaskScore], base: Sequence[TaskScore], kept: Sequence[Key], spec: ChooseSpec
) -> SweepPoint:
    """The point at a coefficient, from its validation scores and those at 0, with a phrase for each broken bound."""
    here, before = _validation(scores), _validation(base)
    broken = []
    for key in kept:
        if key not in here or key not in before:
            raise EvaluationError(
                f"the kept metric {say_key(key)} has no validation score at coefficient {coefficient:g}"
            )
        now, was, higher = here[key].score.value, before[key].score.value, here[key].higher_is_better
        if holds(key[2], higher, was, now, spec.keep, spec.perplexity):
            continue
        finite = math.isfinite(now) and math.isfinite(was)
        moved = f"{'rose' if now > was else 'fell'} to {now:.4g} from {was:.4g}" if finite else f"is {now} (was {was})"
        broken.append(f"{say_key(key)} {moved}")
    gone = collapsed(here, before, kept, spec.collapse)
    return SweepPoint(coefficient, tuple(scores), not broken, tuple(broken), collapsed=gone)


def choose(points: Sequence[SweepPoint], goals: Sequence[Key], kept: Sequence[Key], spec: ChooseSpec) -> Chosen:
    """The coefficient above 0 that forgets (learns) most among those within every bound; the smaller one on a tie.

    Coefficient 0 and ``bound_met`` False where no other is within the bounds *and* forgets (learns) more than that: the
    model is then left as it is. ``forget_metric`` is the first goal's.
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


def as_given(
    before: Sequence[TaskScore], after: Sequence[TaskScore], goals: Sequence[Key], kept: Sequence[Key], spec: ChooseSpec
) -> Chosen:
    """What stands for the choice where the edited model was given: whether it is within the bounds, on test items."""
    was, now = {s.key: s for s in before}, {s.key: s for s in after}
    kept = tuple(key for key in kept if key in was)
    met = all(
        holds(key[2], was[key].higher_is_better, was[key].score.value, now[key].score.value, spec.keep, spec.perplexity)
        for key in kept
    )
    bounds = f"; a kept metric is within its bound at {_bounds(spec, kept)}" if kept else ""
    return Chosen(
        coefficient=1.0,
        bound_met=met,
        rule=f"none, the edited model is given as it is{bounds}",
        forget_metric=goals[0][2],
        keep=spec.keep,
        perplexity=spec.perplexity,
        kept=kept,
        goals=tuple(goals),
        search="given",
    )


def remaining(point: SweepPoint, goals: Sequence[Key], base: SweepPoint) -> float:
    """What is to be minimised: the mean of :func:`share_left` over the goals of which something was left at ``base``.

    1 at ``base``, the point at coefficient 0; infinite for a collapsed model without scores.
    """
    if point.collapsed and not point.scores:
        return math.inf
    pairs = [(goal, _value(base, goal), _value(point, goal)) for goal in goals]
    known = [share for goal, was, now in pairs if (share := share_left(goal, was, now)) is not None]
    if not known:
        scores = "; ".join(f"{say_key(goal)} is {number(was)}" for goal, was, _ in pairs)
        raise EvaluationError(
            f"there is nothing to {' or '.join(dict.fromkeys(goal[0] for goal in goals))} on the validation items, as "
            f"the model is before any edit: {scores}. Take other items, or a metric of likelihoods as choose.metric "
            "(prob, logprob, loss or perplexity, by kind of data)"
        )
    return math.fsum(known) / len(known)


def share_left(goal: Key, before: float, now: float) -> float | None:
    """How much of a goal is left to do: 1 at the score before, 0 when all is done; None where there was nothing to do.

    Of a set to forget, the share of what the model knew that it still knows; of one to learn, the share of what it did
    not know that it still does not. What it knows is between 0 and 1: a share of right answers, a probability, or for
    metrics in nats and perplexities the likelihood exp(log-probability) or 1/perplexity.
    """
    was, here = (_nats(goal[2], value) for value in (before, now))
    if was is None or here is None:
        if goal[0] == "forget":
            return now / before if before > 0 else None
        return (1 - now) / (1 - before) if before < 1 else None
    if goal[0] == "forget":
        return math.exp(here - was) if not here - was > _LARGEST else math.inf
    return math.expm1(here) / math.expm1(was) if was < 0 else None


def _nats(metric: str, value: float) -> float | None:
    """The log-likelihood behind a score; None for metrics that are shares."""
    if is_perplexity(metric):
        return -math.log(value) if value > 0 else math.nan
    return {"loss": -value, "logprob": value}.get(metric)


def _value(point: SweepPoint, goal: Key) -> float:
    found = next((s.score.value for s in point.scores if s.key == goal), None)
    if found is None:
        raise EvaluationError(
            f"the {goal[0]} metric {say_key(goal)} has no validation score at coefficient {point.coefficient:g}"
        )
    return found


def _validation(scores: Sequence[TaskScore]) -> dict[Key, TaskScore]:
    """Scores by key; a coefficient chosen on test items would be no evidence, so those are an error here."""
    for score in scores:
        if score.split != "validation":
            raise EvaluationError(
                f"the coefficient is chosen on validation items, but {say_key(score.key)} is on {score.split} ones"
            )
    return {s.key: s for s in scores}


# -- scores before the edit that make a goal or a kept metric pointless


def blind(metric: str, higher_is_better: bool, before: float, chance: float | None, keep: float | None) -> str:
    """Why a kept metric can show no harm, by its score before the edit; empty where it can, or where nothing binds it.

    A share of 0 is 0, so that no fall breaks its bound, and who guesses before cannot be seen to guess after.
    """
    if is_perplexity(metric) or not higher_is_better or not keep:
        return ""
    if unbound(metric, before):
        return (
            f"is {number(before)} before the edit, so that nothing ties the answers to their own prompts: it cannot "
            "show harm"
        )
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
        before, why = s.score.value, ""
        if s.key in goals and share_left(s.key, before, before) is None:
            why = f"is {number(before)} before the edit: there is nothing to {s.set}, and the choice does without it"
        elif s.key in goals and s.set == "forget" and s.chance is not None and before <= s.chance + _SLACK:
            guess = number(s.chance)
            why = f"is {number(before)} before the edit, no more than guessing ({guess}): it shows no forgetting"
        elif s.key in kept:
            why = blind(s.metric, s.higher_is_better, before, s.chance, keep)
        if why:
            found[s.key] = why
    return found


def require_grounds(base: SweepPoint, goals: Sequence[Key], kept: Sequence[Key], spec: ChooseSpec) -> Mapping[Key, str]:
    """What :func:`doubted` finds at coefficient 0; an error where it leaves the rule nothing to choose by."""
    remaining(base, goals, base)
    found = doubted(base.scores, goals, kept, spec.keep)
    if kept and all(key in found for key in kept):
        raise EvaluationError(
            "nothing that is to be kept could show harm on the validation items, so that any coefficient would pass: "
            f"{'; '.join(f'{say_key(key)} {found[key]}' for key in kept)}. Add a retain or utility set that the model "
            "does better on (kinds qa and text are scored by likelihoods), or leave these out"
        )
    return found


# -- bounds


def unbound(metric: str, before: float) -> bool:
    """Whether nothing can be kept: pointwise information where there is none."""
    return metric == "pmi" and before <= 0


def bound_of(
    metric: str, higher_is_better: bool, before: float, keep: float | None, perplexity: float | None
) -> float | None:
    """The value that a kept metric may not pass; None where there is no bound (``keep`` 0), or none is known."""
    if is_perplexity(metric):
        return None if perplexity is None else before + perplexity
    if not keep or unbound(metric, before):
        return None
    # a negative score (a log-probability) keeps its share by not growing more than 1/keep times as large
    return before * keep if higher_is_better and before >= 0 else before / keep


def holds(
    metric: str, higher_is_better: bool, before: float, after: float, keep: float | None, perplexity: float | None
) -> bool:
    """Whether a kept metric is within its bound, as no NaN or infinity is: the verdict of the rule and of reports."""
    if not (math.isfinite(after) and math.isfinite(before)):
        return False
    bound = bound_of(metric, higher_is_better, before, keep, perplexity)
    if bound is None:
        return True
    slack = _SLACK * max(abs(before), 1.0)  # equal scores must not fail by rounding
    falls = higher_is_better and not is_perplexity(metric)
    return after >= bound - slack if falls else after <= bound + slack


def may_be_chosen(point: SweepPoint) -> bool:
    """Whether the rule's bounds hold at a point."""
    return point.within_bound and not point.collapsed


def rule(spec: ChooseSpec, goals: Sequence[Key], kept: Sequence[Key]) -> str:
    """The rule in words, for reports."""
    wanted = []
    for role, verb in (("forget", "forgetting"), ("learn", "learning")):
        if names := [f"{name} ({metric})" for set_, name, metric in goals if set_ == role]:
            wanted.append(f"{verb} of {listing(names)}")
    goal = f"most {listing(wanted)} on validation items"
    if len(goals) > 1:
        goal += ", on average over what is left of each beside λ = 0"
    if not kept:
        return goal + "; nothing was asked to be kept"
    named = f" ({listing(dict.fromkeys(key[2] for key in kept))})" if spec.kept else ""
    return f"{goal}, while every kept metric{named} stays within its bound: {_bounds(spec, kept)}"


def _bounds(spec: ChooseSpec, kept: Sequence[Key]) -> str:
    bounds = []
    if any(not is_perplexity(k[2]) for k in kept):
        bounds.append(f"at least {percent(spec.keep)} of the target model's score")
    if any(is_perplexity(k[2]) for k in kept):
        bounds.append(f"at most +{spec.perplexity:g} perplexity")
    return " or ".join(bounds)


def say_key(key: Key) -> str:
    """A metric in a sentence: set, name, metric."""
    return " ".join(key)


# -- the same choice without scoring all of the grid


def may_tie(metric: str) -> bool:
    """Whether two coefficients may well have the same forget score: shares of right answers do, likelihoods do not."""
    return metric != "pmi" and not metric.endswith(_CONTINUOUS)


def bisect(
    grid: Sequence[float],
    base: SweepPoint,
    score: Callable[[float], SweepPoint],
    remaining: Callable[[SweepPoint], float],
    *,
    ties: bool,
) -> tuple[SweepPoint, ...]:
    """Score what the choice from a grid (coefficients above 0, ascending) needs; returns ``base``, at 0, and these.

    ``ties``: equal values are to be expected, so that the smallest coefficient of equal ones is looked for.
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
    spare = budget - len(found)  # after one more; what was scored at 0 does not count
    if spare < 0:
        return None
    passing = [i for i, point in found.items() if i and may_be_chosen(point)]
    last = max(passing, default=0)
    broken = min((i for i in found if i > last), default=size + 1)
    known = {i: remaining(found[i]) for i in (0, *passing)}
    best = min((i for i in passing if known[i] < known[0]), key=lambda i: (known[i], i), default=0)
    below = max((i for i in found if i < best), default=0)  # forgets less than best
    gap = best - below if ties else 0
    # Being one step off below is good enough; the probes that this takes must be left when the bound is settled.
    narrowing = max(0, math.ceil(math.log2(gap / 2))) if gap else 0
    if broken - last > 1 and spare >= narrowing:
        return (last + broken) // 2
    return (below + best) // 2 if gap > 1 else None


# -- coefficients of several vectors, found together

ROUNDS = 3  # over all parts; every round costs at most two scorings per part
Name = TypeVar("Name", bound=str | tuple[str, ...])
Combination = tuple[float, ...]  # a coefficient for each part, in the order of the sorted names


def balance(
    names: Sequence[Name],
    grid: Sequence[float],
    score: Callable[[Combination], SweepPoint],
    better: Callable[[SweepPoint, SweepPoint], bool],
    diagonal: Sequence[float] | None = None,
) -> tuple[dict[Name, float], dict[Combination, SweepPoint]]:
    """Find the parts' relative weights. The order in which the names are given makes no difference.

    The start is the diagonal's best passing point, or all at the smallest coefficient where none passes. No part is
    ever given 0: a request that is not granted should be withdrawn, not dropped without a word.

    ``better(a, b)``: whether the rule prefers a to b, both of them within the bounds. ``diagonal`` are coefficients of
    the grid to try for all parts alike, all of them when not given. No combination is asked for twice.

    Returns:
        A weight above 0 for every name, the largest 1, and every combination that was tried, in order.
    """
    parts = sorted(set(names))
    tried: dict[Combination, SweepPoint] = {}

    def at(steps: tuple[int, ...]) -> SweepPoint:
        coefficients = tuple(grid[i] for i in steps)
        if coefficients not in tried:
            tried[coefficients] = score(coefficients)
        return tried[coefficients]

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
    return {name: grid[step] / grid[max(here)] for name, step in zip(parts, here, strict=True)}, tried
