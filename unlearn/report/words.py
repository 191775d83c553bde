"""A report in sentences: what happened, what a reader must know beside it, and how the coefficient was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unlearn.data.sets import PLAIN
from unlearn.recipe.schema import is_perplexity
from unlearn.report.figures import (
    FORGOTTEN,
    Z95,
    Result,
    bound_figure,
    goal_rows,
    gone,
    kept_figure,
    kept_keys,
    margin_of_change,
    memories,
    missed,
    unseeing,
)
from unlearn.results import (
    BEST,
    AttackScore,
    Benchmark,
    Membership,
    Robustness,
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
    chosen = report.chosen
    if chosen.coefficient == 0:
        if chosen.bound_met:
            return "Nothing was subtracted: no coefficient did better than none. The model is unchanged."
        return "No coefficient passed the rule; the model is unchanged."
    what = outcome(goal_rows(report)) or "The task vector was subtracted"
    if chosen.search == "given":
        return f"{what}; {_kept_clause(report)}."
    return f"{what} at λ = {coefficient(chosen.coefficient)}; {_kept_clause(report)}."


def outcome(rows: Sequence[ScoreRow]) -> str:
    """What came of the goals in words to take home: what the model still knows, beside what guessing would give."""
    if len(rows) == 1 and rows[0].set == "forget":
        row, little = rows[0], _little(rows[0])
        change, metric = row.after.value - row.before.value, plain_metric(row.metric)
        before, after = short(row.before.value), short(row.after.value)
        moved = f"{'rose' if change > 0 else 'fell'} from {before} to {after}"
        moved = moved if change > 0 or change < 0 else f"stayed at {before}"
        guess = _guess(row, " ({})") if little else ""
        return f"The model {little or _left(row, 'what it was asked to forget')}: {row.name} {metric} {moved}{guess}"
    return f"The model {listing(map(_done, rows))}" if rows else ""


def _done(row: ScoreRow) -> str:
    """What came of one of several goals, after "the model"."""
    moved = f"{plain_metric(row.metric)} {short(row.before.value)} to {short(row.after.value)}"
    if row.set == "learn":
        noise = margin_of_change(row)
        said = f"learned {row.name}"
        if not -gone(row) > 0:
            said = f"did not learn {row.name}"
        elif noise is not None and -gone(row) <= noise:
            said = f"learned no more of {row.name} than chance may explain"
        return f"{said} ({moved}{_guess(row, ', {}')})"
    if little := _little(row):
        return f"{little}{' of' if 'no more' in little else ''} {row.name} ({moved}{_guess(row, ', {}')})"
    return f"{_left(row, row.name)} ({moved})"


def _guess(row: ScoreRow, form: str) -> str:
    """Beside a sentence that speaks of another kind of chance."""
    return "" if row.chance is None else form.format(f"guessing gives {short(row.chance)}")


def _little(row: ScoreRow) -> str:
    """That a set was not forgotten, or not beyond doubt; empty where it was."""
    if not gone(row) > 0:  # also for a missing value
        return "did not forget"
    noise = margin_of_change(row)
    return "forgot no more than chance may explain" if noise is not None and gone(row) <= noise else ""


def _left(row: ScoreRow, what: str) -> str:
    """``still answers 46 % of …, where guessing would give 25 %``."""
    before, value, metric = row.before.value, row.after.value, row.metric
    if row.chance is not None and value <= row.chance:
        return f"answers {_share(value)} of {what}, no more than the {_share(row.chance)} that guessing would give"
    if metric == "exact_memorisation":
        return f"still recites {_share(value)} of {what}"
    if metric.startswith(("acc", "exact")):
        guess = "" if row.chance is None else f", where guessing would give {_share(row.chance)}"
        return f"still answers {_share(value)} of {what}{guess}"
    if metric == "prob":
        return f"still gives {what} a probability of {_share(value)}"
    if is_perplexity(metric) and before > 0:  # per token, as a loss; a log-probability is of a whole answer
        return f"now finds {what} {short(value / before)} times less likely"
    nats = {"loss": value - before, "logprob": before - value}.get(metric, math.inf)
    if abs(nats) < _NATS:
        return f"now finds {what} {short(math.exp(nats))} times less likely"
    return f"still scores {short(value)} on {what}"


def _share(value: float) -> str:
    return "less than 1 %" if 0 < value < 0.01 else percent(round(value, 2))


def _kept_clause(report: RunReport) -> str:
    keys, cannot = kept_keys(report), unseeing(report)
    if not keys:
        return "no kept set was measured"
    if report.chosen.search == "given" and (out := missed(report)):
        return f"but {listing(' '.join(row.key) for row in out)} went out of bounds"
    if not report.chosen.bound_met:
        at = report.chosen.coefficient
        broken = next((p.broken for p in report.sweep if math.isclose(p.coefficient, at, abs_tol=1e-12)), ())
        return f"but the bound was not met{f' ({listing(broken)})' if broken else ''}"
    if len(cannot) == len(keys):
        return "but no kept set could have shown harm"
    kept = "every kept metric stayed within its bound"
    kept += " on validation items, but not on test items" if missed(report) else ""
    return f"{kept}, but {len(cannot)} of {len(keys)} could not have shown harm" if cannot else kept


def remarks(report: RunReport) -> tuple[str, ...]:
    """What a reader must know beside the headline: why nothing passed, or what the test items say otherwise."""
    if report.chosen.search == "given":
        return ("Before is the recipe's model; after is one that was edited elsewhere. Nothing was chosen here.",)
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
    out = [
        f"{row.set}/{row.name} {row.metric} ({kept_figure(report, row)}, bound {bound_figure(report, row.metric)})"
        for row in missed(report)
    ]
    if not report.chosen.bound_met or not out:
        return ()
    return (f"Every bound was met on validation items, where λ is chosen; on test items not that of {listing(out)}.",)


def how_searched(report: RunReport) -> str | None:
    """How the coefficient was looked for and what that took; None where it is not recorded."""
    if report.chosen.search == "given":
        return None
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
    facts = [("memory", memory_line(report)), ("wording", wording_line(report))]
    if report.benchmark is not None:
        facts.append((report.benchmark.name, benchmark_line(report.benchmark)))
    facts.append(("membership", membership_line(report.membership)))
    if report.robustness is not None:
        facts.append(("robustness", attacks_line(report.robustness)))
    return [(name, said) for name, said in facts if said]


def memory_line(result: Result) -> str:
    """Whether what was asked for is forgotten or suppressed, set by set; empty where nothing tells."""
    parts = []
    for (_, name, _), found in memories(result).items():
        before, after = short(found.row.before.value), short(found.row.after.value)
        never = f", {short(found.never)} in a model that never knew" if found.never else ""
        parts.append(
            f"{name} is {found.became}: {percent(round(found.left, 2))} of what ties its answers to their own "
            f"prompts is left ({before} to {after} nats{never}; forgotten is {percent(FORGOTTEN)} or less)"
        )
    return "; ".join(parts)


def wording_line(result: Result) -> str:
    """What sets that stand in a chat template score outside it; empty where none does."""
    rows, parts = {row.key: row for row in result.scores}, []
    for row in goal_rows(result):
        plain = rows.get((row.set, f"{row.name}@{PLAIN}", row.metric))
        if plain is not None and result.chosen.coefficient:
            inside = f"{short(row.before.value)} to {short(row.after.value)}"
            apart = bool(_little(plain)) != bool(_little(row))
            doubt = ": what has gone from one wording alone is not forgotten" if apart else ""
            parts.append(f"asked outside its chat template the model {_done(plain)}; in it {inside}{doubt}")
    return "; ".join(parts)


def benchmark_line(found: Benchmark) -> str:
    """The benchmark's headline figures of every model, and what is missing."""
    parts = []
    for column in _HEADLINES[found.name]:
        values = [(NAMES[who], found.rows[who].get(column)) for who in NAMES if who in found.rows]
        known = [f"{name} {number(value)}" for name, value in values if isinstance(value, int | float)]
        parts += [f"{column}: {', '.join(known)}"] if known else []
    return "; ".join(parts) + (f". {found.missing}" if found.missing else "")


