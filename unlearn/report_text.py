"""A report in sentences: what happened, what a reader must know beside it, and how the coefficient was found."""

from __future__ import annotations

import math

from unlearn.report import RunReport, ScoreRow, SweepPoint
from unlearn.report_figures import bound_figure, final_shares, forget_row, kept_figure, kept_keys, margin_of_change
from unlearn.wording import coefficient, counted, listing, short

CAVEAT = (
    "Unlearning is not deletion. These scores say what the model does when it is asked like this; rephrasing, few "
    "examples in the prompt, a little fine-tuning or a look at its internals may bring the knowledge back. Where data "
    "has to be gone, train without it."
)
_PLAIN = {
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "exact": "exact-answer rate",
    "exact_match": "exact-match rate",
    "exact_memorisation": "exact memorisation",
    "extraction_strength": "extraction strength",
    "logprob": "log-probability",
    "prob": "answer probability",
    "rougeL": "ROUGE-L",
    "rougeL_f1": "ROUGE-L F1",
}


def plain_metric(metric: str) -> str:
    """A metric's name in a sentence."""
    return _PLAIN.get(metric, metric)


def headline(report: RunReport) -> str:
    """What happened, in one sentence."""
    chosen, row = report.chosen, forget_row(report)
    if chosen.coefficient == 0:
        if chosen.bound_met:
            return "Nothing was subtracted: no coefficient did better than none. The model is unchanged."
        return "No coefficient passed the rule; the model is unchanged."
    at = f"λ = {coefficient(chosen.coefficient)}"
    kept = _kept_clause(report)
    if row is None:
        learned = [_learned(r) for r in report.scores if r.set == "learn" and r.metric == chosen.forget_metric]
        what = f"The model {listing(learned)}" if learned else "The task vector was subtracted"
        return f"{what} at {at}; {kept}."
    fall = row.before.value - row.after.value
    verb = "fell" if fall > 0 else "rose" if fall < 0 else "stayed"
    figures = f"from {short(row.before.value)} to {short(row.after.value)}" if fall else f"at {short(row.before.value)}"
    what = f"{row.name} {plain_metric(row.metric)} {verb} {figures}"
    return f"{_opening(row)}: {what} at {at}; {kept}."


def _learned(row: ScoreRow) -> str:
    gain = row.after.value - row.before.value if row.higher_is_better else row.before.value - row.after.value
    verb = "learned" if gain > 0 else "did not learn"
    return f"{verb} {row.name} ({plain_metric(row.metric)} {short(row.before.value)} to {short(row.after.value)})"


def _opening(row: ScoreRow) -> str:
    gone = row.before.value - row.after.value if row.higher_is_better else row.after.value - row.before.value
    if not gone > 0:  # also for a missing value
        return "The model did not forget"
    noise = margin_of_change(row)
    return "The model forgot" if noise is None or gone > noise else "The model forgot no more than chance may explain"


def _kept_clause(report: RunReport) -> str:
    if not kept_keys(report):
        return "no kept set was measured"
    if report.chosen.bound_met:
        kept = "every kept metric stayed within its bound"
        return f"{kept} on validation items, but not on test items" if _missed(report) else kept
    broken = _point(report, report.chosen.coefficient)
    why = f" ({listing(broken.broken)})" if broken and broken.broken else ""
    return f"but the bound was not met{why}"


def remarks(report: RunReport) -> tuple[str, ...]:
    """What a reader must know beside the headline: why nothing passed, or what the test items say otherwise."""
    chosen = report.chosen
    if chosen.coefficient == 0:
        tried = sorted((p for p in report.sweep if p.coefficient > 0), key=lambda p: p.coefficient)
        if not tried:
            return ()
        first = tried[0]
        at = f"At the smallest coefficient tried, λ = {coefficient(first.coefficient)},"
        if first.broken:
            why = f"{at} the bound was broken: {listing(first.broken)}."
            return (f"{why} A smaller coefficient, or method: contrast, may pass.",)
        return (f"{at} every kept metric was within its bound, but the forget score was no better than at λ = 0.",)
    if chosen.keep is None or not chosen.bound_met:
        return ()
    under = [f"{row.set}/{row.name} {row.metric} ({kept_figure(report, row)})" for row in _missed(report)]
    if not under:
        return ()
    met = (
        f"The bound ({bound_figure(report, _missed(report)[0].metric)}) was met on validation items, where λ is chosen"
    )
    return (f"{met}; on test items it was not met by {listing(under)}.",)


def _missed(report: RunReport) -> list[ScoreRow]:
    return [row for row, share in final_shares(report) if report.chosen.keep is not None and share < report.chosen.keep]


def how_searched(report: RunReport) -> str | None:
    """How the coefficient was looked for and what that took; None where it is not recorded."""
    size = len(report.chosen.grid)
    tried = [p for p in report.sweep if p.coefficient > 0]
    if not size:
        return None
    if report.chosen.search == "grid":
        return f"All {counted(size, 'coefficient')} of the grid were scored." if size > 1 else None
    return f"Found by bisection: {len(tried)} of the grid's {counted(size, 'coefficient')} were scored."


def _point(report: RunReport, value: float) -> SweepPoint | None:
    return next((p for p in report.sweep if math.isclose(p.coefficient, value, abs_tol=1e-12)), None)
