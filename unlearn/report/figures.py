"""The few figures derived from a report that the page, the terminal, comparisons and a model card all show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from unlearn.recipe.schema import KEPT, Key, is_perplexity
from unlearn.results import Chosen, RunReport, Score, ScoreRow, SweepPoint, TaskScore
from unlearn.score.search import blind, holds, share_left, unbound
from unlearn.text import MISSING, number, percent, signed

Z95 = 1.96
FORGOTTEN = 0.2  # of the pointwise information: a set that has more of it left is at best suppressed
_UNIT = ("acc", "exact", "prob", "rouge", "f1")  # metrics between 0 and 1


class Result(Protocol):
    """A choice and what came of it: a report, or what a model card is made from."""

    @property
    def chosen(self) -> Chosen: ...
    @property
    def scores(self) -> tuple[ScoreRow, ...]: ...
    @property
    def sweep(self) -> tuple[SweepPoint, ...]: ...


def margin(score: Score) -> float | None:
    """Half the width of the 95 % confidence interval."""
    if score.stderr is None or not math.isfinite(score.stderr):
        return None
    half = Z95 * score.stderr
    return half if half > 1e-12 * abs(score.value) else 0.0  # equal items differ by rounding alone


def with_margin(score: Score) -> str:
    """``0.460 ± 0.080``, without the second part where there is no estimate."""
    half = margin(score)
    return number(score.value) if half is None else f"{number(score.value)} ± {number(half)}"


def interval(score: Score, metric: str) -> str | None:
    """``0.31–0.61``, the 95 % confidence interval, cut at 0 and 1 for the metrics that cannot leave them."""
    half = margin(score)
    if half is None or not math.isfinite(score.value):
        return None
    low, high = score.value - half, score.value + half
    if metric.lower().startswith(_UNIT):
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{number(low)}–{number(high)}" if low >= 0 else f"{number(low)} to {number(high)}"


def margin_of_change(row: ScoreRow) -> float | None:
    """95 % half-width of after − before, as if the two were measured on different items (so rather too wide)."""
    if margin(row.before) is None or margin(row.after) is None:
        return None
    return Z95 * math.hypot(row.before.stderr or 0.0, row.after.stderr or 0.0)


def gone(row: ScoreRow) -> float:
    """By how much a score got worse."""
    change = row.before.value - row.after.value
    return change if row.higher_is_better else -change


def share_kept(
    metric: str, higher_is_better: bool, before: float, after: float, keep: float | None, perplexity: float | None
) -> float | None:
    """How much of a score is left, 1 meaning all of it; None where that has no meaning (a score of 0 before).

    Higher-is-better: after/before, for negative scores (log-probabilities) before/after. Lower-is-better: before/after.
    A perplexity with its bound known is scaled so that the largest rise allowed lies on ``keep``:
    ``1 - (1 - keep) * rise / perplexity``, or where one of the two bounds allows nothing ``keep`` times what is left of
    the largest perplexity allowed. For pictures: whether a bound holds, :func:`~unlearn.score.search.holds` says.
    """
    if not (math.isfinite(before) and math.isfinite(after)) or unbound(metric, before):
        return None
    if is_perplexity(metric) and keep and perplexity is not None:
        if keep < 1 and perplexity > 0:
            return 1 - (1 - keep) * (after - before) / perplexity
        return keep * (before + perplexity) / after if after > 0 else None
    if higher_is_better and before > 0:
        return after / before
    if higher_is_better and before < 0:
        return before / after if after < 0 else 1.0
    return before / after if not higher_is_better and before > 0 and after > 0 else None


def _share(chosen: Chosen, line: ScoreRow | TaskScore, before: Score, after: Score) -> float | None:
    bounds = chosen.keep, chosen.perplexity
    return share_kept(line.metric, line.higher_is_better, before.value, after.value, *bounds)


# -- what was asked for


def goal_rows(result: Result) -> tuple[ScoreRow, ...]:
    """The lines of the before/after table that the rule drove down (forget) or up (learn).

    Where its goals are not recorded: the first line of a forget set, or all learned ones.
    """
    chosen, scores = result.chosen, result.scores
    if chosen.goals:
        return tuple(row for goal in chosen.goals for row in scores if row.key == goal)
    forget = [row for row in scores if row.set == "forget"]
    named = [row for row in forget if row.metric == chosen.forget_metric]
    learned = [row for row in scores if row.set == "learn" and row.metric == chosen.forget_metric]
    return tuple((named or forget)[:1] or learned)


def mean_left(report: RunReport) -> float | None:
    """What is left of several goals on average, as the rule counts it, after the edit; None where it has no meaning."""
    shares = [share_left(row.key, row.before.value, row.after.value) for row in goal_rows(report)]
    return math.fsum(s for s in shares if s is not None) / len(shares) if shares and None not in shares else None


@dataclass(frozen=True, slots=True)
class Memory:
    """What became of the tie between a set's questions and answers, by pointwise information in nats."""

    became: Literal["forgotten", "suppressed", "kept"]
    row: ScoreRow  # of the pointwise information

    @property
    def never(self) -> float:
        """What a model that never knew has: of questions with words of the answer in them more than nothing."""
        known = self.row.reference.value if self.row.reference is not None else 0.0
        return known if known > 0 and math.isfinite(known) else 0.0

    @property
    def left(self) -> float:
        """The share that is left of what is more than that, not below 0."""
        return max(0.0, (self.row.after.value - self.never) / (self.row.before.value - self.never))


