"""The report's drawings as inline SVG. Pure functions; colours come from the page's style, so both themes work.

Nothing is told by colour alone: series differ in marker and dash, broken bounds are hollow points, collapse a cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from unlearn.report.figures import FrontierPoint, margin, with_margin
from unlearn.report.markup import Child, Raw, el, join
from unlearn.results import Score
from unlearn.text import MISSING, coefficient, number, percent, tick_label

Box = tuple[float, float, float, float]
DECADES_LINEAR = 2  # values spread over more powers of ten than this are drawn on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: values ``lo..hi`` on pixels ``start..stop``; values outside are drawn on its edge.

    ``symlog`` is linear within ±``threshold`` and logarithmic beyond (matplotlib's idea), for values that include 0.
    """

    kind: Literal["linear", "log", "symlog"]
    lo: float
    hi: float
    start: float
    stop: float
    threshold: float = 1.0

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self._bend(self.lo), self._bend(self.hi)
        share = (self._bend(min(max(value, self.lo), self.hi)) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def holds(self, value: float) -> bool:
        """False for a value that is drawn on the edge because it lies outside."""
        slack = 1e-9 * max(abs(self.lo), abs(self.hi))
        return self.lo - slack <= value <= self.hi + slack

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """About ``count`` round values within the axis."""
        if self.kind == "linear":
            return linear_ticks(self.lo, self.hi, count)
        if self.kind == "log":
            return log_ticks(self.lo, self.hi, count)
        above = log_ticks(self.threshold, self.hi, count) if self.hi > self.threshold else ()
        below = (
            tuple(-t for t in reversed(log_ticks(self.threshold, -self.lo, count))) if self.lo < -self.threshold else ()
        )
        return (*below, 0.0, *above)

    def _bend(self, value: float) -> float:
        if self.kind == "linear":
            return value
        if self.kind == "log":
            return math.log10(value)
        size = abs(value) / self.threshold
        return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def linear_ticks(lo: float, hi: float, count: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten in ``lo..hi``, about ``count`` of them."""
    step = _round_step((hi - lo) / max(count, 1))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    digits = 1 - math.floor(math.log10(step))  # 3 * 0.1 is to be 0.3
    return tuple(round(i * step, digits) for i in range(first, last + 1))


def log_ticks(lo: float, hi: float, count: int = 5) -> tuple[float, ...]:
    """Powers of ten in ``lo..hi``, at most about ``count``."""
    first, last = math.ceil(math.log10(lo) - 1e-9), math.floor(math.log10(hi) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / max(count, 1)))
    return tuple(10.0**e for e in range(first, last + 1, every))


def scale_for(values: Iterable[float], start: float, stop: float, unit: bool = True) -> Scale:
    """The axis that shows all finite ``values``.

    Scores between 0 and 1 get the whole of 0..1 when ``unit`` is set, so that charts compare. Values over more than
    two powers of ten get a logarithmic axis, whole decades; with 0 or below among them, a symmetric one.
    """
    # beyond these powers of ten the decades around a value would be no floats
    found = [v if abs(v) > 1e-300 else 0.0 for v in values if abs(v) < 1e300]
    if not found:
        return Scale("linear", 0.0, 1.0, start, stop)
    lo, hi = min(found), max(found)
    if unit and lo >= 0 and hi <= 1:
        return Scale("linear", 0.0, 1.0, start, stop)
    sizes = [abs(v) for v in found if v]
    if lo < hi and max(sizes) / min(sizes) > 10**DECADES_LINEAR:
        if lo > 0:
            return Scale("log", 10.0 ** math.floor(math.log10(lo)), 10.0 ** math.ceil(math.log10(hi)), start, stop)
        threshold = max(10.0 ** math.floor(math.log10(min(sizes))), max(sizes) * 1e-15)
        low = -(10.0 ** math.ceil(math.log10(-lo))) if lo < -threshold else -threshold if lo < 0 else 0.0
        high = 10.0 ** math.ceil(math.log10(hi)) if hi > threshold else threshold if hi > 0 else 0.0
        return Scale("symlog", low, high, start, stop, threshold)
    room = 0.06 * (hi - lo) or 0.1 * abs(hi) or 1.0
    return Scale("linear", 0.0 if 0 <= lo <= 2 * room else lo - room, hi + room, start, stop)


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def along(line: Sequence[tuple[float, float]], step: float = 4.0) -> tuple[tuple[float, float], ...]:
    """Points on a line of straight pieces, at most ``step`` pixels apart."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(line):
        pieces = max(1, math.ceil(math.hypot(x2 - x1, y2 - y1) / step))
        found += [(x1 + (x2 - x1) * i / pieces, y1 + (y2 - y1) * i / pieces) for i in range(pieces + 1)]
    return tuple(found)


def place(
    anchors: Sequence[tuple[float, float, float]], obstacles: Sequence[Box], frame: Box, height: float = 13.0
) -> tuple[tuple[float, float] | None, ...]:
    """Where labels go without touching points or each other; earlier labels first, None where there is no room.

    Args:
        anchors: per label the point's x and y and the label's width, in pixels.
        obstacles: boxes to keep free.
        frame: the box that labels must stay in.
        height: of a label.

    Returns:
        Per label the centre of its box.
    """
    taken, placed = list(obstacles), []
    for x, y, width in anchors:
        far, side = 10 + height / 2, 10 + width / 2
        slant = 0.7 * far
        candidates = [(0, far), (0, -far), (side, 0), (-side, 0)]
        candidates += [(sx * side * 0.9, sy * slant) for sx in (1, -1) for sy in (1, -1)]
        chosen = None
        for dx, dy in candidates:
            box = (x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(overlap(box, other) for other in taken):
                taken.append(box)
                chosen = (x + dx, y + dy)
                break
        placed.append(chosen)
    return tuple(placed)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))


# -- what every drawing of the report is made of


SERIES = 6  # styles that differ in both colour and marker; the seventh series looks like the first
CROSS = 4  # the marker that is one


def svg(title: str, described: str, size: tuple[float, float], uid: str, drawn: Sequence[Raw | None]) -> Raw:
    """A whole drawing with its name and its description for those who cannot see it; ``uid`` makes their ids unique."""
    heads = join(el("title", title, id=f"{uid}-t"), el("desc", described, id=f"{uid}-d"))
    width, height = size
    return el("svg", heads, drawn, class_="chart", viewBox=f"0 0 {width:g} {height:g}", width=width, height=height,
              role="img", aria_labelledby=f"{uid}-t {uid}-d")  # fmt: skip


def grid(x: Scale, y: Scale, frame: Box, y_label: Callable[[float], str], across: bool = True) -> list[Raw | None]:
    """Grid lines with their labels and the lower axis of a frame; ``across`` draws those of x as well."""
    drawn: list[Raw | None] = []
    for tick in y.ticks(5):
        at = y(tick)
        drawn.append(el("line", class_="grid", x1=frame[0], x2=frame[2], y1=at, y2=at))
        drawn.append(el("text", y_label(tick), class_="tick", x=frame[0] - 6, y=at + 4, text_anchor="end"))
    for tick in x.ticks(max(4, round((frame[2] - frame[0]) / 90))):
        at = x(tick)
        if across:
            drawn.append(el("line", class_="grid", x1=at, x2=at, y1=frame[1], y2=frame[3]))
        drawn.append(el("text", tick_label(tick), class_="tick", x=at, y=frame[3] + 16, text_anchor="middle"))
    drawn.append(el("line", class_="axis", x1=frame[0], x2=frame[2], y1=frame[3], y2=frame[3]))
    return drawn


def axis_title(words: str, x: float, y: float, anchor: str = "middle") -> Raw:
    """An axis title at a pixel."""
    return el("text", words, class_="axis-title", x=x, y=y, text_anchor=anchor)


def path(line: Sequence[tuple[float, float]], class_: str, dash: str | None = None) -> Raw | None:
    """Straight pieces through pixels; None of fewer than two."""
    if len(line) < 2:
        return None
    return el("path", class_=class_, d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line), stroke_dasharray=dash)


