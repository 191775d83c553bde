"""Coefficients of several vectors, found together.

Ilharco et al. (2212.04089, section 4) add several task vectors under one coefficient. That is the diagonal here, and
where the search begins; from its best point on, one coefficient at a time goes a step of the grid up or down for as
long as the same rule that picks a coefficient on the diagonal prefers what comes of it. What is found is a direction:
along it the sweep then goes as for a single vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unlearn.report import SweepPoint
from unlearn.search import may_be_chosen
from unlearn.vector import TaskVector

ROUNDS = 3  # over all parts; every round costs at most two scorings per part

Name = TypeVar("Name", bound=str | tuple[str, ...])
Score = Callable[[tuple[float, ...]], SweepPoint]


@dataclass(frozen=True, slots=True)
class Tried:
    """One combination and what it gave. ``coefficients`` are in the order of the sorted names."""

    coefficients: tuple[float, ...]
    point: SweepPoint


def balance(
    names: Sequence[Name],
    grid: Sequence[float],
    score: Score,
    better: Callable[[SweepPoint, SweepPoint], bool],
    diagonal: Sequence[float] | None = None,
) -> tuple[dict[Name, float], tuple[Tried, ...]]:
    """Find the parts' relative weights. The order in which the names are given makes no difference.

    The start is the diagonal's best passing point, or all at the smallest coefficient where none passes. No part is
    ever given 0: a request that is not granted should be withdrawn, not dropped without a word.

    Args:
        names: One for each part.
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
    """The sum of the parts by weight: the same bits in whatever order they are given.

    Raises:
        VectorError: the parts are of different models.
    """
    return TaskVector.sum(parts[name] * weights[name] for name in sorted(parts))