def memory(result: Result, row: ScoreRow) -> Memory | None:
    """Whether a set is forgotten, or is only said less often whatever is asked; None where that was not measured.

    ``kept``: its score is no worse than chance explains. Otherwise ``forgotten`` where at most a fifth is left of the
    pointwise information (of what it is above that of a reference which never knew, where there is one): asked about
    others and subtracted, the answer would come back from ``suppressed``.
    """
    line = next((r for r in result.scores if r.key == (row.set, row.name, "pmi")), None)
    if line is None or not math.isfinite(line.after.value):
        return None
    found = Memory("kept", line)
    if not line.before.value - found.never > (margin(line.before) or 0.0):
        return None
    if not gone(row) > (margin_of_change(row) or 0.0):
        return found
    return Memory("forgotten" if found.left <= FORGOTTEN else "suppressed", line)


def memories(result: Result) -> dict[Key, Memory]:
    """The same of every set that was to be forgotten, where it was measured, by the key of its goal."""
    rows = [row for row in goal_rows(result) if row.set == "forget"] if result.chosen.coefficient else []
    return {row.key: found for row in rows if (found := memory(result, row)) is not None}


# -- what was to be kept


def kept_keys(result: Result) -> tuple[Key, ...]:
    """What the rule's bound was put on."""
    if result.chosen.kept:
        return result.chosen.kept
    scores = result.sweep[0].scores if result.sweep else ()
    return tuple(s.key for s in scores if s.set in KEPT)


def missed(result: Result) -> tuple[ScoreRow, ...]:
    """The kept metrics that are out of their bound in the before/after table, by the rule's own measure."""
    chosen, kept, found = result.chosen, kept_keys(result), []
    for row in result.scores:
        bound = chosen.perplexity if is_perplexity(row.metric) else chosen.keep
        scored = row.metric, row.higher_is_better, row.before.value, row.after.value
        if row.key in kept and bound is not None and not holds(*scored, chosen.keep, chosen.perplexity):
            found.append(row)
    return tuple(found)


def worst_kept(report: RunReport) -> ScoreRow | None:
    """The kept metric with the smallest share left; of those out of bounds where there are any."""
    chosen, kept, out = report.chosen, kept_keys(report), missed(report)
    shares = [(row, _share(chosen, row, row.before, row.after)) for row in report.scores if row.key in kept]
    known = [(row not in out, share, n) for n, (row, share) in enumerate(shares) if share is not None]
    return shares[min(known)[2]][0] if known else None


