"""A report in sentences: what happened, what a reader must know beside it, and how the coefficient was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearn.recipe.metrics import is_perplexity
from unlearn.report.figures import bound_figure, goal_rows, kept_figure, kept_keys, margin_of_change, missed, unseeing
from unlearn.results import (
    Benchmark,
    Foresight,
    Membership,
    Role,
    RunReport,
    ScoreRow,
    SetForesight,
    SweepPoint,
    Who,
)
from unlearn.text import coefficient, counted, listing, number, percent, short, signed

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


# -- the comparisons and attacks of a run in a line each


# The figures that a benchmark is known by, in its own column names.
HEADLINES = {
    "tofu": ("Forget Quality", "Model Utility"),
    "muse": ("verbmem_f", "privleak", "knowmem_f", "knowmem_r"),
}
NAMES: dict[Who, str] = {"target": "before", "edited": "after", "reference": "never knew"}
MAIN_ATTACK = "min_k"


def evidence_facts(report: RunReport) -> list[tuple[str, str]]:
    """(name, sentence) of each that the run has."""
    facts = []
    if report.benchmark is not None:
        facts.append((report.benchmark.name, benchmark_line(report.benchmark)))
    if report.membership:
        facts.append(("membership", membership_line(report.membership)))
    if report.robustness is not None and (said := report.robustness.sentence()):
        facts.append(("robustness", said))
    return facts


def benchmark_line(found: Benchmark) -> str:
    """The benchmark's headline figures of every model, and what is missing."""
    parts = []
    for column in HEADLINES[found.name]:
        values = [(NAMES[who], found.rows[who].get(column)) for who in NAMES if who in found.rows]
        known = [f"{name} {number(value)}" for name, value in values if isinstance(value, int | float)]
        if known:
            parts.append(f"{column}: {', '.join(known)}")
    return "; ".join(parts) + (f". {found.missing}" if found.missing else "")


def membership_line(found: tuple[Membership, ...]) -> str:
    """The area under the ROC curve of one attack, for every model."""
    rows = [m for who in NAMES for m in found if m.who == who and m.attack == MAIN_ATTACK]
    shown = [f"{NAMES[m.who]} {number(m.auc)} ({number(m.low)} to {number(m.high)})" for m in rows]
    return f"AUC by Min-k: {', '.join(shown)}; .5 is a coin"


# -- what the theory says of a measured correlation, and how well the first-order prediction held. costs


FEWEST = 3  # sets of which ranks can be compared
UNITS = {"logprob": "nats per answer", "loss": "nats per token"}
FORESIGHT_CAVEAT = (
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
