"""A report in sentences: what happened, what a reader must know beside it, and how the coefficient was found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unlearn.metrics import is_perplexity
from unlearn.report import RunReport, ScoreRow, SweepPoint
from unlearn.report_figures import (
    bound_figure,
    goal_rows,
    kept_figure,
    kept_keys,
    margin_of_change,
    missed,
    unseeing,
)
from unlearn.wording import coefficient, counted, listing, percent, short

CAVEAT = (
    "Unlearning is not deletion. These scores say what the model does when it is asked like this; rephrasing, few "
    "examples in the prompt, a little fine-tuning or a look at its internals may bring the knowledge back. Where data "
    "has to be gone, train without it."
)
_NATS = 30.0  # beyond which a factor says nothing more
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


def chance_of(chance: float | None, form: str = "{}") -> str:
    """What guessing scores, to stand beside an accuracy in some form; empty where there is no such thing."""
    return "" if chance is None else form.format(f"chance {short(chance)}")


def headline(report: RunReport) -> str:
    """What happened, in one sentence."""
    chosen, rows = report.chosen, goal_rows(report)
    if chosen.coefficient == 0:
        if chosen.bound_met:
            return "Nothing was subtracted: no coefficient did better than none. The model is unchanged."
        return "No coefficient passed the rule; the model is unchanged."
    what = outcome(rows) or "The task vector was subtracted"
    return f"{what} at λ = {coefficient(chosen.coefficient)}; {_kept_clause(report)}."


def outcome(rows: Sequence[ScoreRow]) -> str:
    """What came of the goals in words to take home: what the model still knows, beside what guessing would give."""
    if len(rows) == 1 and rows[0].set == "forget":
        row = rows[0]
        if little := _little(row):
            return f"The model {little}: {row.name} {_moved(row, _verb(row))}{_guess(row, ' ({})')}"
        return f"The model {_left(row, 'what it was asked to forget')}: {row.name} {_moved(row, _verb(row))}"
    return f"The model {listing(map(_done, rows))}" if rows else ""


def _done(row: ScoreRow) -> str:
    """What came of one of several goals, after "the model"."""
    figures = f"({_moved(row)}{_guess(row, ', {}')})"
    if row.set == "learn":
        return f"{_learned(row)} {figures}"
    if little := _little(row):
        return f"{little}{' of' if 'no more' in little else ''} {row.name} {figures}"
    return f"{_left(row, row.name)} ({_moved(row)})"


def _moved(row: ScoreRow, verb: str = "") -> str:
    """``accuracy 0.92 to 0.46``, with a verb ``accuracy fell from 0.92 to 0.46``."""
    metric, before, after = plain_metric(row.metric), short(row.before.value), short(row.after.value)
    if verb == "stayed":
        return f"{metric} stayed at {before}"
    return f"{metric} {verb} from {before} to {after}" if verb else f"{metric} {before} to {after}"


def _guess(row: ScoreRow, form: str) -> str:
    """Beside a sentence that speaks of another kind of chance."""
    return "" if row.chance is None else form.format(f"guessing gives {short(row.chance)}")


def _verb(row: ScoreRow) -> str:
    change = row.after.value - row.before.value
    return "rose" if change > 0 else "fell" if change < 0 else "stayed"


def _gone(row: ScoreRow) -> float:
    """By how much a score got worse."""
    change = row.before.value - row.after.value
    return change if row.higher_is_better else -change


def _little(row: ScoreRow) -> str:
    """That a set was not forgotten, or not beyond doubt; empty where it was."""
    if not _gone(row) > 0:  # also for a missing value
        return "did not forget"
    noise = margin_of_change(row)
    return "forgot no more than chance may explain" if noise is not None and _gone(row) <= noise else ""


def _left(row: ScoreRow, what: str) -> str:
    """``still answers 46 % of …, where guessing would give 25 %``."""
    value, metric = row.after.value, row.metric
    if row.chance is not None and value <= row.chance:
        return f"answers {_share(value)} of {what}, no more than the {_share(row.chance)} that guessing would give"
    guess = "" if row.chance is None else f", where guessing would give {_share(row.chance)}"
    if metric.startswith(("acc", "exact")) and metric != "exact_memorisation":
        return f"still answers {_share(value)} of {what}{guess}"
    if metric == "exact_memorisation":
        return f"still recites {_share(value)} of {what}"
    if metric == "prob":
        return f"still gives {what} a probability of {_share(value)}"
    times = _times_less_likely(row)
    if times is not None:
        return f"now finds {what} {short(times)} times less likely"
    return f"still scores {short(value)} on {what}"


def _times_less_likely(row: ScoreRow) -> float | None:
    """By what factor a likelihood fell, per token (perplexity, loss) or per answer (logprob)."""
    before, after = row.before.value, row.after.value
    if is_perplexity(row.metric):
        return after / before if before > 0 else None
    nats = {"loss": after - before, "logprob": before - after}.get(row.metric)
    return None if nats is None or not abs(nats) < _NATS else math.exp(nats)


def _share(value: float) -> str:
    return "less than 1 %" if 0 < value < 0.01 else percent(round(value, 2))


def _learned(row: ScoreRow) -> str:
    gain, noise = -_gone(row), margin_of_change(row)
    if not gain > 0:
        return f"did not learn {row.name}"
    if noise is not None and gain <= noise:
        return f"learned no more of {row.name} than chance may explain"
    return f"learned {row.name}"


def _kept_clause(report: RunReport) -> str:
    keys, cannot = kept_keys(report), unseeing(report)
    if not keys:
        return "no kept set was measured"
    if not report.chosen.bound_met:
        broken = _point(report, report.chosen.coefficient)
        why = f" ({listing(broken.broken)})" if broken and broken.broken else ""
        return f"but the bound was not met{why}"
    if len(cannot) == len(keys):
        return "but no kept set could have shown harm"
    kept = "every kept metric stayed within its bound"
    kept += " on validation items, but not on test items" if missed(report) else ""
    return f"{kept}, but {len(cannot)} of {len(keys)} could not have shown harm" if cannot else kept


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
        return (f"{at} every kept metric was within its bound, but what was asked for was no better than at λ = 0.",)
    if not chosen.bound_met or not missed(report):
        return ()
    under = [
        f"{row.set}/{row.name} {row.metric} ({kept_figure(report, row)}, bound {bound_figure(report, row.metric)})"
        for row in missed(report)
    ]
    return (f"Every bound was met on validation items, where λ is chosen; on test items not that of {listing(under)}.",)


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