def marker(index: int, x: float, y: float, r: float, class_: str) -> Raw:
    """Circle, square, triangle, diamond, cross or upside-down triangle around a pixel."""
    d = 1.35 * r
    f = [
        f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0Z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r:g}v{2 * r:g}h{-2 * r:g}Z",
        f"M{x:.1f} {y - 1.2 * r:.1f}L{x + 1.15 * r:.1f} {y + 0.9 * r:.1f}H{x - 1.15 * r:.1f}Z",
        f"M{x:.1f} {y - d:.1f}L{x + d:.1f} {y:.1f}L{x:.1f} {y + d:.1f}L{x - d:.1f} {y:.1f}Z",
        f"M{x - r:.1f} {y - r:.1f}l{2 * r:g} {2 * r:g}m{-2 * r:g} 0l{2 * r:g} {-2 * r:g}",
        f"M{x:.1f} {y + 1.2 * r:.1f}L{x + 1.15 * r:.1f} {y - 0.9 * r:.1f}H{x - 1.15 * r:.1f}Z",
    ]
    return el("path", class_=class_, d=f[index % SERIES])


def whisker(x: float, low: float, high: float) -> str:
    """Path data of an error bar."""
    return f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"


# -- the report's drawings as inline svg. pure functions; colours come from the page's style, so both the


