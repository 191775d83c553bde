"""The tables of the merged report's page: settings, frontiers, all scores, and the jobs that are missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from unlearn.cluster.charts import forest, shown
from unlearn.cluster.groups import Family, Group, Pair, ScoreLine
from unlearn.cluster.numbers import Spread
from unlearn.cluster.runs import Run
from unlearn.cluster.words import Merged, absent, family_label, group_label, share_with_half, with_half
from unlearn.report.drawing import scroll, section
from unlearn.report.markup import Child, Raw, el, join
from unlearn.report.words import chance_of
from unlearn.store.files import some
from unlearn.text import MISSING, coefficient, counted, number

_OPEN = 60  # settings of a comparison that are shown at once, with their runs drawn
_SCORED = 40  # settings whose every score is on the page
_CURVES = 40  # settings whose frontier is on the page in figures
_GLYPHS = 12  # runs shown one by one
_REASONS = 60
_NAMES = 6  # jobs named for each reason


def settings_table(family: Family) -> Raw:
    """A line per setting: the ranked ones first, then the others that are compared, then the rest."""
    place = {index: i for i, index in enumerate(family.ranked)}
    order = sorted(
        family.groups, key=lambda g: (not g.runs, g.index not in family.compared, place.get(g.index, 1e9), g.index)
    )
    goal = [v for g in family.groups for v in _goals(g) if v is not None]
    kept = [v for g in family.groups for v in (*(r.kept for r in g.runs), 1.0) if v is not None]
    low, high = (min(goal), max(goal)) if goal else (0.0, 1.0)
    span = (low, high), (max(min(kept), 0.0), min(max(kept), 1.5))
    intro = (
        "Test items first, validation items beside them. Under a mean its runs (dots) and its interval (bar, cut at "
        "the cell's edge). Order: by validation means, those that met the bound in every run first. Bound met: on "
        "validation items, and where it was in fewer runs, on test items as well. "
        "▲: fewer runs than planned."
    )
    first = _settings_rows(family, order[:_OPEN], span)
    parts: list[Child] = [el("div", scroll("Settings", first), class_="panel")]
    if rest := order[_OPEN:]:
        more = scroll("Further settings", _settings_rows(family, rest, None))
        parts.append(el("details", el("summary", f"{counted(len(rest), 'further setting')}"), more, class_="panel"))
    return join(el("h3", "Means over runs"), el("p", intro, class_="intro"), parts)


def _settings_rows(
    family: Family, groups: Sequence[Group], span: tuple[tuple[float, float], tuple[float, float]] | None
) -> Raw:
    name = family.yardstick.label if family.yardstick else "goal"
    arrow = "↓" if family.yardstick is None or family.yardstick.sign > 0 else "↑"
    heads = ["Setting", "Runs", "λ", "Bound met", "Before", f"{name} {arrow} after", "Kept at worst ↑"]
    heads += ["Validation: after", "Validation: kept", "Stands out"]
    text = ("Setting", "Runs", "Stands out")
    head = el("tr", [el("th", h, scope="col", class_=None if h in text else "num") for h in heads])
    return el("table", el("thead", head), el("tbody", [_row(family, g, span) for g in groups]), class_="settings")


def _row(family: Family, group: Group, span: tuple[tuple[float, float], tuple[float, float]] | None) -> Raw:
    name = el("th", group_label(family, group), scope="row", dir="auto")
    runs = el("td", _runs(group), class_="runs")
    if not group.runs:
        why = Counter(m.why for m in group.missing) + Counter("set aside" for _ in group.aside)
        said = ", ".join(f"{n} {what}" for what, n in why.items())
        return el("tr", name, runs, el("td", f"no run that counts: {said}", colspan=8, class_="faint"))
    test, validation = family.pair(group, "test"), family.pair(group, "validation")
    here = group.of(family.seeds_of(group))
    met, again = sum(r.report.chosen.bound_met for r in here), sum(r.met_on_test for r in here)
    cells = [
        el("td", _lambdas(here), class_="num"),
        el(
            "td",
            f"{met} of {len(here)}",
            el("small", f" test: {again}") if again < met else None,
            class_="num" + (" low" if met < len(here) else ""),
        ),
        el("td", _spread(family.before(group)), class_="num"),
        el("td", _spread(test.goal), forest(test.goal, _goals(group, here), *span[0]) if span else None, class_="num"),
        el("td", _shares(test), forest(test.kept, [r.kept for r in here], *span[1]) if span else None, class_="num"),
        el("td", _spread(validation.goal), class_="num"),
        el("td", _shares(validation), class_="num"),
        el("td", _marks(family, group), class_="marks"),
    ]
    return el("tr", name, runs, cells, class_="here" if group.index == family.choice else None)


def _goals(group: Group, runs: Sequence[Run] | None = None) -> list[float | None]:
    return [None if r.after is None else group.sign * r.after for r in (group.runs if runs is None else runs)]


def _runs(group: Group) -> Raw:
    """``2 of 3`` and a mark per planned run, with its seed and state in words."""
    text = f"{len(group.runs)} of {len(group.planned)}"
    warn = None if group.whole else el("b", " ▲", title="fewer runs than planned")
    if not 1 < len(group.planned) <= _GLYPHS:
        return join(text, warn)
    done = {r.job.name for r in group.runs}
    aside = {r.job.name: why for r, why in group.aside}
    gone = {m.job.name: m for m in group.missing}
    marks = []
    for job in group.planned:
        seed = job.settings.get("seed", "")
        if job.name in done:
            sign, said = "●", "finished"
        elif job.name in aside:
            sign, said = "◌", f"set aside: {aside[job.name]}"
        elif job.name in gone:
            sign, said = ("○" if gone[job.name].why == "never began" else "×"), gone[job.name].why
        else:
            sign, said = "○", "never began"
        marks.append(el("span", sign, title=f"seed {seed}: {said}"))
    return join(text, warn, el("small", marks, class_="dots"))


def _lambdas(runs: Sequence[Run]) -> str:
    """The chosen coefficients; ``none`` for runs where none passed the rule."""
    passed = Counter(r.report.chosen.coefficient for r in runs if r.report.chosen.bound_met)
    counts = [(coefficient(c), n) for c, n in sorted(passed.items())]
    if len(counts) > 4:
        counts = [(f"{coefficient(min(passed))} to {coefficient(max(passed))}", passed.total())]
    if without := len(runs) - passed.total():
        counts.append(("none", without))
    return ", ".join(f"{c} ({n}×)" if n > 1 and len(counts) > 1 else c for c, n in counts)


def _spread(spread: Spread) -> Raw:
    value, _, half = with_half(spread).partition(" ± ")
    gap = absent(spread)
    return join(value, el("small", f" ± {half}") if half else None, el("small", f" {gap}") if gap else None)


def _shares(pair: Pair) -> Raw:
    gap = absent(pair.kept)
    return join(share_with_half(pair.kept), el("small", f" {gap}") if gap else None)


def _marks(family: Family, group: Group) -> Raw:
    marks: list[Child] = []
    if group.index == family.choice:
        marks.append(el("b", "choice"))
    ways = [name for name, best in (("validation", family.best_validation), ("test", family.best_test))
            if group.index in best]  # fmt: skip
    if ways and len(family.compared) > 1:
        marks.append(f"Pareto: {' and '.join(ways)}{' only' if len(ways) == 1 else ''}")
    if group.index not in family.compared:
        marks.append("other seeds: not compared")
    marks += group.notes
    return join([el("span", mark) for mark in marks])


def frontier_table(family: Family) -> Raw | None:
    """Means at every λ for the settings that stand out, and for all where they are few."""
    drawn = [g for g in family.groups if g.runs]
    groups = drawn if len(drawn) <= _CURVES else list(shown(family).styled)
    steps = {g.index: {s.coefficient: s for s in g.frontier} for g in groups}
    every = sorted({c for found in steps.values() for c in found})
    if not every:
        return None
    heads = [el("th", f"λ = {coefficient(c)}", scope="col", class_="num") for c in every]
    rows = []
    for group in groups:
        cells = []
        for c in every:
            step = steps[group.index].get(c)
            if step is None:
                cells.append(el("td", MISSING, class_="num"))
                continue
            broken = el("b", " ▼", title="bound broken in a run") if step.within < len(group.runs) else None
            gone = el("b", " ×", title=f"collapsed in {step.collapsed}") if step.collapsed else None
            kept = el("small", share_with_half(step.two.kept), broken, gone)
            cells.append(el("td", _spread(step.two.goal), kept, class_="num"))
        rows.append(el("tr", el("th", group_label(family, group), scope="row", dir="auto"), cells))
    top = el("thead", el("tr", el("th", "Setting", scope="col"), heads))
    table = el("table", top, el("tbody", rows), class_="sweep")
    left = "" if len(groups) == len(drawn) else f" of {len(drawn)}; all of them are in report.json"
    words = f"Frontiers in figures: {counted(len(groups), 'setting')}{left}"
    key = (
        "Above the mean goal figure on validation items, below it the mean of what is kept at worst. "
        "▼: bound broken in a run, ×: predictions collapsed in a run."
    )
    return el("details", el("summary", words), el("p", key, class_="intro"), scroll("Frontiers", table), class_="panel")


def scores_table(merged: Merged) -> Raw | None:
    """Every score before and after, setting by setting, with both kinds of uncertainty named."""
    groups = [(f, g) for f in merged.families for g in f.groups if g.runs]
    place = {g.index: (f.ranked.index(g.index) if g.index in f.ranked else 10**9, g.index) for f, g in groups}
    groups.sort(key=lambda pair: place[pair[1].index])
    heads = ["Set", "Data", "Metric", "Before", "After", "Runs", "Items", "items, s.e."]
    top = el("tr", [el("th", h, scope="col", class_="num" if i > 2 else None) for i, h in enumerate(heads)])
    parts = []
    several = len(merged.families) > 1
    for family, group in groups[:_SCORED]:
        name = group_label(family, group)
        title = f"{family_label(family)}, {name}" if several and name != family.name else name
        rows = [_score_row(line) for line in group.scores()]
        table = el("table", el("thead", top), el("tbody", rows), class_="generic")
        parts.append(el("details", el("summary", title, dir="auto"), scroll(title, table), class_="panel"))
    if not parts:
        return None
    intro = (
        "Means over runs ± half of their 95 % interval. Items: how many a run scores; items, s.e.: the standard error "
        "over items inside one run (before / after), averaged over runs."
    )
    if len(groups) > _SCORED:
        intro += f" The first {_SCORED} of {len(groups)} settings; all are in report.json and jobs.csv."
    return section("Every score", "test", intro, parts)


def _score_row(line: ScoreLine) -> Raw:
    role, name, metric = line.key
    arrow = "↑" if line.higher_is_better else "↓"
    errors = f"{number(line.stderr_before)} / {number(line.stderr_after)}"
    split = el("small", f" {line.split}") if line.split != "test" else None
    cells: list[tuple[Child, str | None]] = [
        (join(el("i", class_=f"pip {role}"), role), "set"),
        (name, None),
        (join(el("code", metric), f" {arrow}", el("small", chance_of(line.chance, " {}")), split), None),
        (_spread(line.before), "num"),
        (_spread(line.after), "num"),
        (str(line.after.n), "num"),
        (str(line.n) if line.n is not None else "differs", "num"),
        (errors, "num"),
    ]
    return el("tr", [el("td", child, class_=kind) for child, kind in cells])


def missing_table(merged: Merged) -> Raw | None:
    """Jobs without a usable report and jobs set aside, those with the same reason in one line."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for gone in merged.missing:
        found[gone.why, gone.detail if gone.why in ("failed", "damaged", "unfinished") else ""].append(gone.job.name)
    for run, why in merged.compared.aside:
        found["set aside", why].append(run.job.name)
    if not found:
        return None
    order = sorted(found.items(), key=lambda pair: -len(pair[1]))
    rows = [
        el(
            "tr",
            el("td", why),
            el("td", str(len(names)), class_="num"),
            el("td", detail or MISSING, class_="said", dir="auto"),
            el("td", some(names, _NAMES), class_="said", dir="auto"),
        )
        for (why, detail), names in order[:_REASONS]
    ]
    names_of = ("Why", "Jobs", "It said", "Which")
    heads = [el("th", h, scope="col", class_="num" if h == "Jobs" else None) for h in names_of]
    table = el("table", el("thead", el("tr", heads)), el("tbody", rows), class_="generic missing")
    intro = (
        "“said running” is a job's last word, and one that was killed says so for ever: "
        "python -m unlearn.cluster.command --status tells which are."
    )
    if len(order) > _REASONS:
        intro += f" The {_REASONS} most frequent of {len(order)} reasons; all jobs are in jobs.csv."
    return section("Jobs that are missing", None, intro, el("div", scroll("Missing jobs", table), class_="panel"))
