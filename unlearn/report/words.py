"""A report in sentences: what happened, what a reader must know beside it, and how the coefficient was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearn.recipe.metrics import is_perplexity
from unlearn.report.figures import (
    FORGOTTEN,
    bound_figure,
    goal_rows,
    kept_figure,
    kept_keys,
    margin_of_change,
    memory,
    missed,
    unseeing,
)
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
    plain_metric,
)
from unlearn.text import coefficient, counted, listing, number, percent, short, signed

CAVEAT = (
    "Unlearning is not deletion. These scores say what the model does when it is asked like this; rephrasing, few "
    "examples in the prompt, a little fine-tuning or a look at its internals may bring the knowledge back. Where data "
    "has to be gone, train without it."
)
_NATS = 30.0  # beyond which a factor says nothing more


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
        at = report.chosen.coefficient
        broken = next((p.broken for p in report.sweep if math.isclose(p.coefficient, at, abs_tol=1e-12)), ())
        why = f" ({listing(broken)})" if broken else ""
        return f"but the bound was not met{why}"
    if len(cannot) == len(keys):
        return "but no kept set could have shown harm"
    kept = "every kept metric stayed within its bound"
    kept += " on validation items, but not on test items" if missed(report) else ""
    return f"{kept}, but {len(cannot)} of {len(keys)} could not have shown harm" if cannot else kept


def remarks(report: RunReport) -> tuple[str, ...]:
    """What a reader must know beside the headline: why nothing passed, or what the test items say otherwise."""
    if report.chosen.coefficient == 0:
        first = min((p for p in report.sweep if p.coefficient > 0), key=lambda p: p.coefficient, default=None)
        if first is None:
            return ()
        at = f"At the smallest coefficient tried, λ = {coefficient(first.coefficient)},"
        if not first.broken:
            return (
                f"{at} every kept metric was within its bound, but what was asked for was no better than at λ = 0.",
            )
        why = f"{at} the bound was broken: {listing(first.broken)}."
        return (f"{why} A smaller coefficient, or method: contrast, may pass.",)
    under = [
        f"{row.set}/{row.name} {row.metric} ({kept_figure(report, row)}, bound {bound_figure(report, row.metric)})"
        for row in missed(report)
    ]
    if not report.chosen.bound_met or not under:
        return ()
    return (f"Every bound was met on validation items, where λ is chosen; on test items not that of {listing(under)}.",)


def how_searched(report: RunReport) -> str | None:
    """How the coefficient was looked for and what that took; None where it is not recorded."""
    size, tried = len(report.chosen.grid), sum(p.coefficient > 0 for p in report.sweep)
    if report.chosen.search == "bisect" and size:
        return f"Found by bisection: {tried} of the grid's {counted(size, 'coefficient')} were scored."
    return f"All {size} coefficients of the grid were scored." if size > 1 else None


# -- comparisons and attacks, in a line each


# The figures that a benchmark is known by, in its own column names.
_HEADLINES = {
    "tofu": ("Forget Quality", "Model Utility"),
    "muse": ("verbmem_f", "privleak", "knowmem_f", "knowmem_r"),
}
NAMES: dict[Who, str] = {"target": "before", "edited": "after", "reference": "never knew"}


def evidence_facts(report: RunReport) -> list[tuple[str, str]]:
    """(name, sentence) of each comparison that the run has."""
    facts = [("memory", said)] if (said := memory_line(report)) else []
    if report.benchmark is not None:
        facts.append((report.benchmark.name, benchmark_line(report.benchmark)))
    if report.membership:
        facts.append(("membership", membership_line(report.membership)))
    if report.robustness is not None and (sentence := report.robustness.sentence()):
        facts.append(("robustness", sentence))
    return facts


def memory_line(report: RunReport) -> str:
    """Whether what was asked for is forgotten or suppressed, set by set; empty where nothing tells."""
    parts = []
    for row in goal_rows(report):
        if row.set == "forget" and report.chosen.coefficient and (found := memory(report, row)) is not None:
            before, after = short(found.row.before.value), short(found.row.after.value)
            parts.append(
                f"{row.name} is {found.became}: {percent(round(found.left, 2))} of what ties its answers to their own "
                f"prompts is left ({before} to {after} nats; forgotten is {percent(FORGOTTEN)} or less)"
            )
    return "; ".join(parts)


def benchmark_line(found: Benchmark) -> str:
    """The benchmark's headline figures of every model, and what is missing."""
    parts = []
    for column in _HEADLINES[found.name]:
        values = [(NAMES[who], found.rows[who].get(column)) for who in NAMES if who in found.rows]
        known = [f"{name} {number(value)}" for name, value in values if isinstance(value, int | float)]
        parts += [f"{column}: {', '.join(known)}"] if known else []
    return "; ".join(parts) + (f". {found.missing}" if found.missing else "")