def membership_line(found: Sequence[Membership]) -> str:
    """The area under the ROC curve of the main attack, for every model; empty without one."""
    rows = [m for who in NAMES for m in found if m.who == who and m.attack == "min_k"]
    shown = [f"{NAMES[m.who]} {number(m.auc)} ({number(m.low)} to {number(m.high)})" for m in rows]
    return f"AUC by Min-k: {', '.join(shown)}; .5 is a coin" if found else ""


def attacks_line(found: Robustness) -> str:
    """What the attacks bring back, in plain English; empty where nothing was attacked.

    Of relearning the last step counts, of the lens the layer that shows most. A change smaller than 1.96 standard
    errors (of both scores, as if their items were different ones) cannot be told from chance, and such attacks are only
    counted.
    """
    attacks = _of_each_attack(found)
    if not attacks:
        return ""
    before, after = found.plain("target"), found.plain("edited")
    if before is None or after is None:
        return "What the attacks bring back cannot be told: a score without an attack is missing."
    fell = (
        f"{plain_metric(found.metric)} {short(before.value)} to {short(after.value)}{chance_of(found.chance, ', {}')}"
    )
    shares = [(s, share) for s in attacks if (share := found.recovered(s)) is not None]
    if not shares:
        return f"The edit forgot nothing that can be told from chance ({fell}), so nothing can come back."
    # of the wordings of a probe their mean counts here: the best of several is high by chance alone
    shares = [(s, share) for s, share in shares if not s.attack.endswith(BEST)] or shares
    strong = [(s, share) for s, share in shares if round(share, 2) > 0 and not _within_chance(found, s)]
    weak = len(shares) - len(strong)
    if not strong:
        back = "the one attack brings nothing back" if weak == 1 else f"none of {weak} attacks brings anything back"
        return f"Of what was forgotten ({fell}), {back} that can be told from chance."
    ranked = sorted(strong, key=lambda pair: -pair[1])
    parts = [f"{percent(round(share, 2))}{_metric(found, s)} with {_described(s)}" for s, share in ranked]
    parts[0] = parts[0].replace(" with ", " comes back with ", 1)
    rest = f"; with {counted(weak, 'other attack')} nothing that can be told from chance" if weak else ""
    said = f"Of what was forgotten ({fell}), {listing(parts)}{rest}."
    return " ".join([said, *_of_the_reference(found, [s for s, _ in strong])])


