"""The part of the HTML report about what could be known before the edit, and how good that was."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from unlearn.axes import Scale
from unlearn.drawing import axis_title, grid, path, svg
from unlearn.html_parts import scroll, section
from unlearn.markup import Child, Raw, el, join
from unlearn.prediction import CAVEAT, Comparison, Point, SetComparison, how_good, of_report, reading
from unlearn.report import Role, RunReport, SetForesight
from unlearn.report_figures import Z95
from unlearn.wording import MISSING, coefficient, counted, number, signed, tick_label

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
        el("div", scroll("What was foreseen of each set", _table(entries, found)), class_="panel"),
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


def _table(entries: Sequence[SetForesight], found: Comparison) -> Raw:
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
    return join(lines, el("p", CAVEAT, class_="intro") if any(entry.verdict for entry in kept) else None)


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
