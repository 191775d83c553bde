"""What the theory says of a measured correlation, and how well the first-order prediction held. Costs no torch.

Li et al. (2504.10957) write the edited model as theta + lambda * tau and find negation effective for correlations
alpha <= 0 with -Theta(alpha^-2) <= lambda <= 0, at a kept loss that grows at most like |lambda| * beta; for alpha > 0
nothing is guaranteed. Here the same model is theta - lambda * tau with lambda >= 0. They prove it of one layer and of
tasks with two classes, so for a language model it is a reading and not a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearn.report import Foresight, Role, RunReport, SetForesight, SweepPoint, Verdict
from unlearn.wording import coefficient, counted, listing, number, short, signed

IRRELEVANT = 0.1  # a smaller correlation counts as none
SURE = 2.0  # standard errors beyond which a correlation counts as one
FEWEST = 3  # sets of which ranks can be compared
UNITS = {"logprob": "nats per answer", "loss": "nats per token"}
CAVEAT = (
    "The theory (arXiv 2504.10957) is about a model of one layer and tasks with two classes; of a language model this "
    "is a reading, not a bound. Large changes spoil predictions in like ways, so even unrelated tasks may show a small "
    "positive α of the changes, the more so the further the α of the outputs is below 1."
)


@dataclass(frozen=True, slots=True)
class Point:
    """Change of a set's loss against λ = 0, in nats, at one coefficient."""

    coefficient: float
    measured: float
    predicted: float


@dataclass(frozen=True, slots=True)
class SetComparison:
    """One set's changes of loss over the sweep, with λ = 0 among them; empty where the sweep has no such score."""

    set: Role
    name: str
    points: tuple[Point, ...]

    def at(self, value: float) -> Point | None:
        """The point of one coefficient."""
        return next((p for p in self.points if math.isclose(p.coefficient, value, abs_tol=1e-12)), None)


@dataclass(frozen=True, slots=True)
class MeanError:
    """By how many nats per token, or per answer, the prediction was off on average over some sets."""

    unit: str
    sets: int
    nats: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How good the prediction was.

    The summary is taken at ``coefficient`` (None: no such point), over the ``kept`` kept sets measured there:
    ``errors`` are the means of |measured - predicted|, each over the sets of one unit, ``ranks`` Spearman's correlation
    of the two. ``alpha_ranks`` is Spearman's between ``alpha_changes`` and the nats that sets lost, over ``compared``
    sets. None where fewer than three sets, sets of several units, or all equal ones, leave nothing to rank.
    """

    goals: tuple[SetComparison, ...]
    sets: tuple[SetComparison, ...]
    coefficient: float | None
    kept: int
    errors: tuple[MeanError, ...]
    ranks: float | None
    compared: int
    alpha_ranks: float | None


def verdict(alpha: float | None, stderr: float | None) -> Verdict | None:
    """What a correlation of changes makes of two tasks; None where there is no number.

    Irrelevant: below .1 in size, or below two standard errors. Otherwise aligned above 0 and contradictory below.
    """
    if alpha is None or not math.isfinite(alpha):
        return None
    if abs(alpha) < IRRELEVANT or (stderr is not None and abs(alpha) < SURE * stderr):
        return "irrelevant"
    return "aligned" if alpha > 0 else "contradictory"


def reading(entry: SetForesight) -> str:
    """The verdict in a sentence, with the range of λ ≥ 0 that the theory gives."""
    if entry.slope is None:
        return "The slope is absent because it came out as no finite number: the number format is too narrow for it."
    if entry.alpha_vectors is not None and entry.alpha_changes is None:
        return "The α of the changes is absent because it came out as no finite number."
    if entry.verdict is None or entry.alpha_changes is None:
        return "No fine-tuning on this set to compare with: only the slope is known."
    kept = "the loss of what is kept grows at most in proportion to λ"
    if entry.verdict == "irrelevant":
        return (
            f"Irrelevant: subtracting should forget for every λ up to an order of 1/α², large for α near 0, and {kept}."
        )
    if entry.verdict == "contradictory":
        limit = short(1 / entry.alpha_changes**2)
        return f"Contradictory: subtracting should forget for every λ up to an order of 1/α² = {limit}, and {kept}."
    return "Aligned: no λ comes with a guarantee; what the two tasks share is lost in both."


def compare(foresight: Foresight, points: Sequence[SweepPoint], chosen: float) -> Comparison:
    """Measured against predicted changes of loss, from the sweep's ``logprob`` and ``loss`` scores.

    Args:
        foresight: Taken before the edit.
        points: The sweep.
        chosen: Where the summary is taken; at 0, the smallest coefficient above it.
    """
    whole = sorted(points, key=lambda p: p.coefficient)
    goals = tuple(_over(entry, whole) for entry in foresight.goals)
    sets = tuple(_over(entry, whole) for entry in foresight.kept)
    at = chosen if chosen > 0 else next((p.coefficient for p in whole if p.coefficient > 0), None)
    here = [(entry, p) for entry, found in zip(foresight.kept, sets, strict=True) if at and (p := found.at(at))]
    off: dict[str, list[float]] = {}
    for entry, p in here:
        off.setdefault(UNITS.get(entry.metric, entry.metric), []).append(abs(p.measured - p.predicted))
    lost = [(entry.alpha_changes, p.measured) for entry, p in here if entry.alpha_changes is not None]
    alike = len(off) == 1  # else nats of an answer would be set against those of a token
    return Comparison(
        goals=goals,
        sets=sets,
        coefficient=at,
        kept=len(here),
        errors=tuple(MeanError(unit, len(nats), math.fsum(nats) / len(nats)) for unit, nats in off.items()),
        ranks=spearman([p.predicted for _, p in here], [p.measured for _, p in here]) if alike else None,
        compared=len(lost),
        alpha_ranks=spearman([alpha for alpha, _ in lost], [nats for _, nats in lost]) if alike else None,
    )


def of_report(report: RunReport) -> Comparison | None:
    """The comparison of a whole run; None where nothing was foreseen."""
    return compare(report.foresight, report.sweep, report.chosen.coefficient) if report.foresight else None


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None of fewer than three, or without ranks.

    It is Pearson's correlation of the ranks.
    """
    if len(one) < FEWEST or not all(map(math.isfinite, (*one, *two))):
        return None
    a, b = _ranks(one), _ranks(two)
    middle = (len(a) + 1) / 2
    products = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return products / size if size else None


