"""Find the coefficient that the rule would choose from a grid without scoring all of the grid.

Two things are taken for granted: kept scores get worse as the coefficient grows, and the forget score falls until it
saturates. So there is a last coefficient within the bounds, which bisection finds; and where the forget score says the
same at several coefficients, as an accuracy may, a first one that forgets as much, which bisection finds too. The
choice itself stays with :func:`unlearn.search.choose`, among the points that were scored: noise that breaks the
assumptions can make it another one than the grid's, never one that is out of bounds.
What is said of forgetting holds for learning with the sign changed; a set that is learned best well within the bounds
and worse again behind that breaks the second assumption, and wants the whole grid.

The cost is counted in whole scorings of one coefficient above 0. It is at most half of the grid's, or where the grid is
too small for that (below 6 coefficients) what the bisection for the bound takes: ceil(log2(n + 1)). Within that the
choice is the grid's or its neighbour: always from 12 coefficients on; below, if the forget score falls strictly until
it saturates, as there may not be enough left to tell a level stretch from the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from unlearn.report import SweepPoint
from unlearn.search import may_be_chosen

_CONTINUOUS = ("prob", "logprob", "loss", "perplexity")


def may_tie(metric: str) -> bool:
    """Whether two coefficients may well have the same forget score: shares of right answers do, likelihoods do not."""
    return not metric.endswith(_CONTINUOUS)


def bisect(
    grid: Sequence[float],
    base: SweepPoint,
    score: Callable[[float], SweepPoint],
    left: Callable[[SweepPoint], float],
    *,
    ties: bool,
) -> tuple[SweepPoint, ...]:
    """Score what the choice needs.

    Args:
        grid: The coefficients above 0, ascending.
        base: The point at coefficient 0.
        score: The judged point at a coefficient.
        left: What the model still knows of the forget set at a point; larger is more.
        ties: Whether equal values of ``left`` are to be expected, so that the smallest coefficient of equal ones is
            looked for.

    Returns:
        ``base`` and every point that was scored, by coefficient.
    """
    budget = max(len(grid) / 2, math.ceil(math.log2(len(grid) + 1)))
    found = {0: base}
    while (index := _next(found, len(grid), budget, left, ties)) is not None:
        found[index] = score(grid[index - 1])
    return tuple(found[index] for index in sorted(found))


def _next(
    found: Mapping[int, SweepPoint], size: int, budget: float, left: Callable[[SweepPoint], float], ties: bool
) -> int | None:
    """Which coefficient (1 to ``size``) to score next, None when the choice is found or the budget used up."""
    passing = [i for i, point in found.items() if i and may_be_chosen(point)]
    spare = budget - len(found)  # after one more; what was scored at 0 does not count
    if spare < 0:
        return None
    last = max(passing, default=0)
    broken = min((i for i in found if i > last), default=size + 1)
    best = min((i for i in passing if left(found[i]) < left(found[0])), key=lambda i: (left(found[i]), i), default=0)
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