TOP = 1.5  # largest share on the frontier's axis
_DASHES = (None, "6 3", "2 3", "9 3 2 3", "4 2", "1 3")


def frontier_chart(
    points: Sequence[FrontierPoint],
    *,
    chosen: float,
    keep: float | None,
    metric: str,
    hint: str,
    size: tuple[float, float],
    uid: str,
) -> Raw:
    """Goal's score (x) against the share of the kept scores that is left (y), one point per coefficient.

    Args:
        keep: the bound on y; the region within it is shaded. None draws no bound.
        metric: what x shows, for the axis title.
        hint: which way is better, with an arrow.
        size: width and height in pixels.
        uid: makes the ids of title and description unique on the page.
    """
    width, height = size
    frame = (46.0, 30.0, width - 12, height - 48)
    shown = [p for p in points if p.forget is not None and math.isfinite(p.forget.value) and p.worst is not None]
    x = _x_scale([p.forget.value for p in shown if p.forget], frame)
    y = _y_scale([s for p in shown for s in p.shares.values()], keep, frame)
    names = sorted({name for p in shown for name in p.shares}, key=list(dict.fromkeys(_names(shown))).index)
    drawn: list[Raw | None] = []
    if keep is not None:
        edge = y(keep)
        drawn.append(
            el("rect", class_="allowed", x=frame[0], y=frame[1], width=frame[2] - frame[0], height=edge - frame[1])
        )
        drawn.append(el("line", class_="bound", x1=frame[0], x2=frame[2], y1=edge, y2=edge))
    drawn += grid(x, y, frame, lambda v: f"{100 * v:.4g} %")
    room = int((frame[2] - frame[0] + 24) / 6.6) - len(hint) - 3  # characters that fit around the middle
    shown_metric = metric if len(metric) <= room else f"{metric[: max(room - 1, 1)]}…"
    drawn.append(axis_title(f"{shown_metric}   {hint}", (frame[0] + frame[2]) / 2, height - 8))
    drawn.append(axis_title("kept: share of the score at λ = 0", 4, 15, "start"))
    thin: list[tuple[float, float]] = []
    for index, name in enumerate(names if len(names) > 1 else []):
        line = [(x(p.forget.value), y(p.shares[name])) for p in shown if p.forget and name in p.shares]
        drawn.append(path(line, f"line s{index % SERIES}", _DASHES[index % SERIES]))
        drawn += [marker(index, px, py, 3.2, f"dot s{index % SERIES}") for px, py in line]
        thin += line
    spots = [(p, x(p.forget.value), y(p.worst)) for p in shown if p.forget and p.worst is not None]
    drawn.append(path([(px, py) for _, px, py in spots], "line worst"))
    drawn += [_spot(p, px, py, p.coefficient == chosen) for p, px, py in spots]
    drawn += _labels(spots, thin, chosen, keep, y, frame)
    described = "; ".join(
        f"λ {coefficient(p.coefficient)}: forget {_forget(p)}, kept {percent(p.worst)}"
        + ("" if p.within_bound else ", outside the bound")
        + (", predictions collapsed" if p.collapsed else "")
        for p in shown
    )
    return svg("Frontier of forgetting against keeping", described or "No points.", size, uid, drawn)


