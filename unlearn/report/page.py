"""``report.html``: the whole report as one file that needs no network, no script and no other file."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.recipe.metrics import Key, is_perplexity
from unlearn.report.drawing import (
    TOP,
    Scale,
    axis_title,
    frontier_chart,
    frontier_legend,
    grid,
    lambda_chart,
    path,
    sparkline,
    svg,
)
from unlearn.report.figures import (
    Z95,
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
from unlearn.report.markup import Child, Raw, el, join
from unlearn.report.words import (
    CAVEAT,
    FORESIGHT_CAVEAT,
    NAMES,
    Comparison,
    Point,
    SetComparison,
    chance_of,
    headline,
    how_good,
    how_searched,
    of_report,
    plain_metric,
    reading,
    remarks,
)
from unlearn.results import (
    PLAIN,
    AttackScore,
    Benchmark,
    Example,
    Membership,
    Robustness,
    Role,
    RunReport,
    Score,
    ScoreRow,
    SetForesight,
    TaskScore,
    Who,
)
from unlearn.score.search import bound_of
from unlearn.text import (
    MISSING,
    clean,
    coefficient,
    counted,
    duration,
    file_size,
    listing,
    number,
    percent,
    signed,
    tick_label,
)

_DIFF_WORDS = 1500  # beyond this a word-by-word comparison is slow and nobody reads it
_HASH = re.compile(r"(sha256:)?[0-9a-f]{24,}")
_LIST_SHOWN = 12
_PROMPT_SHOWN = 480  # characters


def render(template: str, **values: Any) -> str:
    """A page from a template of ``templates/``, whose texts are escaped and may be anybody's; styles are in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    place = Environment(loader=PackageLoader("unlearn.report"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    words = (coefficient, counted, duration, listing, number, percent, signed, with_margin, chance_of)
    place.globals.update({word.__name__: word for word in words}, caveat=CAVEAT, missing=MISSING)
    return clean(place.get_template(template).render(values))


def section(title: str, split: str | None, intro: str | None, *children: Child) -> Raw:
    """One part of the page. ``split`` is shown beside the title: which items its numbers are from."""
    chip = el("span", f"{split} items", class_="chip") if split else None
    return el("section", el("h2", title, chip), el("p", intro, class_="intro") if intro else None, children)


def scroll(label: str, child: Raw) -> Raw:
    """A box that scrolls sideways by itself, so that the page never does."""
    return el("div", child, class_="scroll", tabindex="0", role="region", aria_label=label)


def warning_list(lines: Sequence[str]) -> Raw | None:
    """Warnings in a box that is hard to overlook; None without any."""
    if not lines:
        return None
    return el("ul", [el("li", line, dir="auto") for line in lines], class_="warnings", role="note")


def footer() -> Raw:
    """What the numbers do not promise."""
    where = "All numbers of this page are in report.json beside it; the recipe that made them is resolved.yaml."
    return el("footer", el("p", el("b", "What this does not show. "), CAVEAT), el("p", where))


def examples_section(report: RunReport) -> Raw | None:
    """Answers before and after, grouped by set, changed words marked."""
    if not report.examples:
        return None
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in report.examples:
        groups.setdefault((example.set, example.name), []).append(example)
    parts = []
    for (role, name), found in groups.items():
        changed = sum(_squash(e.before) != _squash(e.after) for e in found)
        count = el("span", f"{role} · {changed} of {len(found)} changed", class_="count")
        head = el("tr", [el("th", h, scope="col") for h in ("Prompt", "Right answer", "Before", "After")])
        table = el("table", el("thead", head), el("tbody", [_example(e) for e in found]), class_="examples reflow")
        parts.append(el("div", el("h3", el("i", class_=f"pip {role}"), name, count, dir="auto"), table, class_="panel"))
    intro = "The same items asked before and after. ✓ marks a right answer; changed words are marked."
    return section("In the model's words", "test", intro, parts)


def _example(example: Example) -> Raw:
    before, after = changes(example.before, example.after)
    ticks = [_tick(answer, example.target) for answer in (example.before, example.after)]
    cells: list[tuple[str, Child, str]] = [
        ("Prompt", _folded(example.prompt), "prompt"),
        ("Right answer", example.target, "target"),
        ("Before", join(before, ticks[0]), "answer"),
        ("After", join(after, ticks[1]), "answer"),
    ]
    return el("tr", [el("td", el("div", child, class_="text", dir="auto"), class_=kind, data_label=head)
                     for head, child, kind in cells])  # fmt: skip


