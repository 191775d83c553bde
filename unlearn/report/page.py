"""``report.html``: the whole report as one file that needs no network, and its charts as files for papers."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup, escape

from unlearn import text
from unlearn.recipe.schema import is_perplexity
from unlearn.report import figures, words
from unlearn.report.charts import DASHES, Axis, Chart, Key, Mark, Point, Series, axis_of, chart, spark, style
from unlearn.report.figures import (
    FrontierPoint,
    bound_figure,
    frontier,
    goal_rows,
    interval,
    kept_figure,
    kept_keys,
    margin,
    mean_left,
    memories,
    missed,
    total_seconds,
    with_margin,
    worst_kept,
)
from unlearn.report.words import NAMES, chance_of, foreseen_at, how_searched, loss_changes, reading
from unlearn.report.words import Point as Change
from unlearn.results import (
    AttackScore,
    Example,
    Robustness,
    RunReport,
    Score,
    SetForesight,
    TaskScore,
    Who,
    plain_metric,
)
from unlearn.score.search import bound_of
from unlearn.text import MISSING, clean, coefficient, counted, duration, listing, number, percent, signed

if TYPE_CHECKING:
    from jinja2 import Environment

Size = tuple[float, float]
Spot = tuple[FrontierPoint, Score, float]  # with the goal's score and what is kept at worst
T = TypeVar("T")
WIDE, NARROW, PAPER = (1000.0, 460.0), (360.0, 380.0), (560.0, 400.0)
TOP = 1.5  # largest share on the frontier's axis: a tiny score at λ = 0 makes huge ones
_ROLES: dict[Who, str] = {"target": "forget", "edited": "retain", "reference": "utility"}
_DIFF_WORDS = 1500  # beyond this a word-by-word comparison is slow and nobody reads it
_PROMPT_SHOWN = 480  # characters


@functools.cache
def templates(autoescape: bool = True) -> Environment:
    """The templates of ``templates/``, which may call what says numbers and reports; an unknown name is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    place = Environment(loader=PackageLoader("unlearn.report"), autoescape=autoescape, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    for module in (text, figures, words):
        known = vars(module).items()
        place.globals.update({name: value for name, value in known if callable(value) or name.isupper()})
    return place


def render(template: str, **values: Any) -> str:
    """A page from a template. It may show texts of anybody: all but the charts is escaped."""
    return clean(templates().get_template(template).render(values))


def render_html(report: RunReport) -> str:
    """The report as a self-contained HTML document (UTF-8 text)."""
    entries, date, points = _foreseen(report), report.provenance.get("date"), frontier_points(report)
    sizes = {"wide": WIDE, "narrow": NARROW} if points else {}
    own = (attack_rows, by_layer, changes, columns, end_of, fluent, losses, same, spark, with_numbers)
    return render(
        "report.html.j2",
        **{function.__name__: function for function in own},
        is_hash=re.compile(r"(sha256:)?[0-9a-f]{24,}").fullmatch,
        label_of=lambda key: str(key)[:1].upper() + str(key)[1:].replace("_", " "),
        general=lambda value: f"{value:.6g}".replace("-", "−") if math.isfinite(value) else number(value),
        heads=lambda who: [NAMES[w] for w in who],
        roles=_ROLES,
        report=report,
        date=date[:16].replace("T", " ") if isinstance(date, str) else "",
        cards=_cards(report),
        frontier_intro=_frontier_intro(report, points) if points else "",
        frontiers=[frontier_chart(report, size, f"frontier-{name}") for name, size in sizes.items()],
        keys=frontier_keys(report, points),
        curves=curves(report),
        guessed=any(s.chance is not None for p in report.sweep for s in p.scores),
        entries=entries,
        compared_at=foreseen_at(report),
        readings=_grouped(report.foresight.kept if report.foresight else (), reading),
        predictions=predictions(report),
        relearning=relearning(report),
        changed=lambda examples: sum(not same(e.before, e.after) for e in examples),
        examples=_grouped(report.examples, lambda e: (e.set, e.name)),
        metrics=_metrics(report),
        stages=_stages(report),
    )


def save_figures(report: RunReport, folder: Path) -> None:
    """The page's charts as PDF and PNG files in a folder, in place of earlier ones."""
    frontiers = [frontier_chart(report, PAPER, "frontier")] if frontier_points(report) else []
    charts = {one.name: one.chart for one in (*frontiers, *curves(report), *predictions(report), *relearning(report))}
    for name, drawn in charts.items():
        drawn.save(folder / name)
    for old in folder.glob("*.p[dn][fg]"):
        if old.stem not in charts:
            old.unlink()


# -- charts


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart with its name (of its file, and unique on the page), its title, its description and what it is about."""

    name: str
    title: str
    described: str
    about: Any
    chart: Chart

    def svg(self) -> Markup:
        """Inline markup."""
        return self.chart.svg(self.title, self.described, self.name)


def frontier_points(report: RunReport) -> list[Spot]:
    """What of the sweep can be drawn: points with a goal's score and something kept."""
    return [(p, p.forget, p.worst) for p in frontier(report)
            if p.forget and math.isfinite(p.forget.value) and p.worst is not None]  # fmt: skip


def frontier_chart(report: RunReport, size: Size, name: str) -> Drawn:
    """Goal's score (across) against the share of the kept scores that is left (up), one point per coefficient."""
    points, keep = frontier_points(report), report.chosen.keep
    metric, hint, _ = _goal_axis(report)
    room = int((size[0] - 38) / 6.6) - len(hint) - 3  # characters that fit around the middle of the frame
    title = f"{metric if len(metric) <= room else f'{metric[: max(room - 1, 1)]}…'}   {hint}"
    x = axis_of([goal.value for _, goal, _ in points], title, unit=False)
    if x.kind == "linear" and all(0 <= goal.value <= 1 for _, goal, _ in points):
        x = Axis(max(0.0, x.low), min(1.0, x.high), title)
    marks = [s for p, *_ in points for s in p.shares.values() if math.isfinite(s)]
    marks += [1.0 if keep is None else keep, 1.0]
    low, high = max(min(marks), 0.0), min(max(marks), TOP)
    space = max(0.08 * (high - low), 0.012)
    y = Axis(max(low - space, 0.0), high + space, "kept: share of the score at λ = 0", percent=True)
    lines = []
    for index, kept in enumerate(_kept_names(points)):
        line = [Point(goal.value, p.shares[kept]) for p, goal, _ in points if kept in p.shares]
        lines.append(Series(line, name=kept, size=5.5, **style(index)))
    spots, said, became = [], [], _became(report) if size != NARROW else ""  # the legend has it anyway
    for p, goal, worst in points:
        value, chosen = coefficient(p.coefficient), p.coefficient == report.chosen.coefficient
        tip = f"λ = {value}: forget {with_margin(goal)}, worst kept {percent(worst)}"
        tip += f"; bound broken: {'; '.join(p.broken)}" if p.broken else ""
        tip += f"; predictions collapsed: {p.collapsed}" if p.collapsed else ""
        mark: Mark = "cross" if p.collapsed else "full" if p.within_bound else "hollow"
        label = f"λ = {value}{became}" if chosen else value
        spots.append(Point(goal.value, worst, label=label, tip=tip, ring=chosen, mark=mark))
        outside = ("" if p.within_bound else ", outside the bound") + (", predictions collapsed" if p.collapsed else "")
        said.append(f"λ {value}: forget {with_margin(goal)}, kept {percent(worst)}{outside}")
    lines.append(Series(spots, name="worst kept set", width=2.2, size=9))
    bound = "" if keep is None else f"bound {percent(keep)}"
    drawn = chart(lines, x, y, size=size, bound=keep, shaded=True, bound_label=bound)
    return Drawn(name, "Frontier of forgetting against keeping", "; ".join(said), None, drawn)


def frontier_keys(report: RunReport, points: Sequence[Spot]) -> list[Key]:
    """What the frontier's marks mean."""
    names, keep, only = _kept_names(points), report.chosen.keep, [name for p, *_ in points for name in p.shares][:1]
    worst = "worst kept set" if names else f"{only[0]} (the only kept set)" if only else "kept"
    keys = [Key(worst, marker="o", dash="-"), *(Key(name, **style(n)) for n, name in enumerate(names))]
    chosen = f"chosen, λ = {coefficient(report.chosen.coefficient)}{_became(report)}"
    keys.append(Key(chosen, marker="o", ring=True))
    if any(not p.within_bound and not p.collapsed for p, *_ in points):
        keys.append(Key("bound broken", marker="o", mark="hollow"))
    if any(p.collapsed for p, *_ in points):
        keys.append(Key("predictions collapsed", marker="o", mark="cross"))
    return [*keys, *([Key(f"within the bound (≥ {percent(keep)})", "bound", region=True)] if keep is not None else [])]


def curves(report: RunReport) -> list[Drawn]:
    """One metric of each set (the rule's, where it has it) against the coefficient, with 95 % error bars."""
    chosen, kept, found = report.chosen, kept_keys(report), []
    for index, metrics in enumerate(_metrics(report).values()):
        key = min(metrics, key=lambda s: (s.key not in (*chosen.goals, *kept), s.metric != chosen.forget_metric)).key
        pairs = [(p.coefficient, s) for p in report.sweep for s in p.scores if s.key == key]
        pairs.sort(key=lambda pair: pair[0])
        known = [(c, s.score) for c, s in pairs if math.isfinite(s.score.value)]
        (start, first), bound = pairs[0], None
        if start == 0 and first.key in kept:
            bound = bound_of(first.metric, first.higher_is_better, first.score.value, chosen.keep, chosen.perplexity)
        values = [s.value for _, s in known]
        if not all(0 <= v <= 1 for v in values):
            ends = [s.value + side * (margin(s) or 0.0) for _, s in known for side in (-1, 1)]
            values += [v for v in ends if v > 0 or min(values) <= 0] + ([bound] if bound else [])
        points = [Point(c, s.value, margin(s), tip=f"λ = {coefficient(c)}: {with_margin(s)} (n = {s.n})")
                  for c, s in known]  # fmt: skip
        drawn = _over_coefficients(report, [Series(points, first.set)], axis_of(values), bound, first.chance)
        described = "; ".join(f"λ {coefficient(c)}: {with_margin(s.score)}" for c, s in pairs)
        title = f"{first.set}/{first.name}, {first.metric} against λ"
        found.append(Drawn(_file_name("curve", index, f"{first.set}-{first.name}"), title, described, first, drawn))
    return found


def predictions(report: RunReport) -> list[Drawn]:
    """Change of each set's loss against λ: measured (solid), and by the slope at 0 alone (dashed), in nats."""
    found = []
    for index, (entry, points) in enumerate(_foreseen(report)):
        if len(points) < 2:
            continue
        known = [p for p in points if math.isfinite(p.measured) and math.isfinite(p.predicted)]
        y = _from_zero([v for p in known for v in (p.measured, p.predicted)], "nats")
        said = [(coefficient(p.coefficient), f"measured {signed(p.measured)}, predicted {signed(p.predicted)}")
                for p in known]  # fmt: skip
        line = Series([Point(p.coefficient, p.predicted) for p in known], "muted", "predicted", dash=DASHES[1], size=0)
        marks = [Point(p.coefficient, p.measured, tip=f"λ = {c}: {words}")
                 for p, (c, words) in zip(known, said, strict=True)]  # fmt: skip
        drawn = _over_coefficients(report, [line, Series(marks, entry.set, "measured")], y)
        described = "; ".join(f"λ {c}: {words}" for c, words in said)
        title = f"{entry.set}/{entry.name}, change of loss against λ, measured and predicted"
        name = _file_name("foresight", index, f"{entry.set}-{entry.name}")
        found.append(Drawn(name, title, described, entry, drawn))
    return found


def _foreseen(report: RunReport) -> list[tuple[SetForesight, tuple[Change, ...]]]:
    entries = (*report.foresight.goals, *report.foresight.kept) if report.foresight else ()
    return [(entry, loss_changes(entry, report.sweep)) for entry in entries]


def relearning(report: RunReport) -> list[Drawn]:
    """Forget score against steps of relearning, one line for each model."""
    if (attacks := report.robustness) is None:
        return []
    scores, found = [s for s in attacks.scores if s.kind == "relearn"], []
    for index, name in enumerate(dict.fromkeys(s.attack for s in scores)):
        lines: dict[Who, list[tuple[int, float]]] = {}
        for who in NAMES:
            start = attacks.plain(who)
            steps = [(s.steps or 0, s.value) for s in scores if (s.attack, s.who) == (name, who)]
            if steps or start:
                lines[who] = [*([(0, start.value)] if start else []), *steps]
        y = _from_zero([v for line in lines.values() for _, v in line if math.isfinite(v)])
        last = max(steps for line in lines.values() for steps, _ in line)
        drawn = [Series([Point(n, v, tip=f"{NAMES[w]}, {n} steps: {number(v)}") for n, v in line], _ROLES[w], NAMES[w])
                 for w, line in lines.items()]  # fmt: skip
        described = "; ".join(
            f"{NAMES[w]}: {', '.join(f'{n}: {number(v)}' for n, v in line)}" for w, line in lines.items()
        )
        whole = chart(drawn, Axis(0, last or 1, "steps"), y)
        title = f"{attacks.metric} while relearning: {name}"
        found.append(Drawn(_file_name("relearning", index, name), title, described, name, whole))
    return found


def _from_zero(values: Sequence[float], title: str = "") -> Axis:
    """A linear axis that has 0 on it: only there is a straight line straight."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = 0.06 * (high - low) or 1.0
    return Axis(low - room * (low < 0), high + room, title)


def _over_coefficients(
    report: RunReport, series: Sequence[Series], y: Axis, bound: float | None = None, chance: float | None = None
) -> Chart:
    chosen = report.chosen.coefficient
    last = max((p.x for one in series for p in one.points), default=0.0)
    x = Axis(0.0, max(last, chosen) or 1.0, "λ")
    at = chosen if chosen > 0 or not y.title else None
    return chart(series, x, y, bound=bound, chance=chance, at=at, at_label=f"λ = {coefficient(chosen)}")


def _file_name(kind: str, index: int, what: str) -> str:
    return f"{kind}-{index + 1}-{re.sub('[^A-Za-z0-9]+', '-', what)[:60].strip('-')}".rstrip("-")


def _kept_names(points: Sequence[Spot]) -> list[str]:
    """The kept sets that get a line of their own: all, of several."""
    names = list(dict.fromkeys(name for p, *_ in points for name in p.shares))
    return names if len(names) > 1 else []


def _became(report: RunReport) -> str:
    """``: suppressed`` for a chart's label, where that is said of all that was to be forgotten."""
    words = {found.became for found in memories(report).values()}
    return f": {words.pop()}" if len(words) == 1 else ""


def _goal_axis(report: RunReport) -> tuple[str, str, str]:
    """What the frontier shows across: the axis, which way is better, and both in a sentence."""
    rows = goal_rows(report)
    if len(rows) != 1:
        words = "what is left to do, as a share of what there was at λ = 0, on average over the sets it was asked for"
        return f"mean left of {listing(row.name for row in rows)}" if rows else "goal", "← more done", words
    row = rows[0]
    done, what = ("forgotten", "forget set") if row.set == "forget" else ("learned", "set to learn")
    falls = row.higher_is_better == (row.set == "forget")
    knows = f"what it {'still knows' if row.set == 'forget' else 'knows'} of the {what}"
    return f"{row.set} score: {row.name} {row.metric}", f"← more {done}" if falls else f"more {done} →", knows


def _frontier_intro(report: RunReport, points: Sequence[Spot]) -> str:
    chosen = report.chosen
    intro = (
        f"Each large point is the model with λ times the task vector subtracted. Across: {_goal_axis(report)[2]}. Up: "
        "the share of the target model's score that it keeps, on the kept set that suffered most."
    )
    if any(is_perplexity(key[2]) for key in kept_keys(report)) and chosen.keep and chosen.perplexity is not None:
        intro += f" Perplexities are scaled so that a rise of {number(chosen.perplexity)} lies on the bound."
    if any(share < 0 or share > TOP for p, *_ in points for share in p.shares.values()):
        intro += " Points beyond the axis are drawn on its edge."
    if any(p.collapsed for p, *_ in points):
        intro += " A cross: there the model's predictions have collapsed, so what it forgot says nothing."
    return intro


# -- cards and tables


@dataclass(frozen=True, slots=True)
class Card:
    """One of the boxes under the headline; ``big`` is one figure, or two with an arrow between."""

    label: str
    big: tuple[str, ...]
    sub: str
    notes: Sequence[str]
    role: str = "plain"


def _cards(report: RunReport) -> list[Card]:
    chosen, stages, cards = report.chosen, _stages(report), _goal_cards(report)
    if row := worst_kept(report):
        limit = bound_figure(report, row.metric)
        figures = f"{number(row.before.value)} → {number(row.after.value)}, {row.split} items, n = {row.after.n}"
        notes = [f"{figures}{chance_of(row.chance, '; {}')}"]
        notes += [f"bound {limit}{', not met here' if row in missed(report) else ''}"] if limit else []
        where = f"of {row.set}/{row.name} {row.metric}"
        cards.append(Card("Kept, at worst", (kept_figure(report, row),), where, notes, "retain"))
    note = "no change" if chosen.coefficient == 0 else "chosen on validation items"
    searched = [said] if (said := how_searched(report)) else []
    if chosen.search != "given":
        cards.append(Card("Coefficient", (f"λ = {coefficient(chosen.coefficient)}",), note, [chosen.rule, *searched]))
    if stages:
        name, seconds, _ = max(stages, key=lambda stage: stage[2])
        notes = [f"longest stage: {name}, {duration(seconds)}"]
        cards.append(Card("Time", (duration(total_seconds(report)),), counted(len(stages), "stage"), notes))
    return cards


def _goal_cards(report: RunReport) -> list[Card]:
    """What the edit was for: before and after of one set, of several what is left of them on average."""
    rows, cards = goal_rows(report), []
    title = f"Asked to {listing(dict.fromkeys(row.set for row in rows))}"
    if len(rows) > 1:
        notes = [
            f"{r.name} {plain_metric(r.metric)} {number(r.before.value)} → {number(r.after.value)}"
            f"{chance_of(r.chance, ', {}')}, n = {r.after.n}"
            for r in rows
        ]
        left = ("100 %", percent(mean_left(report)))
        return [Card(title, left, f"left of {len(rows)} sets, on average", notes, "forget")]
    for row in rows:
        ranges = interval(row.before, row.metric), interval(row.after, row.metric)
        notes = [f"95 % CI {ranges[0]} → {ranges[1]}"] if all(ranges) else []
        label = f"{row.name}, {plain_metric(row.metric)}{chance_of(row.chance, ' ({})')}"
        both = (number(row.before.value), number(row.after.value))
        cards.append(Card(title, both, label, [*notes, f"{row.split} items, n = {row.after.n}"], "forget"))
    return cards


def _stages(report: RunReport) -> list[tuple[str, float, float]]:
    """Each stage with its seconds and its share of the longest, in percent."""
    times = {key: value for key, value in report.seconds.items() if key != "total"}
    longest = max((v for v in times.values() if math.isfinite(v)), default=0) or 1
    return [(k, v, 100 * max(v, 0) / longest if math.isfinite(v) else 0.0) for k, v in times.items()]


def attack_rows(found: Robustness, lens: bool) -> list[tuple[AttackScore, dict[Who, Score], float | None]]:
    """For each attack one score of it, the scores of all models under it, and the share of it that comes back."""
    table = []
    scores = [s for s in found.scores if (s.kind == "lens") == lens]
    for under in _grouped(scores, lambda s: s.under).values():
        back = [found.recovered(s) for s in under if s.who == "edited" and s.kind != "none"]
        table.append((under[0], {s.who: Score(s.value, s.stderr, s.n) for s in under}, back[0] if back else None))
    return table


def with_numbers(rows: Mapping[Who, Mapping[str, Any]]) -> list[str]:
    """The columns that have a number in any row."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return [c for c in columns if any(isinstance(row.get(c), int | float) for row in rows.values())]


def _metrics(report: RunReport) -> dict[Any, list[TaskScore]]:
    """The first score of every metric of the sweep, by set and name."""
    first: dict[Any, TaskScore] = {}
    for score in (score for point in report.sweep for score in point.scores):
        first.setdefault(score.key, score)
    return _grouped(first.values(), lambda s: (s.set, s.name))


def _grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by a key, in order of appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_layer(modules: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """``model.layers.3.mlp.fc1`` as layer 3 and kind mlp.fc1: layers in order, and all kinds."""
    cells: dict[str, dict[str, float]] = {}
    for name, value in modules.items():
        found = re.search(r"(?:^|\.)([0-9]+)\.(.+)$", name)
        layer, kind = (str(int(found[1])), found[2]) if found else ("", name)
        cells.setdefault(layer, {})[kind] = value
    order = sorted(cells, key=lambda layer: (not layer, int(layer or 0)))
    return {layer: cells[layer] for layer in order}, list(dict.fromkeys(k for row in cells.values() for k in row))


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """The keys of mappings in order of appearance, with the class of a column of numbers."""
    keys = dict.fromkeys(key for row in rows for key in row)
    numeric = {k for k in keys if all(_is_number(row[k]) for row in rows if k in row)}
    return {k: Markup(' class="num"' if k in numeric else "") for k in keys}


def losses(value: Any) -> Sequence[float]:
    """A list of numbers, to be drawn as a line; empty for anything else."""
    return value if isinstance(value, (list, tuple)) and all(map(_is_number, value)) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- examples


def same(one: str, two: str) -> bool:
    """Whether two answers are the same words."""
    one, two = (" ".join(value.split()).casefold().rstrip(".") for value in (one, two))
    return one == two


def fluent(examples: Sequence[Example]) -> str:
    """How answers read before and after, over the items of a set; empty where that was not recorded."""
    sides = [[e.before_fluency for e in examples], [e.after_fluency for e in examples]]
    known = [[one for one in side if one is not None] for side in sides]
    if not all(known):
        return ""
    repeated = [percent(math.fsum(one.repetition for one in side) / len(side)) for side in known]
    losses = [[one.loss for one in side if one.loss is not None] for side in known]
    read = [number(_exp(math.fsum(side) / len(side))) if side else MISSING for side in losses]
    return f"Repeated {repeated[0]} → {repeated[1]} · perplexity {read[0]} → {read[1]}"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def end_of(prompt: str) -> str:
    """The end of a long prompt, which is what the answer follows; empty for a short one."""
    end = prompt[-_PROMPT_SHOWN // 2 :]
    return end[end.find(" ") + 1 :].lstrip() if len(prompt) > _PROMPT_SHOWN else ""


def changes(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts with the words that differ marked: ``<del>`` in the first, ``<ins>`` in the second."""
    if before == after:
        return escape(before or MISSING), Markup('<span class="same">{}</span>').format(after or MISSING)
    old, new = (re.findall(r"\S+\s*|\s+", value) for value in (before, after))
    if max(len(old), len(new)) > _DIFF_WORDS:
        return _mark("del", old), _mark("ins", new)
    left, right = Markup(), Markup()
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        left += escape("".join(old[i:j])) if tag == "equal" else _mark("del", old[i:j])
        right += escape("".join(new[k:m])) if tag == "equal" else _mark("ins", new[k:m])
    return left or Markup(MISSING), right or Markup(MISSING)


def _mark(tag: str, words: Sequence[str]) -> Markup:
    """Words in one marked span, the space behind them outside it."""
    whole = "".join(words)
    core = whole.rstrip()
    return (Markup("<{0}>{1}</{0}>").format(Markup(tag), core) if core else Markup()) + whole[len(core) :]
