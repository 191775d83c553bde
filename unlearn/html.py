"""``report.html``: the whole report as one file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unlearn.charts import TOP, frontier_chart, frontier_legend, lambda_chart
from unlearn.evidence_page import evidence_sections
from unlearn.foresight_page import foresight_section
from unlearn.html_parts import data_section, examples_section, footer, making_section, scroll, section, warning_list
from unlearn.markup import Child, Raw, el, join
from unlearn.metrics import Key, is_perplexity
from unlearn.report import RunReport, Score, ScoreRow, TaskScore
from unlearn.report_figures import (
    bound_figure,
    final_shares,
    frontier,
    goal_rows,
    interval,
    kept_figure,
    kept_keys,
    main_keys,
    margin_of_change,
    mean_left,
    total_seconds,
    verdict,
    with_margin,
)
from unlearn.report_text import chance_of, headline, how_searched, plain_metric, remarks
from unlearn.search import bound_of
from unlearn.wording import MISSING, coefficient, counted, duration, listing, number, percent, signed

# Nothing may be fetched or run, whatever text a model or a data file put on the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_WIDE, _NARROW = (1000.0, 460.0), (360.0, 380.0)


def render_html(report: RunReport) -> str:
    """The report as a self-contained HTML document (UTF-8 text)."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{report.name}: unlearning report"),
        Raw(f"<style>\n{style}</style>"),
    )
    body = el(
        "body",
        _header(report),
        el(
            "main",
            _frontier_section(report),
            _curves_section(report),
            foresight_section(report),
            _scores_section(report),
            evidence_sections(report),
            examples_section(report),
            _sweep_section(report),
            data_section(report),
            making_section(report),
        ),
        footer(),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _header(report: RunReport) -> Raw:
    return el(
        "header",
        el("p", "Unlearning report", el("span", report.name, class_="run"), _date(report), class_="eyebrow"),
        el("h1", headline(report), dir="auto"),
        el("p", report.description, class_="lead", dir="auto") if report.description else None,
        warning_list([*remarks(report), *report.warnings]),
        _cards(report),
    )


def _date(report: RunReport) -> Raw | None:
    date = report.provenance.get("date")
    return el("span", date[:16].replace("T", " "), class_="run") if isinstance(date, str) and date else None


def _cards(report: RunReport) -> Raw:
    chosen, shares = report.chosen, final_shares(report)
    cards = [card] if (card := _goal_card(report)) else []
    if shares:
        worst, _ = shares[0]
        limit = bound_figure(report, worst.metric)
        bound = [f"bound {limit}{', not met here' if verdict(report, worst) is False else ''}"] if limit else []
        where = f"of {worst.set}/{worst.name} {worst.metric}"
        figures = (
            f"{number(worst.before.value)} → {number(worst.after.value)}, {worst.split} items, n = {worst.after.n}"
        )
        notes = [f"{figures}{chance_of(worst.chance, '; {}')}", *bound]
        cards.append(_card("Kept, at worst", kept_figure(report, worst), where, notes, "retain"))
    note = "no change" if chosen.coefficient == 0 else "chosen on validation items"
    notes = [chosen.rule, *([words] if (words := how_searched(report)) else [])]
    cards.append(_card("Coefficient", f"λ = {coefficient(chosen.coefficient)}", note, notes, "plain"))
    stages = {k: v for k, v in report.seconds.items() if k != "total"}
    longest = max(stages, key=lambda k: stages[k], default=None)
    notes = [f"longest stage: {longest}, {duration(stages[longest])}"] if longest else []
    if stages:
        cards.append(_card("Time", duration(total_seconds(report)), counted(len(stages), "stage"), notes, "plain"))
    return el("div", cards, class_="cards")


def _goal_card(report: RunReport) -> Raw | None:
    """What the edit was for: before and after of one set, of several what is left of them on average."""
    rows = goal_rows(report)
    if not rows:
        return None
    title = f"Asked to {listing(dict.fromkeys(row.set for row in rows))}"
    if len(rows) > 1:
        each = [(r, f"{number(r.before.value)} → {number(r.after.value)}{chance_of(r.chance, ', {}')}") for r in rows]
        notes = [f"{r.name} {plain_metric(r.metric)} {figures}, n = {r.after.n}" for r, figures in each]
        left = _arrow_between("100 %", percent(mean_left(report)))
        return _card(title, left, f"left of {len(rows)} sets, on average", notes, "forget")
    row = rows[0]
    notes = [f"{row.split} items, n = {row.after.n}"]
    ranges = interval(row.before, row.metric), interval(row.after, row.metric)
    if all(ranges):
        notes.insert(0, f"95 % CI {ranges[0]} → {ranges[1]}")
    label = f"{row.name}, {plain_metric(row.metric)}{chance_of(row.chance, ' ({})')}"
    return _card(title, _arrow_between(number(row.before.value), number(row.after.value)), label, notes, "forget")


def _arrow_between(before: str, after: str) -> Raw:
    return join(before, el("span", " → ", class_="arrow"), after)


def _card(label: str, big: Child, sub: str, notes: Sequence[str], role: str) -> Raw:
    lines = [el("p", note.replace("n = ", "n\u00a0=\u00a0"), class_="note") for note in notes]
    return el("div", el("p", label, class_="label"), el("p", big, class_="big"), el("p", sub, class_="sub"), lines,
              class_=f"card {role}")  # fmt: skip


def _frontier_section(report: RunReport) -> Raw:
    chosen, points = report.chosen, frontier(report)
    drawable = [p for p in points if p.forget is not None and p.worst is not None]
    if not drawable:
        words = "No kept set was scored in the sweep, so there is nothing to set forgetting against."
        return section("Frontier", "validation", None, el("p", words, class_="empty"))
    metric, hint, across = _goal_axis(report)
    intro = (
        f"Each large point is the model with λ times the task vector subtracted. Across: {across}. Up: the share of "
        "the target model's score that it keeps, on the kept set that suffered most."
    )
    if any(is_perplexity(key[2]) for key in kept_keys(report)) and chosen.keep and chosen.perplexity is not None:
        intro += f" Perplexities are scaled so that a rise of {number(chosen.perplexity)} lies on the bound."
    if any(share < 0 or share > TOP for p in drawable for share in p.shares.values()):
        intro += " Points beyond the axis are drawn on its edge."
    if any(p.collapsed for p in drawable):
        intro += " A cross: there the model's predictions have collapsed, so what it forgot says nothing."
    charts = [
        el(
            "div",
            frontier_chart(
                drawable,
                chosen=chosen.coefficient,
                keep=chosen.keep,
                metric=metric,
                hint=hint,
                size=size,
                uid=f"frontier-{name}",
            ),
            class_=name,
        )
        for name, size in (("wide", _WIDE), ("narrow", _NARROW))
    ]
    legend = frontier_legend(drawable, chosen.coefficient, chosen.keep)
    return section("Frontier", "validation", intro, el("figure", charts, legend, class_="panel"))


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


def _curves_section(report: RunReport) -> Raw | None:
    charts = []
    for index, key in enumerate(main_keys(report)):
        found = [(p.coefficient, s) for p in report.sweep for s in p.scores if s.key == key]
        found.sort(key=lambda pair: pair[0])
        first = found[0][1]
        title = f"{first.set}/{first.name}, {first.metric} against λ"
        chart = lambda_chart(
            title,
            [(c, s.score) for c, s in found],
            chosen=report.chosen.coefficient,
            bound=_limit(report, found),
            chance=first.chance,
            role=first.set,
            uid=f"curve-{index}",
        )
        arrow = _arrow(first.higher_is_better)
        what = el("span", f"{first.set} · {first.metric} ", arrow, chance_of(first.chance, ", {}"))
        caption = el("figcaption", el("i", class_=f"pip {first.set}"), el("b", first.name), " ", what, dir="auto")
        charts.append(el("figure", caption, chart, class_="panel"))
    if not charts:
        return None
    intro = "One metric per set. Bars are 95 % confidence intervals; the dashed line is the bound of a kept metric."
    if any(s.chance is not None for p in report.sweep for s in p.scores):
        intro += " The dotted line is chance: what guessing scores."
    return section("Scores as λ grows", "validation", intro, el("div", charts, class_="multiples"))


def _limit(report: RunReport, found: Sequence[tuple[float, TaskScore]]) -> float | None:
    """The bound of a kept metric, from its score at λ = 0."""
    start, score = found[0]
    if start != 0 or score.key not in kept_keys(report):
        return None
    chosen = report.chosen
    return bound_of(score.metric, score.higher_is_better, score.score.value, chosen.keep, chosen.perplexity)


def _scores_section(report: RunReport) -> Raw:
    if not report.scores:
        return section("Before and after", None, None, el("p", "Nothing was scored.", class_="empty"))
    splits = {row.split for row in report.scores}
    heads = ["Set", "Data", "Metric", "Before", "After", "Change", "Kept", "n", *(["Items"] if len(splits) > 1 else [])]
    rows = [el("tr", _score_cells(report, row, heads), class_=row.set) for row in report.scores]
    aligned = [
        el("th", h, scope="col", class_="num" if h in ("Before", "After", "Change", "Kept", "n") else None)
        for h in heads
    ]
    table = el("table", el("thead", el("tr", aligned)), el("tbody", rows), class_="scores reflow")
    intro = (
        "± is half of a 95 % confidence interval. ↑: higher is better, ↓: lower is better. A change in grey is within "
        "its own 95 % uncertainty. Kept: share of the score before, or rise of a perplexity, where the rule bounds it."
    )
    if any(row.chance is not None for row in report.scores):
        intro += " Chance: what guessing scores."
    return section(
        "Before and after", splits.pop() if len(splits) == 1 else None, intro, el("div", table, class_="panel")
    )


def _score_cells(report: RunReport, row: ScoreRow, heads: Sequence[str]) -> list[Raw]:
    within, change = verdict(report, row), row.after.value - row.before.value
    noise = margin_of_change(row)
    faint = " faint" if change == 0 or (noise is not None and abs(change) <= noise) else ""
    low = within is False
    kept = join(
        kept_figure(report, row) if row.key in kept_keys(report) else "",
        el("b", " ▼", title="out of its bound") if low else None,
    )
    guess = el("small", chance_of(row.chance, " {}"))
    n = str(row.after.n) if row.before.n == row.after.n else f"{row.before.n} / {row.after.n}"
    cells: list[tuple[Child, str]] = [
        (join(el("i", class_=f"pip {row.set}"), row.set), "set"),
        (row.name, "name"),
        (join(el("code", row.metric), " ", _arrow(row.higher_is_better), guess), "metric"),
        (_score(row.before), "num"),
        (_score(row.after), "num"),
        (signed(change), f"num change{faint}"),
        (kept, "num kept low" if low else "num kept"),
        (n, "num count-n"),
        (row.split, "split"),
    ]
    return [
        el("td", el("span", child), class_=kind, data_label=head)
        for (child, kind), head in zip(cells, heads, strict=False)
    ]


def _score(score: Score) -> Raw:
    value, _, half = with_margin(score).partition(" ± ")
    return join(value, el("small", f" ± {half}") if half else None)


def _sweep_section(report: RunReport) -> Raw | None:
    if not report.sweep:
        return None
    keys: dict[Key, TaskScore] = {}
    for point in report.sweep:
        for score in point.scores:
            keys.setdefault(score.key, score)
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault(key[:2], []).append(key)
    order = [key for group in groups.values() for key in group]
    top = [
        el("th", el("i", class_=f"pip {s}"), f"{s}/{n}", colspan=len(g), scope="colgroup")
        for (s, n), g in groups.items()
    ]
    heads = [
        el("th", el("code", k[2]), " ", _arrow(s.higher_is_better), el("small", chance_of(s.chance)), scope="col",
           class_="num")
        for k in order if (s := keys[k])
    ]  # fmt: skip
    rows = []
    for point in sorted(report.sweep, key=lambda p: p.coefficient):
        scores = {s.key: s for s in point.scores}
        cells = [el("td", _score(scores[k].score) if k in scores else MISSING, class_="num") for k in order]
        here = point.coefficient == report.chosen.coefficient
        verdict = "within" if point.within_bound else "; ".join(point.broken) or "broken"
        if point.collapsed:
            verdict = f"× predictions collapsed: {point.collapsed}; {verdict}"
        label = join(coefficient(point.coefficient), el("small", " chosen") if here else None)
        rows.append(el("tr", el("th", label, scope="row"), el("td", verdict, class_="verdict"), cells,
                       class_="here" if here else None))  # fmt: skip
    first = el("tr", el("th", "λ", rowspan=2, scope="col"), el("th", "Bound", rowspan=2, scope="col"), top)
    table = el("table", el("thead", first, el("tr", heads)), el("tbody", rows), class_="sweep")
    more = el("details", el("summary", f"{counted(len(report.sweep), 'coefficient')}, {counted(len(order), 'metric')}"),
              scroll("Scores at every coefficient", table), class_="panel")  # fmt: skip
    return section("The whole sweep", "validation", how_searched(report), more)


def _arrow(higher_is_better: bool) -> Raw:
    return el("span", "↑" if higher_is_better else "↓", title=f"{'higher' if higher_is_better else 'lower'} is better")