def how_good(comparison: Comparison) -> tuple[str, ...]:
    """How good the prediction was, in sentences."""
    if comparison.coefficient is None or not comparison.errors:
        return ("The sweep has no loss of a kept set to hold against the prediction.",)
    off = [f"{number(e.nats)} {e.unit} on average over {counted(e.sets, 'kept set')}" for e in comparison.errors]
    said = [f"At λ = {coefficient(comparison.coefficient)} the straight line was off by {listing(off)}."]
    if len(off) > 1:
        return (*said, "Sets measured in unlike units have no order of loss to predict.")
    if comparison.kept < FEWEST:
        said.append(f"Of fewer than {FEWEST} kept sets there is no order to predict.")
    elif comparison.ranks is not None:
        said.append(f"It put them in order of their loss with a rank correlation of {signed(comparison.ranks)}.")
    if comparison.compared < FEWEST:
        said.append(
            f"Whether the correlation α tells who will lose most cannot be said of fewer than {FEWEST} sets with both."
        )
    elif comparison.alpha_ranks is not None:
        said.append(
            f"The correlation α put {counted(comparison.compared, 'set')} in order of their loss with a rank "
            f"correlation of {signed(comparison.alpha_ranks)}."
        )
    return tuple(said)


def dearest(report: RunReport) -> str | None:
    """The kept set that was foreseen to lose most, of each unit one, in a line; None where nothing was foreseen."""
    found = of_report(report)
    if found is None or report.foresight is None:
        return None
    first: dict[str, tuple[float, SetForesight, SetComparison]] = {}
    for entry, measured in zip(report.foresight.kept, found.sets, strict=True):
        known = first.get(entry.metric)
        if entry.slope is not None and (known is None or entry.slope > known[0]):
            first[entry.metric] = entry.slope, entry, measured
    order = sorted(first.values(), key=lambda one: -one[0])
    return "; ".join(_foreseen(entry, measured, found.coefficient) for _, entry, measured in order) or None


def _foreseen(entry: SetForesight, measured: SetComparison, at: float | None) -> str:
    said = f"{entry.set}/{entry.name}"
    if entry.verdict is not None and entry.alpha_changes is not None:
        said += f" {entry.verdict} (α {signed(entry.alpha_changes)})"
    point = measured.at(at) if at is not None else None
    if point is None:
        return f"{said}, {signed(entry.slope)} nats per unit of λ"
    figures = f"{signed(point.predicted)} nats predicted, {signed(point.measured)} measured"
    return f"{said}, {figures} at λ = {coefficient(point.coefficient)}"


def _over(entry: SetForesight, points: Iterable[SweepPoint]) -> SetComparison:
    key = (entry.set, entry.name, entry.metric)
    losses = [
        (p.coefficient, -s.score.value if s.higher_is_better else s.score.value)
        for p in points
        for s in p.scores
        if s.key == key and math.isfinite(s.score.value)
    ]
    start = next((loss for c, loss in losses if c == 0), None)
    if start is None or entry.slope is None:
        return SetComparison(entry.set, entry.name, ())
    found = tuple(Point(c, loss - start, c * entry.slope) for c, loss in losses)
    return SetComparison(entry.set, entry.name, found)


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal ones share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
