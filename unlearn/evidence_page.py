"""The parts of the HTML report that set the result beside others, and that attack it."""

from __future__ import annotations

from collections.abc import Sequence

from unlearn.attacks.values import PLAIN, AttackScore, Robustness
from unlearn.axes import Scale
from unlearn.drawing import axis_title, grid, path, svg
from unlearn.evidence_text import NAMES
from unlearn.html_parts import scroll, section
from unlearn.markup import Child, Raw, el, join
from unlearn.report import Benchmark, Membership, RunReport, Score, Who
from unlearn.report_figures import with_margin
from unlearn.report_text import chance_of
from unlearn.wording import MISSING, counted, number, percent, tick_label

_ROLE: dict[Who, str] = {"target": "forget", "edited": "retain", "reference": "utility"}


def evidence_sections(report: RunReport) -> Raw | None:
    """Retain reference, benchmark, membership inference and attacks; None where the recipe asked for none of them."""
    parts = [
        _reference_section(report),
        benchmark_section(report.benchmark),
        membership_section(report.membership),
        robustness_section(report.robustness),
    ]
    return join(parts) if any(parts) else None


def _reference_section(report: RunReport) -> Raw | None:
    rows = [row for row in report.scores if row.reference is not None]
    if not rows:
        return None
    body = []
    for row in rows:
        assert row.reference is not None
        name = join(el("i", class_=f"pip {row.set}"), f"{row.set}/{row.name}")
        cells = [_score(s) for s in (row.before, row.after, row.reference)]
        body.append(_line(name, join(el("code", row.metric), el("small", chance_of(row.chance, " {}"))), cells))
    intro = (
        "The retain reference learned what was to be kept and never saw the forget set. A perfect edit would score "
        "what it scores: lower on the forget set is not better, it is conspicuous."
    )
    table = _table(("Set", "Metric", "Before", "After", "Never knew"), body, 2)
    return section("Beside a model that never knew", "test", intro, _panel("Scores beside the reference", table))


def benchmark_section(found: Benchmark | None) -> Raw | None:
    """The benchmark's own columns, one column of the table for each model."""
    if found is None:
        return None
    columns = list(dict.fromkeys(column for row in found.rows.values() for column in row))
    shown = [c for c in columns if any(isinstance(row.get(c), int | float) for row in found.rows.values())]
    who: list[Who] = [w for w in NAMES if w in found.rows]
    body = [_line(None, column, [_figure(found.rows[w].get(column)) for w in who]) for column in shown]
    some = f", the first {found.items} items of every set" if found.items else ""
    figure = {"tofu": "forget quality", "muse": "PrivLeak"}[found.name]
    alone = f" The reference is what the others are compared with: it has no {figure} of its own."
    intro = (
        f"{found.name.upper()} {found.set}{some}, computed from the sample files in this folder with the benchmark's "
        f"own formulas and column names.{alone if 'reference' in found.rows else ''}"
    )
    note = el("p", found.missing, class_="intro") if found.missing else None
    table = _table(("Figure", *(NAMES[w] for w in who)), body, 1)
    return section(f"{found.name.upper()}", None, intro, _panel("Benchmark", table), note)


def membership_section(found: Sequence[Membership]) -> Raw | None:
    """Area under the ROC curve per attack and model."""
    if not found:
        return None
    attacks = list(dict.fromkeys(m.attack for m in found))
    who: list[Who] = [w for w in NAMES if any(m.who == w for m in found)]
    at = {(m.attack, m.who): m for m in found}
    body = [_line(None, attack, [_auc(at.get((attack, w))) for w in who]) for attack in attacks]
    first = found[0]
    intro = (
        f"Can one tell from the model alone which texts it was trained on? {first.members} forget items against "
        f"{first.others} held out: the area under the ROC curve with its 95 % bootstrap interval. Near .5 nobody can; "
        "far below .5 the forget set stands out as the text that was removed."
    )
    table = _table(("Attack", *(NAMES[w] for w in who)), body, 1)
    return section("Membership inference", None, intro, _panel("Membership inference", table))


def robustness_section(found: Robustness | None) -> Raw | None:
    """What comes back under attack: a sentence, a table, and a curve of relearning."""
    if found is None:
        return None
    who: list[Who] = [w for w in NAMES if any(s.who == w for s in found.scores)]
    intro = (
        f"Attacks on the forget set {found.set}, scored by {found.metric}. Came back: the share of what the edit took "
        "away that the attack restores; 100 % is the model before. Where it is above what the attack does to a model "
        "that never knew, it is knowledge that was hidden and not removed."
    )
    if found.chance is not None:
        intro += f" Guessing would score {number(found.chance)}."
    layers = [s for s in found.scores if s.kind == "lens"]
    folded = None
    if layers:
        count = counted(len({s.layer for s in layers}), "layer")
        lens = scroll("The logit lens", _attack_table(found, layers, who))
        folded = el(
            "details", el("summary", f"The logit lens: {count}, the last one is the answer"), lens, class_="panel"
        )
    return section(
        "What comes back",
        "test",
        intro,
        el("p", found.sentence(), class_="intro"),
        _curves(found, who),
        _panel("Attacks on the result", _attack_table(found, [s for s in found.scores if s.kind != "lens"], who)),
        folded,
    )