def lambda_chart(
    title: str,
    scores: Sequence[tuple[float, Score]],
    *,
    chosen: float,
    bound: float | None,
    chance: float | None = None,
    role: str,
    uid: str,
    size: tuple[float, float] = (320, 190),
) -> Raw:
    """One metric against the coefficient with 95 % error bars.

    Args:
        scores: coefficient and score, in order of the coefficient. Missing values leave a gap.
        chosen: drawn as a vertical line.
        bound: the value the metric may not pass, a dashed line; None for none.
        chance: what guessing scores, a dotted line; None for none.
        role: forget, retain or utility; picks the colour.
    """
    width, height = size
    frame = (48.0, 18.0, width - 12, height - 34)
    known = [(c, s) for c, s in scores if math.isfinite(s.value)]
    reach = [s.value + side * (margin(s) or 0.0) for _, s in known for side in (-1, 1)]
    values = [s.value for _, s in known]
    unit = all(0 <= v <= 1 for v in values)
    positive = all(v > 0 for v in values)
    y = scale_for(
        values if unit else [*values, *(v for v in reach if v > 0 or not positive), *([bound] if bound else [])],
        frame[3],
        frame[1],
    )
    top = max([c for c, _ in scores if math.isfinite(c)], default=1.0) or 1.0
    x = Scale("linear", 0.0, top, frame[0] + 8, frame[2] - 8)
    drawn = grid(x, y, frame, tick_label, across=False)
    drawn.append(axis_title("λ", (frame[0] + frame[2]) / 2, height - 3))
    if bound is not None and y.holds(bound):
        drawn.append(el("line", class_="bound", x1=frame[0], x2=frame[2], y1=y(bound), y2=y(bound)))
    if chance is not None and y.holds(chance):
        drawn.append(el("line", class_="chance", x1=frame[0], x2=frame[2], y1=y(chance), y2=y(chance)))
    at = x(chosen)
    drawn.append(el("line", class_="chosen-line", x1=at, x2=at, y1=frame[1], y2=frame[3]))
    anchor = "start" if at < width / 3 else "end" if at > 2 * width / 3 else "middle"
    drawn.append(
        el("text", f"λ = {coefficient(chosen)}", class_="chosen-text", x=at, y=frame[1] - 5, text_anchor=anchor)
    )
    drawn.append(path([(x(c), y(s.value)) for c, s in known], f"line {role}"))
    for c, s in known:
        if half := margin(s):
            low, high = y(s.value - half), y(s.value + half)
            drawn.append(el("path", class_=f"whisker {role}", d=whisker(x(c), low, high)))
        said = el("title", f"λ = {coefficient(c)}: {with_margin(s)} (n = {s.n})")
        drawn.append(el("g", said, el("circle", class_=f"dot {role}", cx=x(c), cy=y(s.value), r=3.4)))
    described = "; ".join(f"λ {coefficient(c)}: {with_margin(s)}" for c, s in scores)
    return svg(title, described or "No points.", size, uid, drawn)


def sparkline(values: Sequence[float], size: tuple[float, float] = (132, 30)) -> Raw:
    """A tiny line of a loss over the steps, first to last; empty below two finite values."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return Raw("")
    width, height = size
    lo, hi = min(known), max(known)
    y = Scale("linear", lo, hi if hi > lo else lo + 1, height - 3, 3)
    x = Scale("linear", 0, len(known) - 1, 3, width - 5)
    line = [(x(i), y(v)) for i, v in enumerate(known)]
    end = el("circle", class_="dot ink", cx=line[-1][0], cy=line[-1][1], r=2.2)
    label = f"loss from {number(known[0])} to {number(known[-1])}"
    return el("svg", path(line, "line thin"), end, class_="spark", viewBox=f"0 0 {width:g} {height:g}",
              width=width, height=height, role="img", aria_label=label)  # fmt: skip


def frontier_legend(points: Sequence[FrontierPoint], chosen: float, keep: float | None) -> Raw:
    """What the frontier's marks mean, as a list that wraps on narrow screens."""
    names = list(dict.fromkeys(_names(points)))
    worst = "worst kept set" if len(names) > 1 else f"{names[0]} (the only kept set)" if names else "kept"
    items = [(_key(el("path", class_="line worst", d="M1 7H27"), el("circle", class_="spot", cx=14, cy=7, r=4)), worst)]
    for index, name in enumerate(names if len(names) > 1 else []):
        stroke = el("path", class_=f"line s{index % SERIES}", d="M1 7H27", stroke_dasharray=_DASHES[index % SERIES])
        items.append((_key(stroke, marker(index, 14, 7, 3.2, f"dot s{index % SERIES}")), name))
    ring = el("circle", class_="ring", cx=14, cy=7, r=6.2)
    items.append((_key(el("circle", class_="spot", cx=14, cy=7, r=3.4), ring), f"chosen, λ = {coefficient(chosen)}"))
    if any(not p.within_bound and not p.collapsed for p in points):
        items.append((_key(el("circle", class_="spot broken", cx=14, cy=7, r=4)), "bound broken"))
    if any(p.collapsed for p in points):
        items.append((_key(marker(CROSS, 14, 7, 4, "spot broken")), "predictions collapsed"))
    if keep is not None:
        box = el("rect", class_="allowed", x=2, y=1, width=24, height=12)
        items.append(
            (_key(box, el("line", class_="bound", x1=2, x2=26, y1=13, y2=13)), f"within the bound (≥ {percent(keep)})")
        )
    return el("ul", [el("li", icon, " ", name) for icon, name in items], class_="legend")


