"""The few figures derived from a report that the page, the terminal, the grids and a model card all show.

Intervals of scores; what is left of a kept metric and its bound; the frontier of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unlearn.metrics import KEPT, Key, is_perplexity
from unlearn.report import RunReport, Score, ScoreRow, SweepPoint, TaskScore
from unlearn.wording import MISSING, number, percent, signed

Z95 = 1.96
_UNIT = ("acc", "exact", "prob", "rouge", "f1")  # metrics between 0 and 1


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One coefficient of the sweep: the forget score, and per kept set the share left of its score at 0."""

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


def share_kept(
    metric: str, higher_is_better: bool, before: float, after: float, keep: float | None, perplexity: float | None
) -> float | None:
    """How much of a score is left, 1 meaning all of it; None where that has no meaning (a score of 0 before).

    Higher-is-better: after/before, for negative scores (log-probabilities) before/after. Lower-is-better: before/after.
    A perplexity with its bound known is scaled so that the largest rise allowed lies on ``keep``:
    ``1 - (1 - keep) * rise / perplexity``.
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    if is_perplexity(metric) and keep is not None and perplexity:
        return 1 - (1 - keep) * (after - before) / perplexity
    if higher_is_better and before > 0:
        return after / before
    if higher_is_better and before < 0:
        return before / after if after < 0 else 1.0
    return before / after if not higher_is_better and before > 0 and after > 0 else None


def bound_of(
    metric: str, higher_is_better: bool, before: float, keep: float | None, perplexity: float | None
) -> float | None:
    """The value that a bounded metric may not pass, as the rule has it; None where no bound is known."""
    if is_perplexity(metric):
        return None if perplexity is None else before + perplexity
    if not keep:
        return None
    return before * keep if higher_is_better and before >= 0 else before / keep


def kept_keys(report: RunReport) -> tuple[Key, ...]:
    """What the rule's bound was put on."""
    if report.chosen.kept:
        return report.chosen.kept
    scores = report.sweep[0].scores if report.sweep else ()
    return tuple(s.key for s in scores if s.set in KEPT)


def main_keys(report: RunReport) -> tuple[Key, ...]:
    """One key per (set, name) of the sweep: the forget metric, or the metric of the rule, or else the first scored."""
    kept = kept_keys(report)
    groups: dict[tuple[str, str], list[Key]] = {}
    for point in report.sweep:
        for score in point.scores:
            keys = groups.setdefault((score.set, score.name), [])
            if score.key not in keys:
                keys.append(score.key)
    return tuple(
        min(keys, key=lambda k: (k[2] != report.chosen.forget_metric, k not in kept)) for keys in groups.values()
    )


def forget_row(report: RunReport) -> ScoreRow | None:
    """The line of the before/after table that the rule drove down."""
    rows = [row for row in report.scores if row.set == "forget"]
    return next((row for row in rows if row.metric == report.chosen.forget_metric), rows[0] if rows else None)


def frontier(report: RunReport) -> tuple[FrontierPoint, ...]:
    """Every coefficient's forget score against what is left of each kept set (its worst metric), validation items."""
    kept = kept_keys(report)
    base = _at_zero(report.sweep)
    points = []
    for point in sorted(report.sweep, key=lambda p: p.coefficient):
        shares: dict[str, float] = {}
        for score in point.scores:
            start = base.get(score.key)
            if score.key not in kept or start is None:
                continue
            share = _share(report, score.metric, score.higher_is_better, start.score, score.score)
            label = f"{score.set}/{score.name}"
            if share is not None:
                shares[label] = min(share, shares.get(label, math.inf))
        forget = [s for s in point.scores if s.set == "forget"]
        shown = next((s for s in forget if s.metric == report.chosen.forget_metric), forget[0] if forget else None)
        forgotten = shown.score if shown else None
        points.append(
            FrontierPoint(point.coefficient, forgotten, shares, point.within_bound, point.broken, point.collapsed)
        )
    return tuple(points)


def share_of_row(report: RunReport, row: ScoreRow) -> float | None:
    """The share left of a line of the before/after table; None where the rule put no bound on it."""
    if (row.set, row.name, row.metric) not in kept_keys(report):
        return None
    return _share(report, row.metric, row.higher_is_better, row.before, row.after)


def final_shares(report: RunReport) -> tuple[tuple[ScoreRow, float], ...]:
    """Per bounded kept metric of the before/after table, the share left; smallest first."""
    found = [(row, share) for row in report.scores if (share := share_of_row(report, row)) is not None]
    return tuple(sorted(found, key=lambda pair: pair[1]))


def kept_figure(report: RunReport, row: ScoreRow) -> str:
    """What is left of a bounded metric, as the rule counts it: a percentage, or the rise of a perplexity."""
    share = share_of_row(report, row)
    if share is None:
        return MISSING
    return signed(row.after.value - row.before.value) if is_perplexity(row.metric) else percent(share)


def bound_figure(report: RunReport, metric: str) -> str | None:
    """The bound in the same terms; None when the report does not record it."""
    chosen = report.chosen
    if is_perplexity(metric):
        return None if chosen.perplexity is None else f"+{number(chosen.perplexity)}"
    return None if chosen.keep is None else percent(chosen.keep)


def total_seconds(report: RunReport) -> float:
    """The run's time: its own total where it recorded one, else the sum of its stages."""
    return report.seconds.get("total", sum(report.seconds.values()))


def _share(report: RunReport, metric: str, higher: bool, before: Score, after: Score) -> float | None:
    return share_kept(metric, higher, before.value, after.value, report.chosen.keep, report.chosen.perplexity)


def _at_zero(sweep: tuple[SweepPoint, ...]) -> dict[Key, TaskScore]:
    first = min(sweep, key=lambda p: p.coefficient, default=None)
    return {score.key: score for score in first.scores} if first and first.coefficient == 0 else {}