def kept_figure(report: RunReport, row: ScoreRow) -> str:
    """What is left of a bounded metric, as the rule counts it: a percentage, or the rise of a perplexity."""
    share = _share(report.chosen, row, row.before, row.after)
    if share is None or row.key not in kept_keys(report):
        return "was 0" if row.before.value == 0 else MISSING
    return signed(row.after.value - row.before.value) if is_perplexity(row.metric) else percent(share)


def bound_figure(report: RunReport, metric: str) -> str | None:
    """The bound in the same terms; None when the report does not record it."""
    chosen = report.chosen
    if is_perplexity(metric):
        return None if chosen.perplexity is None else f"+{number(chosen.perplexity)}"
    return None if chosen.keep is None else percent(chosen.keep)


def unseeing(report: RunReport) -> frozenset[Key]:
    """The kept metrics that can show no harm, on validation or on test items."""
    kept, keep = kept_keys(report), report.chosen.keep
    found: list[tuple[ScoreRow | TaskScore, float]] = [(s, s.score.value) for s in _at_zero(report.sweep).values()]
    found += [(row, row.before.value) for row in report.scores]
    return frozenset(
        line.key
        for line, value in found
        if line.key in kept and blind(line.metric, line.higher_is_better, value, line.chance, keep)
    )


# -- the frontier


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One coefficient of the sweep: the goal's score, and per kept set the share left of its score at 0.

    Of several goals ``forget`` is the mean of what is left of each, as the rule counts it.
    """

    coefficient: float
    forget: Score | None
    shares: Mapping[str, float]
    within_bound: bool
    broken: tuple[str, ...]
    collapsed: str = ""

    @property
    def worst(self) -> float | None:
        """The smallest share, None when nothing is kept."""
        return min(self.shares.values(), default=None)


def frontier(report: RunReport) -> tuple[FrontierPoint, ...]:
    """Every coefficient's goal score against what is left of each kept set (its worst metric), validation items."""
    kept, goals = kept_keys(report), [row.key for row in goal_rows(report)]
    base = _at_zero(report.sweep)
    points = []
    for point in sorted(report.sweep, key=lambda p: p.coefficient):
        shares: dict[str, float] = {}
        for score in point.scores:
            if score.key not in kept or score.key not in base:
                continue
            share, label = _share(report.chosen, score, base[score.key].score, score.score), f"{score.set}/{score.name}"
            if share is not None:
                shares[label] = min(share, shares.get(label, math.inf))
        done = _goal({s.key: s for s in point.scores}, base, goals)
        points.append(FrontierPoint(point.coefficient, done, shares, point.within_bound, point.broken, point.collapsed))
    return tuple(points)


def _goal(here: Mapping[Key, TaskScore], base: Mapping[Key, TaskScore], goals: Sequence[Key]) -> Score | None:
    """The score of one goal; of several the mean of what is left of each."""
    found = [here[goal] for goal in goals if goal in here]
    if not found or len(found) < len(goals):
        return None
    if len(goals) == 1:
        return found[0].score
    shares = [share_left(s.key, base[s.key].score.value, s.score.value) for s in found if s.key in base]
    known = [share for share in shares if share is not None]
    return Score(math.fsum(known) / len(known), None, sum(s.score.n for s in found)) if known else None


def _at_zero(sweep: Sequence[SweepPoint]) -> dict[Key, TaskScore]:
    first = min(sweep, key=lambda p: p.coefficient, default=None)
    return {score.key: score for score in first.scores} if first and first.coefficient == 0 else {}


def total_seconds(report: RunReport) -> float:
    """The run's time: its own total where it recorded one, else the sum of its stages."""
    return report.seconds.get("total", sum(report.seconds.values()))