def _key(*shapes: Raw) -> Raw:
    return el("svg", shapes, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true")


def _names(points: Sequence[FrontierPoint]) -> list[str]:
    return [name for p in points for name in p.shares]


def _x_scale(values: Sequence[float], frame: tuple[float, float, float, float]) -> Scale:
    scale = scale_for(values, frame[0] + 10, frame[2] - 10, unit=False)
    if scale.kind != "linear" or not values or min(values) < 0 or max(values) > 1:
        return scale
    return Scale("linear", max(0.0, scale.lo), min(1.0, scale.hi), scale.start, scale.stop)


def _y_scale(shares: Sequence[float], keep: float | None, frame: tuple[float, float, float, float]) -> Scale:
    marks = [*(s for s in shares if math.isfinite(s)), 1.0, *([keep] if keep is not None else [])]
    lo, hi = max(min(marks), 0.0), min(max(marks), TOP)  # a tiny baseline makes huge ratios; they sit on the edge
    room = max(0.08 * (hi - lo), 0.012)
    return Scale("linear", max(lo - room, 0.0), hi + room, frame[3], frame[1])


def _spot(point: FrontierPoint, x: float, y: float, chosen: bool) -> Raw:
    left = f"; bound broken: {'; '.join(point.broken)}" if point.broken else ""
    left += f"; predictions collapsed: {point.collapsed}" if point.collapsed else ""
    said = f"λ = {coefficient(point.coefficient)}: forget {_forget(point)}, worst kept {percent(point.worst)}{left}"
    ring = el("circle", class_="ring", cx=x, cy=y, r=8.5) if chosen else None
    if point.collapsed:
        return el("g", el("title", said), ring, marker(CROSS, x, y, 5.8, "spot broken"))
    dot = el("circle", class_="spot" if point.within_bound else "spot broken", cx=x, cy=y, r=4.6)
    return el("g", el("title", said), ring, dot)


def _forget(point: FrontierPoint) -> str:
    return with_margin(point.forget) if point.forget else MISSING


def _labels(
    spots: Sequence[tuple[FrontierPoint, float, float]],
    others: Sequence[tuple[float, float]],
    chosen: float,
    keep: float | None,
    y: Scale,
    frame: tuple[float, float, float, float],
) -> list[Raw]:
    last = len(spots) - 1
    order = sorted(range(len(spots)), key=lambda i: (spots[i][0].coefficient != chosen, i not in (0, last), i))
    words = [f"λ = {coefficient(spots[i][0].coefficient)}" if not n else coefficient(spots[i][0].coefficient)
             for n, i in enumerate(order)]  # fmt: skip
    anchors = [(spots[i][1], spots[i][2], 7.2 * len(w) + 4) for w, i in zip(words, order, strict=True)]
    line = [(px, py) for _, px, py in spots]
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in [*line, *others]]
    taken += [(px - 1.5, py - 1.5, px + 1.5, py + 1.5) for px, py in along(line)]
    drawn = []
    if keep is not None:
        words.append(f"bound {percent(keep)}")
        drawn.append(el("text", words[-1], class_="bound-text", x=frame[2] - 4, y=y(keep) + 13, text_anchor="end"))
        taken.append((frame[2] - 84, y(keep), frame[2], y(keep) + 16))
    for n, (word, spot) in enumerate(zip(words, place(anchors, taken, frame), strict=False)):
        if spot:
            named = "label chosen" if n == 0 and spots[order[0]][0].coefficient == chosen else "label"
            drawn.append(el("text", word, class_=named, x=spot[0], y=spot[1] + 4, text_anchor="middle"))
    return drawn


# -- parts of a page


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


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
