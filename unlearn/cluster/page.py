"""The merged report of a grid as one page that needs no network, no script and no other file."""

from __future__ import annotations

from pathlib import Path

from unlearn.cluster.charts import frontiers_chart, legend, settings_chart, shown
from unlearn.cluster.groups import Family, Split
from unlearn.cluster.numbers import Spread
from unlearn.cluster.page_tables import frontier_table, missing_table, scores_table, settings_table
from unlearn.cluster.words import (
    DESCRIPTION,
    MEAN_OF_ALL,
    NO_RUN,
    OVER_RUNS,
    PARETO_RULE,
    Merged,
    absent,
    choice_lines,
    family_label,
    group_label,
    headline,
    missing_lines,
    seeds_of,
    share_with_half,
    with_half,
)
from unlearn.report.drawing import POLICY, section, warning_list
from unlearn.report.markup import Child, Raw, el, join
from unlearn.report.words import CAVEAT
from unlearn.text import counted, duration, number, percent

_WIDE, _NARROW = (1000.0, 460.0), (360.0, 380.0)
_HALF = (500.0, 380.0)
_DRAWN = 12  # comparisons with pictures; a page of hundreds shows tables only
_WARNINGS = 40


def render_grid(merged: Merged) -> str:
    """The merged report as a self-contained HTML document (UTF-8 text)."""
    here = Path(__file__).parent
    style = "".join(p.read_text(encoding="utf-8") for p in (here.parent / "report" / "report.css", here / "grid.css"))
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{merged.grid.name}: grid report"),
        Raw(f"<style>\n{style}</style>"),
    )
    body = el("body", _header(merged), el("main", _main(merged)), _footer())
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _main(merged: Merged) -> list[Child]:
    if not merged.compared.runs:
        return [el("p", NO_RUN, class_="empty"), missing_table(merged)]
    several = len(merged.families) > 1
    parts: list[Child] = []
    for index, family in enumerate(merged.families):
        parts.append(_family(family, f"f{index}", several, drawn=index < _DRAWN))
    if len(merged.families) > _DRAWN:
        parts.append(el("p", f"Pictures are drawn of the first {_DRAWN} comparisons.", class_="intro"))
    return [*parts, scores_table(merged), missing_table(merged), _reading()]


def _header(merged: Merged) -> Raw:
    date = el("span", merged.written[:16].replace("T", " "), class_="run")
    warnings = [*missing_lines(merged), *merged.compared.warnings]
    if len(warnings) > _WARNINGS:
        warnings = [*warnings[:_WARNINGS], f"and {len(warnings) - _WARNINGS} further warnings, all in report.json"]
    axes = [f"{a.key}: {', '.join(a.values)}" for a in merged.grid.axes]
    lead = "; ".join(axes)
    return el(
        "header",
        el("p", "Grid report", el("span", merged.grid.name, class_="run"), date, class_="eyebrow"),
        el("h1", headline(merged), dir="auto"),
        el("p", lead if len(lead) <= 500 else f"{lead[:499]}…", class_="lead", dir="auto") if lead else None,
        warning_list(warnings),
        _cards(merged),
    )


def _cards(merged: Merged) -> Raw:
    planned, runs = len(merged.grid.jobs), merged.compared.runs
    notes = [f"{counted(len(merged.groups), 'setting')}; seeds: {seeds_of(merged)}"]
    if merged.compared.aside:
        notes.append(f"{len(merged.compared.aside)} set aside: they cannot be compared")
    cards = [_card("Jobs finished", f"{merged.finished} of {planned}", _bar(merged), notes, "plain")]
    family = merged.families[0] if len(merged.families) == 1 else None
    if runs and family is not None:
        chosen = family.of(family.choice) if family.choice is not None else None
        if len(family.groups) == 1 and family.compared:
            chosen = family.groups[0]
        if chosen is not None:
            pair, before = family.pair(chosen, "test"), family.before(chosen)
            big = join(number(before.mean), el("span", " → ", class_="arrow"), number(pair.goal.mean))
            yard = family.yardstick.label if family.yardstick else ""
            label = f"Asked to {family.yardstick.roles}" if family.yardstick else "Goal"
            notes = [group_label(family, chosen), _over(pair.goal, with_half(pair.goal))]
            cards.insert(0, _card(label, big, yard, notes, "forget"))
            notes = [_over(pair.kept, share_with_half(pair.kept))]
            cards.insert(1, _card("Kept, at worst", percent(pair.kept.mean), "of the score before", notes, "retain"))
        else:
            cards.append(_card("Choice", "none", "no setting met its bound in every run", [], "forget"))
    if runs:
        total = sum(r.seconds for r in runs)
        longest = max(runs, key=lambda r: r.seconds)
        note = f"longest: {duration(longest.seconds)}, {longest.job.name}"
        cards.append(_card("Time", duration(total), "of all finished jobs together", [note], "plain"))
    return el("div", cards, class_="cards")