def _attack_table(found: Robustness, scores: Sequence[AttackScore], who: Sequence[Who]) -> Raw:
    """A row for each attack, a column for each model, and what comes back."""
    at = {(_key(s), s.who): s for s in scores}
    body = []
    for attack in dict.fromkeys(_key(s) for s in scores):
        under = {w: at[attack, w] for w in who if (attack, w) in at}
        cells: list[Child] = [_attacked(under.get(w)) for w in who]
        edited = under.get("edited")
        back = found.recovered(edited) if edited is not None and edited.kind != "none" else None
        came = MISSING if back is None else percent(back) if back > 0 else "nothing"
        body.append(_line(None, _label(next(iter(under.values())), found.metric), [*cells, came]))
    return _table(("Attack", *(NAMES[w] for w in who), "Came back"), body, 1)


def _curves(found: Robustness, who: Sequence[Who]) -> Raw | None:
    figures = []
    names = list(dict.fromkeys(s.attack for s in found.scores if s.kind == "relearn"))
    for index, name in enumerate(names):
        lines = {}
        for w in who:
            start = found.plain(w)
            begin = [(0, start)] if start is not None else []
            points = [(s.steps or 0, s) for s in found.scores if (s.attack, s.who, s.kind) == (name, w, "relearn")]
            lines[w] = [(steps, s.value) for steps, s in (*begin, *points)]
        chart = relearning_chart(f"{found.metric} while relearning: {name}", lines, uid=f"relearn-{index}")
        keys = [el("span", el("i", class_=f"pip {_ROLE[w]}"), NAMES[w], " ") for w in who]
        figures.append(el("figure", el("figcaption", el("b", name), " ", keys), chart, class_="panel"))
    return el("div", figures, class_="multiples") if figures else None


def relearning_chart(
    title: str,
    lines: dict[Who, list[tuple[int, float]]],
    *,
    uid: str,
    size: tuple[float, float] = (320, 190),
) -> Raw:
    """Forget score against steps of relearning, one line for each model."""
    width, height = size
    frame = (48.0, 18.0, width - 12, height - 34)
    points = [p for line in lines.values() for p in line]
    values = [v for _, v in points] or [0.0]
    lo, hi = min(*values, 0.0), max(*values, 0.0) or 1.0
    y = Scale("linear", lo, hi + 0.06 * (hi - lo), frame[3], frame[1])
    x = Scale("linear", 0.0, float(max((s for s, _ in points), default=1)) or 1.0, frame[0] + 8, frame[2] - 8)
    drawn = grid(x, y, frame, tick_label, across=False)
    drawn.append(axis_title("steps", (frame[0] + frame[2]) / 2, height - 3))
    for w, line in lines.items():
        drawn.append(path([(x(float(s)), y(v)) for s, v in line], f"line {_ROLE[w]}"))
        for steps, value in line:
            dot = el("circle", class_=f"dot {_ROLE[w]}", cx=x(float(steps)), cy=y(value), r=3.0)
            drawn.append(el("g", el("title", f"{NAMES[w]}, {steps} steps: {number(value)}"), dot))
    said = "; ".join(f"{NAMES[w]}: {', '.join(f'{s}: {number(v)}' for s, v in line)}" for w, line in lines.items())
    return svg(title, said or "No points.", size, uid, drawn)


def _key(score: AttackScore) -> tuple[str | int | None, ...]:
    return score.kind, score.attack, score.metric, score.steps, score.layer


def _label(score: AttackScore, metric: str) -> Child:
    name = "as it is" if score.attack == PLAIN else score.attack
    if score.steps is not None:
        name += f", {counted(score.steps, 'step')}"
    elif score.layer is not None:
        name += f", layer {score.layer}"
    return name if score.metric == metric else join(name, " (", el("code", score.metric), ")")


def _attacked(score: AttackScore | None) -> Child:
    return MISSING if score is None else _score(Score(score.value, score.stderr, score.n))


def _auc(found: Membership | None) -> Child:
    if found is None:
        return MISSING
    return join(number(found.auc), el("small", f" {number(found.low)} to {number(found.high)}"))


def _figure(value: float | str | None) -> Child:
    return number(value) if isinstance(value, int | float) else (value or MISSING)


def _score(score: Score) -> Raw:
    value, _, half = with_margin(score).partition(" ± ")
    return join(value, el("small", f" ± {half}") if half else None)


def _table(heads: Sequence[str], body: Sequence[Raw], words: int) -> Raw:
    top = [el("th", h, scope="col", class_=None if i < words else "num") for i, h in enumerate(heads)]
    return el("table", el("thead", el("tr", top)), el("tbody", body), class_="generic")


def _line(name: Child, label: Child, cells: Sequence[Child]) -> Raw:
    head = [el("th", name, scope="row"), el("td", label)] if name is not None else [el("th", label, scope="row")]
    return el("tr", head, [el("td", c, class_="num") for c in cells])


def _panel(label: str, table: Raw) -> Raw:
    return el("div", scroll(label, table), class_="panel")