def _of_each_attack(found: Robustness) -> list[AttackScore]:
    """One score of the edited model for each attack; the lens's last layer is its own answer and no attack."""
    edited = [s for s in found.scores if s.who == "edited" and s.kind != "none"]
    own = max((s.layer for s in edited if s.layer is not None), default=0)
    groups: dict[tuple[str, str, str], list[AttackScore]] = {}
    for score in edited:
        if score.layer is None or score.layer != own:
            groups.setdefault((score.kind, score.attack, score.metric), []).append(score)

    def says_most(score: AttackScore) -> tuple[float, float]:
        return score.steps or 0, score.value if score.higher_is_better else -score.value

    return [max(scores, key=says_most) for scores in groups.values()]


def _metric(found: Robustness, score: AttackScore) -> str:
    return "" if score.metric == found.metric else f" ({plain_metric(score.metric)})"


def _described(score: AttackScore) -> str:
    """The attack with its steps or its layer."""
    if score.steps is not None:
        return f"{counted(score.steps, 'step')} of {score.attack}"
    return score.attack if score.layer is None else f"layer {score.layer} of {score.attack}"


def _within_chance(found: Robustness, score: AttackScore) -> bool:
    base = found.plain(score.who, score.metric)
    if base is None or score.stderr is None or base.stderr is None:
        return False
    return abs(score.value - base.value) < Z95 * math.hypot(score.stderr, base.stderr)