def membership_line(found: tuple[Membership, ...]) -> str:
    """The area under the ROC curve of the main attack, for every model."""
    rows = [m for who in NAMES for m in found if m.who == who and m.attack == "min_k"]
    shown = [f"{NAMES[m.who]} {number(m.auc)} ({number(m.low)} to {number(m.high)})" for m in rows]
    return f"AUC by Min-k: {', '.join(shown)}; .5 is a coin"


# -- what the theory says of a measured correlation, and how good the first-order prediction was


_FEWEST = 3  # sets of which ranks can be compared
_UNITS = {"logprob": "nats per answer", "loss": "nats per token"}
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
    if entry.verdict == "aligned":
        return "Aligned: no λ comes with a guarantee; what the two tasks share is lost in both."
    limit = f"1/α² = {short(1 / entry.alpha_changes**2)}"
    if entry.verdict == "irrelevant":
        limit = "1/α², large for α near 0"
    return (
        f"{entry.verdict.capitalize()}: subtracting should forget for every λ up to an order of {limit}, and the loss "
        "of what is kept grows at most in proportion to λ."
    )


def compare(foresight: Foresight, points: Sequence[SweepPoint], chosen: float) -> Comparison:
    """Measured against predicted changes of loss, from the sweep's ``logprob`` and ``loss`` scores.

    The summary is taken at the chosen coefficient, where that is 0 at the smallest above it.
    """
    whole = sorted(points, key=lambda p: p.coefficient)
    goals, sets = (tuple(_over(entry, whole) for entry in entries) for entries in (foresight.goals, foresight.kept))
    at = chosen if chosen > 0 else next((p.coefficient for p in whole if p.coefficient > 0), None)
    here = [(entry, p) for entry, found in zip(foresight.kept, sets, strict=True) if at and (p := found.at(at))]
    off: dict[str, list[float]] = {}
    for entry, p in here:
        off.setdefault(_UNITS.get(entry.metric, entry.metric), []).append(abs(p.measured - p.predicted))
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
    """Spearman's rank correlation; None of fewer than three, or where there are no ranks."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len(one) < _FEWEST or not all(map(math.isfinite, (*one, *two))) or 1 in (len(set(one)), len(set(two))):
        return None
    return float(spearmanr(one, two).statistic)


def how_good(comparison: Comparison) -> tuple[str, ...]:
    """How good the prediction was, in sentences."""
    if comparison.coefficient is None or not comparison.errors:
        return ("The sweep has no loss of a kept set to hold against the prediction.",)
    off = [f"{number(e.nats)} {e.unit} on average over {counted(e.sets, 'kept set')}" for e in comparison.errors]
    said = [f"At λ = {coefficient(comparison.coefficient)} the straight line was off by {listing(off)}."]
    if len(off) > 1:
        return (*said, "Sets measured in unlike units have no order of loss to predict.")
    if comparison.kept < _FEWEST:
        said.append(f"Of fewer than {_FEWEST} kept sets there is no order to predict.")
    elif comparison.ranks is not None:
        said.append(f"It put them in order of their loss with a rank correlation of {signed(comparison.ranks)}.")
    if comparison.compared < _FEWEST:
        said.append(
            f"Whether the correlation α tells who will lose most cannot be said of fewer than {_FEWEST} sets with both."
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
    pairs = [(e, s) for e, s in zip(report.foresight.kept, found.sets, strict=True) if e.slope is not None]
    pairs.sort(key=lambda pair: -(pair[0].slope or 0.0))
    first = {entry.metric: (entry, measured) for entry, measured in reversed(pairs)}
    return "; ".join(_foreseen(*pair, found.coefficient) for pair in pairs if first[pair[0].metric] == pair) or None


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
    """The points of one set, from the sweep's scores of its loss."""
    losses = [
        (p.coefficient, -s.score.value if s.higher_is_better else s.score.value)
        for p in points
        for s in p.scores
        if s.key == (entry.set, entry.name, entry.metric) and math.isfinite(s.score.value)
    ]
    start = next((loss for c, loss in losses if c == 0), None)
    if start is None or entry.slope is None:
        return SetComparison(entry.set, entry.name, ())
    return SetComparison(entry.set, entry.name, tuple(Point(c, loss - start, c * entry.slope) for c, loss in losses))