def _over(spread: Spread, shown: str) -> str:
    """What a mean is over, and its interval where it has one."""
    if spread.mean is None:
        return absent(spread) or "not measured"
    runs = f"test items, mean of {counted(spread.n, 'run')}"
    return f"{shown}: {runs}" if spread.half is not None else f"{runs}, so no interval"


def _card(label: str, big: Child, sub: Child, notes: list[str], role: str) -> Raw:
    lines = [el("p", note, class_="note", dir="auto") for note in notes]
    parts = el("p", label, class_="label"), el("p", big, class_="big"), el("div", sub, class_="sub")
    return el("div", parts, lines, class_=f"card {role}")


def _bar(merged: Merged) -> Raw:
    """What became of the jobs, as a bar; the words are in its title and in the warnings."""
    planned = len(merged.grid.jobs) or 1
    parts = {"done": len(merged.compared.runs), "aside": len(merged.compared.aside)}
    for gone in merged.missing:
        kind = {"failed": "failed", "damaged": "failed", "said running": "running"}.get(gone.why, "none")
        parts[kind] = parts.get(kind, 0) + 1
    shares = [(kind, f"width:{100 * n / planned:.2f}%") for kind, n in parts.items() if n]
    said = ", ".join(f"{n} {kind}" for kind, n in parts.items() if n)
    return el("div", [el("span", class_=kind, style=width) for kind, width in shares], class_="jobs-bar", role="img",
              aria_label=said, title=said)  # fmt: skip


def _family(family: Family, uid: str, several: bool, drawn: bool) -> Raw:
    name = family_label(family)
    lines = [el("p", line, class_="intro", dir="auto") for line in choice_lines(family)]
    parts: list[Child] = [lines]
    if any(g.runs for g in family.groups):
        if drawn and family.yardstick is not None and family.yardstick.kept:
            parts += [_two_pictures(family, uid), _frontier_picture(family, uid)]
        elif drawn:
            words = "No kept set was measured, so there is nothing to set forgetting against."
            parts.append(el("p", words, class_="empty"))
        parts += [settings_table(family), frontier_table(family)]
    else:
        parts.append(el("p", "None of its jobs has a report that can be used.", class_="empty"))
    title = name if several else "Settings"
    return section(title, None, None, parts)


def _two_pictures(family: Family, uid: str) -> Raw:
    captions: dict[Split, str] = {
        "validation": "Validation means: here the choice is made",
        "test": "Test means: what came out, not to choose from",
    }
    figures = []
    for split, caption in captions.items():
        charts = [
            el("div", settings_chart(family, split, size, f"{uid}-{split}-{name}"), class_=name)
            for name, size in (("wide", _HALF), ("narrow", _NARROW))
        ]
        figures.append(el("figure", el("figcaption", el("b", caption)), charts, class_="panel"))
    return join(el("div", figures, class_="pair"), el("div", legend(family, frontier=False), class_="under"))


def _frontier_picture(family: Family, uid: str) -> Raw:
    charts = [
        el("div", frontiers_chart(family, size, f"{uid}-frontier-{name}"), class_=name)
        for name, size in (("wide", _WIDE), ("narrow", _NARROW))
    ]
    what = shown(family)
    words = "As λ grows: each point is the mean over a setting's runs at one λ, on validation items."
    if what.grey:
        words += f" {len(what.styled)} settings have a style of their own, {len(what.grey)} are grey."
    return el("figure", el("figcaption", el("b", "Frontiers"), " ", el("span", words)), charts,
              legend(family, frontier=True), class_="panel")  # fmt: skip


def _reading() -> Raw:
    lines = [OVER_RUNS, PARETO_RULE, DESCRIPTION, MEAN_OF_ALL]
    return section("How to read this", None, None, el("div", [el("p", line) for line in lines], class_="panel prose"))


def _footer() -> Raw:
    files = (
        "Every number of this page is in report.json beside it; jobs.csv has a row per job, frontier.csv a row per job "
        "and λ. Each job's own page is report.html in its folder under jobs."
    )
    return el("footer", el("p", el("b", "What this does not show. "), CAVEAT), el("p", files))