def _of_the_reference(found: Robustness, strong: Sequence[AttackScore]) -> Iterator[str]:
    """What a model that never knew it makes of the attacks that bring something back: it can learn as well."""
    never = {s.under: s for s in found.scores if s.who == "reference"}
    pairs = [(never[s.under], found.plain("reference", s.metric)) for s in strong if s.under in never]
    known = [(there, base) for there, base in pairs if base is not None]
    if not known:
        return
    steps = [
        f"from {short(base.value)} to {short(there.value)} under {_described(there)}{_metric(found, there)}"
        for there, base in known
    ]
    yield f"The retain reference, which never knew it, goes {listing(steps)}."
    if any((found.recovered(there) or 0.0) > 0 and not _within_chance(found, there) for there, _ in known):
        yield "What it gains as well is learned anew, not brought back."


# -- what the theory says of a measured correlation, and how good the first-order prediction was


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


def loss_changes(entry: SetForesight, sweep: Sequence[SweepPoint]) -> tuple[Point, ...]:
    """Measured and predicted changes of a set's loss over the sweep, from its ``logprob`` or ``loss`` scores.

    λ = 0 is among them; empty where the sweep has no such score.
    """
    losses = [
        (p.coefficient, -s.score.value if s.higher_is_better else s.score.value)
        for p in sorted(sweep, key=lambda p: p.coefficient)
        for s in p.scores
        if s.key == (entry.set, entry.name, entry.metric) and math.isfinite(s.score.value)
    ]
    start = next((loss for c, loss in losses if c == 0), None)
    if start is None or entry.slope is None:
        return ()
    return tuple(Point(c, loss - start, c * entry.slope) for c, loss in losses)


def foreseen_at(report: RunReport) -> float | None:
    """Where predictions are compared: the chosen coefficient, where that is 0 the smallest above it."""
    above = [p.coefficient for p in report.sweep if p.coefficient > 0]
    return report.chosen.coefficient or min(above, default=None)


def point_at(points: Sequence[Point], value: float | None) -> Point | None:
    """The point of one coefficient."""
    return next((p for p in points if value is not None and math.isclose(p.coefficient, value, abs_tol=1e-12)), None)


def how_good(report: RunReport) -> str:
    """How good the predictions were for the kept sets, in a sentence: mean |measured - predicted|."""
    at = foreseen_at(report)
    off: dict[str, list[float]] = {}
    for entry in report.foresight.kept if report.foresight else ():
        if p := point_at(loss_changes(entry, report.sweep), at):
            off.setdefault(_UNITS.get(entry.metric, entry.metric), []).append(abs(p.measured - p.predicted))
    if at is None or not off:
        return "The sweep has no loss of a kept set to hold against the prediction."
    means = [
        f"{number(math.fsum(nats) / len(nats))} {unit} on average over {counted(len(nats), 'kept set')}"
        for unit, nats in off.items()
    ]
    return f"At λ = {coefficient(at)} the straight line was off by {listing(means)}."


def dearest(report: RunReport) -> str:
    """The kept set that was foreseen to lose most, of each unit one, in a line; empty where nothing was foreseen."""
    known = [(e.slope, e) for e in (report.foresight.kept if report.foresight else ()) if e.slope is not None]
    first: dict[str, SetForesight] = {}
    for _, entry in sorted(known, key=lambda pair: -pair[0]):
        first.setdefault(entry.metric, entry)
    parts = []
    for entry in first.values():
        verdict = ""
        if entry.verdict is not None and entry.alpha_changes is not None:
            verdict = f" {entry.verdict} (α {signed(entry.alpha_changes)})"
        figures = f"{signed(entry.slope)} nats per unit of λ"
        if point := point_at(loss_changes(entry, report.sweep), foreseen_at(report)):
            figures = f"{signed(point.predicted)} nats predicted, {signed(point.measured)} measured"
            figures += f" at λ = {coefficient(point.coefficient)}"
        parts.append(f"{entry.set}/{entry.name}{verdict}, {figures}")
    return "; ".join(parts)