def _folded(prompt: str) -> Child:
    """A long prompt behind its end, which is what the answer follows."""
    if len(prompt) <= _PROMPT_SHOWN:
        return prompt
    end = prompt[-_PROMPT_SHOWN // 2 :]
    return el("details", el("summary", f"… {end[end.find(' ') + 1 :].lstrip()}"), prompt)


def changes(before: str, after: str) -> tuple[Raw, Raw]:
    """Both texts with the words that differ marked: ``<del>`` in the first, ``<ins>`` in the second."""
    if before == after:
        return join(before or MISSING), el("span", after or MISSING, class_="same")
    old, new = (re.findall(r"\S+\s*|\s+", value) for value in (before, after))
    if max(len(old), len(new)) > _DIFF_WORDS:
        return _mark("del", old), _mark("ins", new)
    left: list[Child] = []
    right: list[Child] = []
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        left.append(old[i:j] if tag == "equal" else _mark("del", old[i:j]))
        right.append(new[k:m] if tag == "equal" else _mark("ins", new[k:m]))
    return join(left) or Raw(MISSING), join(right) or Raw(MISSING)


def _mark(tag: str, words: Sequence[str]) -> Raw:
    """Words in one marked span, the space behind them outside it."""
    whole = "".join(words)
    core = whole.rstrip()
    return join(el(tag, core) if core else None, whole[len(core) :])


def _tick(answer: str, target: str) -> Raw | None:
    right = _squash(target) and _squash(answer) == _squash(target)
    return el("span", " ✓", class_="tick-mark", title="the right answer") if right else None


def _squash(value: str) -> str:
    return " ".join(value.split()).casefold().rstrip(".")


def data_section(report: RunReport) -> Raw | None:
    """Which rows were used for what, one line per set."""
    if not report.data:
        return None
    return section("Data", None, "Rows per set and how they were divided.", mapping_table(report.data, "Data per set"))


def making_section(report: RunReport) -> Raw | None:
    """Training, the vector, what was exported, times and provenance."""
    times = {key: value for key, value in report.seconds.items() if key != "total"}
    parts: list[Child] = []
    if report.training:
        parts += [el("h3", "Training"), mapping_table(report.training, "Training runs")]
    boxes = []
    for title, mapping in (("Task vector", report.vector), ("Exports", report.exports)):
        if mapping:
            boxes.append(el("div", el("h3", title), tree(mapping), class_="panel"))
    if times:
        boxes.append(el("div", el("h3", "Time per stage"), _bars(times), class_="panel"))
    parts.append(el("div", boxes, class_="boxes") if boxes else None)
    if report.provenance:
        inner = el("details", el("summary", "Provenance"), tree(report.provenance), class_="panel")
        parts.append(inner)
    return section("How it was made", None, None, parts) if any(parts) else None


def _bars(times: Mapping[str, float]) -> Raw:
    longest = max((v for v in times.values() if math.isfinite(v)), default=0) or 1
    lines = []
    for name, value in times.items():
        width = 100 * max(value, 0) / longest if math.isfinite(value) else 0
        bar = el("span", el("span", style=f"width:{width:.1f}%"), class_="bar")
        lines.append(
            el("li", el("span", label_of(name), class_="stage"), bar, el("span", duration(value), class_="time"))
        )
    return el("ul", lines, class_="bars")


def mapping_table(rows: Sequence[Mapping[str, Any]], label: str) -> Raw:
    """Mappings as a table: a column per key in order of appearance, lists of numbers as a tiny line."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {k for k in keys if all(_is_number(row[k]) for row in rows if k in row)}
    head = el("tr", [el("th", label_of(k), scope="col", class_="num" if k in numeric else None) for k in keys])
    body = [
        el(
            "tr",
            [
                el("td", _cell(k, row.get(k)), class_="num" if k in numeric else None, data_label=label_of(k))
                for k in keys
            ],
        )
        for row in rows
    ]
    table = el("table", el("thead", head), el("tbody", body), class_="generic")
    return el("div", scroll(label, table), class_="panel")


def _cell(key: str, value: Any) -> Raw:
    series = _losses(value)
    if len(series) > 2:
        return sparkline(series)
    if isinstance(value, str) and _HASH.fullmatch(value):
        return el("code", f"{value.removeprefix('sha256:')[:10]}…", title=value)
    return _entry(key, value)


def _losses(value: Any) -> list[float]:
    """The numbers of ``[2.1, 1.9]``, of ``[[step, 2.1], …]`` and of ``[{"loss": 2.1}, …]``; empty for anything else."""
    if not isinstance(value, (list, tuple)):
        return []
    flat: list[Any] = [
        v.get("loss") if isinstance(v, Mapping) else v[-1] if isinstance(v, (list, tuple)) and v else v for v in value
    ]
    return [float(v) for v in flat] if all(_is_number(v) for v in flat) else []


def tree(value: Mapping[str, Any]) -> Raw:
    """A nested mapping as nested definition lists."""
    pairs = []
    for key, inner in value.items():
        nested = _entry(str(key), inner)
        pairs.append(el("div", el("dt", label_of(key)), el("dd", nested, dir="auto"),
                        class_="nested" if isinstance(inner, Mapping) and inner else None))  # fmt: skip
    return el("dl", pairs)


def _entry(key: str, value: Any) -> Raw:
    if isinstance(value, int) and not isinstance(value, bool) and (key == "bytes" or key.endswith("_bytes")):
        return join(file_size(value))
    if _is_number(value) and (key == "seconds" or key.endswith("_seconds")):
        return join(duration(float(value)))
    return plain(value)


def plain(value: Any) -> Raw:
    """Any JSON value for people: yes/no, – for nothing, long lists folded."""
    if value is None or value == "":
        return Raw(MISSING)
    if isinstance(value, bool):
        return Raw("yes" if value else "no")
    if isinstance(value, float):
        return join(f"{value:.6g}".replace("-", "−") if math.isfinite(value) else number(value))
    if isinstance(value, Mapping):
        return tree(value) if value else Raw(MISSING)
    if isinstance(value, Iterable) and not isinstance(value, str):
        items = [plain(item) for item in value]
        if not items:
            return Raw(MISSING)
        shown = join(items[0], [join(", ", item) for item in items[1:]])
        if len(items) <= _LIST_SHOWN:
            return shown
        return el("details", el("summary", f"{len(items)} items"), shown)
    if isinstance(value, str) and _HASH.fullmatch(value):
        return el("code", value)
    return join(str(value))


def label_of(key: object) -> str:
    """``loss_first`` as ``Loss first``."""
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- the parts of the html report that set the result beside others, and that attack it


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
        cells = [_evidence_score(s) for s in (row.before, row.after, row.reference)]
        body.append(_line(name, join(el("code", row.metric), el("small", chance_of(row.chance, " {}"))), cells))
    intro = (
        "The retain reference learned what was to be kept and never saw the forget set. A perfect edit would score "
        "what it scores: lower on the forget set is not better, it is conspicuous."
    )
    table = _evidence_table(("Set", "Metric", "Before", "After", "Never knew"), body, 2)
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
    table = _evidence_table(("Figure", *(NAMES[w] for w in who)), body, 1)
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
    table = _evidence_table(("Attack", *(NAMES[w] for w in who)), body, 1)
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
    return _evidence_table(("Attack", *(NAMES[w] for w in who), "Came back"), body, 1)


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
    return MISSING if score is None else _evidence_score(Score(score.value, score.stderr, score.n))


def _auc(found: Membership | None) -> Child:
    if found is None:
        return MISSING
    return join(number(found.auc), el("small", f" {number(found.low)} to {number(found.high)}"))


def _figure(value: float | str | None) -> Child:
    return number(value) if isinstance(value, int | float) else (value or MISSING)


def _evidence_score(score: Score) -> Raw:
    value, _, half = with_margin(score).partition(" ± ")
    return join(value, el("small", f" ± {half}") if half else None)


def _evidence_table(heads: Sequence[str], body: Sequence[Raw], words: int) -> Raw:
    top = [el("th", h, scope="col", class_=None if i < words else "num") for i, h in enumerate(heads)]
    return el("table", el("thead", el("tr", top)), el("tbody", body), class_="generic")


def _line(name: Child, label: Child, cells: Sequence[Child]) -> Raw:
    head = [el("th", name, scope="row"), el("td", label)] if name is not None else [el("th", label, scope="row")]
    return el("tr", head, [el("td", c, class_="num") for c in cells])


def _panel(label: str, table: Raw) -> Raw:
    return el("div", scroll(label, table), class_="panel")


# -- the part of the html report about what could be known before the edit, and how good that was


_INTRO = (
    "Measured before anything was subtracted. α says how much the fine-tuning on the forget set has in common with one "
    "on a set that is to be kept: as cosines of the two models' outputs, of what each fine-tuning changed in the "
    "outputs, and of the two vectors. Outputs are mostly the model's own, so their α is near 1 whatever the tasks; the "
    "reading rests on the changes. The slope is what the first bit of the edit costs, in nats per unit of λ. Below, "
    "nats lost: measured (solid) and predicted by that slope alone (dashed)."
)


def foresight_section(report: RunReport) -> Raw | None:
    """Correlations, slopes and what became of them; None where nothing was foreseen."""
    found = of_report(report)
    if report.foresight is None or found is None:
        return None
    entries = (*report.foresight.goals, *report.foresight.kept)
    return section(
        "What could be known beforehand",
        "validation",
        _INTRO,
        el("div", scroll("What was foreseen of each set", _foresight_table(entries, found)), class_="panel"),
        _readings(report.foresight.kept),
        _charts(entries, (*found.goals, *found.sets), report.chosen.coefficient),
        el("p", " ".join(how_good(found)), class_="intro"),
        _modules(report.foresight.kept),
    )


def prediction_chart(
    title: str,
    points: Sequence[Point],
    *,
    chosen: float,
    role: Role,
    uid: str,
    size: tuple[float, float] = (320, 190),
) -> Raw:
    """Measured change of a set's loss against λ (solid) and the first-order prediction (dashed, thin), both in nats.

    Args:
        points: in order of the coefficient.
        chosen: drawn as a vertical line; 0 draws none.
        role: picks the colour.
        uid: makes the ids of title and description unique on the page.
    """
    width, height = size
    frame = (48.0, 18.0, width - 12, height - 34)
    known = [p for p in points if math.isfinite(p.measured) and math.isfinite(p.predicted)]
    values = [v for p in known for v in (p.measured, p.predicted)] or [0.0]
    lo, hi = min(*values, 0.0), max(*values, 0.0)
    # both are changes from 0, so the axis is linear: only there is a straight line straight
    room = 0.06 * (hi - lo) or 1.0
    y = Scale("linear", lo - room * (lo < 0), hi + room, frame[3], frame[1])
    x = Scale("linear", 0.0, max((p.coefficient for p in known), default=1.0) or 1.0, frame[0] + 8, frame[2] - 8)
    drawn = grid(x, y, frame, tick_label, across=False)
    drawn += [axis_title("nats", 4, 13, "start"), axis_title("λ", (frame[0] + frame[2]) / 2, height - 3)]
    if chosen > 0:
        drawn.append(el("line", class_="chosen-line", x1=x(chosen), x2=x(chosen), y1=frame[1], y2=frame[3]))
    drawn.append(path([(x(p.coefficient), y(p.predicted)) for p in known], "line thin", "4 3"))
    drawn.append(path([(x(p.coefficient), y(p.measured)) for p in known], f"line {role}"))
    for p in known:
        dot = el("circle", class_=f"dot {role}", cx=x(p.coefficient), cy=y(p.measured), r=3.4)
        drawn.append(el("g", el("title", f"λ = {coefficient(p.coefficient)}: {_both(p)}"), dot))
    described = "; ".join(f"λ {coefficient(p.coefficient)}: {_both(p)}" for p in known)
    return svg(title, described or "No points.", size, uid, drawn)


def _both(point: Point) -> str:
    return f"measured {signed(point.measured)}, predicted {signed(point.predicted)}"


def _foresight_table(entries: Sequence[SetForesight], found: Comparison) -> Raw:
    at = f" at λ = {coefficient(found.coefficient)}" if found.coefficient is not None else ""
    heads = ["Set", "α outputs", "α changes", "α vectors", "Slope", f"Predicted{at}", f"Measured{at}", "n", "Reading"]
    top = [el("th", h, scope="col", class_=None if h in ("Set", "Reading") else "num") for h in heads]
    rows = []
    for entry, measured in zip(entries, (*found.goals, *found.sets), strict=True):
        point = measured.at(found.coefficient) if found.coefficient is not None else None
        cells: list[Child] = [
            _alpha(entry.alpha_outputs),
            _alpha(entry.alpha_changes, entry.alpha_stderr),
            _alpha(entry.alpha_vectors),
            signed(entry.slope),
            signed(point.predicted) if point else MISSING,
            signed(point.measured) if point else MISSING,
            entry.items,
        ]
        name = join(el("i", class_=f"pip {entry.set}"), f"{entry.set}/{entry.name}")
        verdict = entry.verdict or MISSING
        rows.append(
            el(
                "tr",
                el("th", name, scope="row"),
                [el("td", c, class_="num") for c in cells],
                el("td", verdict, class_="verdict"),
            )
        )
    return el("table", el("thead", el("tr", top)), el("tbody", rows), class_="generic")


def _alpha(value: float | None, stderr: float | None = None) -> Child:
    if value is None or not math.isfinite(value):
        return MISSING
    known = stderr is not None and math.isfinite(stderr)
    return join(number(value), el("small", f" ± {number(Z95 * (stderr or 0.0))}") if known else None)


def _readings(kept: Sequence[SetForesight]) -> Raw | None:
    """What the theory says, once for each different sentence, with the sets it is about."""
    said: dict[str, list[str]] = {}
    for entry in kept:
        said.setdefault(reading(entry), []).append(f"{entry.set}/{entry.name}")
    if not said:
        return None
    lines = [
        el("p", el("b", ", ".join(names)), ". ", words, class_="intro", dir="auto") for words, names in said.items()
    ]
    return join(lines, el("p", FORESIGHT_CAVEAT, class_="intro") if any(entry.verdict for entry in kept) else None)


def _charts(entries: Sequence[SetForesight], sets: Sequence[SetComparison], chosen: float) -> Raw | None:
    figures = []
    for index, (entry, found) in enumerate(zip(entries, sets, strict=True)):
        if len(found.points) < 2:
            continue
        title = f"{entry.set}/{entry.name}, change of loss against λ, measured and predicted"
        chart = prediction_chart(title, found.points, chosen=chosen, role=entry.set, uid=f"foresight-{index}")
        what = el("span", f"{entry.set} · nats lost")
        caption = el("figcaption", el("i", class_=f"pip {entry.set}"), el("b", entry.name), " ", what, dir="auto")
        figures.append(el("figure", caption, chart, class_="panel"))
    return el("div", figures, class_="multiples") if figures else None


def _modules(kept: Sequence[SetForesight]) -> Raw | None:
    """The vectors' cosine per module, folded: layers down, kinds of module across."""
    tables = []
    for entry in kept:
        if not entry.modules:
            continue
        cells: dict[str, dict[str, float]] = {}
        for name, value in entry.modules.items():
            layer, kind = _layer(name)
            cells.setdefault(layer, {})[kind] = value
        kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
        head = el(
            "tr", el("th", "Layer", scope="col"), [el("th", el("code", k), scope="col", class_="num") for k in kinds]
        )
        order = sorted(cells, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0))
        body = [
            el(
                "tr",
                el("th", layer or MISSING, scope="row"),
                [el("td", _alpha(cells[layer].get(k)), class_="num") for k in kinds],
            )
            for layer in order
        ]
        label = f"{entry.set}/{entry.name}"
        table = el("table", el("thead", head), el("tbody", body), class_="generic")
        more = el("summary", f"Cosine of the vectors per module: {label}, {counted(len(entry.modules), 'module')}")
        tables.append(el("details", more, scroll(f"Cosines per module, {label}", table), class_="panel"))
    return join(tables) if tables else None


def _layer(name: str) -> tuple[str, str]:
    """``model.layers.3.mlp.fc1`` as ("3", "mlp.fc1"); without a number in it, ("", the name)."""
    found = re.search(r"(?:^|\.)([0-9]+)\.(.+)$", name)
    return (str(int(found[1])), found[2]) if found else ("", name)


# -- ``report.html``


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
