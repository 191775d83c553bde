"""The arithmetic of the merged report: means over runs with their intervals, and the Pareto set. No I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95  # of every interval over runs


@dataclass(frozen=True, slots=True)
class Spread:
    """One number of several runs.

    ``half`` is half of the 95 % interval of the mean over runs, Student's t with n - 1 degrees of freedom; None of
    fewer than two runs. ``sd`` is the runs' standard deviation (divisor n - 1). ``absent`` counts the runs in which
    the number is missing or not finite; then there is no mean, since a mean of the rest would hide the worst runs.
    """

    n: int
    absent: int
    mean: float | None
    sd: float | None
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Of one value per run."""
        known = [v for v in values if v is not None and math.isfinite(v)]
        n, absent = len(known), len(values) - len(known)
        if absent or not known:
            return cls(n, absent, None, None, None)
        try:
            mean = math.fsum(known) / n
        except OverflowError:  # numbers at the edge of what a float holds
            mean = math.fsum(v / n for v in known)
        if n < 2:
            return cls(n, absent, mean, None, None)
        sd = math.hypot(*(v - mean for v in known)) / math.sqrt(n - 1)
        return cls(n, absent, mean, _finite(sd), _finite(t95(n - 1) * sd / math.sqrt(n)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@lru_cache(maxsize=256)
def t95(freedom: int) -> float:
    """Half-width of the central 95 % of Student's t with ``freedom`` >= 1 degrees, by bisection."""
    low, high = 0.0, 16.0  # 12.7 with one degree, less with more
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < LEVEL else (low, middle)
    return (low + high) / 2


def _central(t: float, freedom: int) -> float:
    """Probability of -t..t, the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, terms = (cosine if odd else 1.0), []
    for k in range(2 + odd, freedom + 1, 2):
        terms.append(term)
        term *= cosine**2 * (k - 1) / k
    total = math.sin(angle) * math.fsum(terms)
    return 2 / math.pi * (angle + total) if odd else total


def pareto(points: Sequence[tuple[float | None, float | None]]) -> frozenset[int]:
    """Indices of the points that no other one beats.

    Args:
        points: what is left of the knowledge to be forgotten (less is better) and what is kept (more is better).

    A point is beaten by one that is at least as good in both and better in one, so equal points stand or fall together.
    A point without both numbers neither beats nor stands.
    """
    known = [(left, kept, i) for i, (left, kept) in enumerate(points) if left is not None and kept is not None]
    known = [p for p in known if math.isfinite(p[0]) and math.isfinite(p[1])]
    found: set[int] = set()
    best: tuple[float, float] | None = None  # of those so far, the one that keeps most
    for left, kept, i in sorted(known, key=lambda p: (p[0], -p[1])):
        if best is None or kept > best[1] or (left, kept) == best:
            best = (left, kept)
            found.add(i)
    return frozenset(found)


def common_seeds(finished: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The seeds on which settings are compared: those that the most settings have finished, exactly.

    Of equally frequent sets the larger one, then the first. Settings that lack one of them are not compared.

    Args:
        finished: per setting the seeds of its finished runs, in the grid's order.
    """
    counts = Counter(seeds for seeds in finished if seeds)
    return max(counts, key=lambda seeds: (counts[seeds], len(seeds)), default=())
