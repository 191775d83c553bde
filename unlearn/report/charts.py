"""Charts by matplotlib from plain numbers: inline SVG in the colours of the page, PDF and PNG files for papers.

``chart`` draws, its ``svg`` gives the drawing as markup, ``save`` as files. Nothing is told by colour alone: series
differ in marker and dash, hollow points broke a bound, a cross is a collapse. matplotlib is imported when one is drawn.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from unlearn.store.cache import cache_folder
from unlearn.store.files import written_whole
from unlearn.text import clean, number, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light theme of the page's style, under the names of its CSS variables. No two are the same, so that the SVG's
# colours can be told apart and made variables.
COLOURS = {
    **{"ink": "#17191d", "muted": "#5b626d", "faint": "#858c97", "grid": "#ececee", "panel": "#ffffff"},
    **{"forget": "#c44e00", "learn": "#a3487d", "retain": "#0068a8", "utility": "#00805d", "accent": "#c44e01"},
    **{"s0": "#0072b2", "s1": "#009e73", "s2": "#b3568a", "s3": "#b07800", "s4": "#3390c6", "s5": "#6b5bb5"},
    **{"bound": "#0b7d60"},
}
Mark = Literal["full", "hollow", "cross"]
MARKERS = ("o", "s", "^", "D", "v", "P")  # with the colours s0 to s5 and the dashes below: six styles of series
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1.4, 2)), (0, (6, 2, 1.4, 2)), (0, (3, 1.4)), (0, (1, 1)))
_LARGEST = 1e100  # values beyond are drawn on the edge of the frame
_DECADES = 2  # values spread over more powers of ten than this get a logarithmic axis


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a series.

    ``error`` is half of its vertical error bar, ``x_error`` of a horizontal one; ``label`` is written beside it where
    there is room; ``tip`` shows under the mouse. ``mark`` says how it is drawn, ``ring`` that it is the chosen one.
    """

    x: float
    y: float
    error: float | None = None
    x_error: float | None = None
    label: str = ""
    tip: str = ""
    mark: Mark = "full"
    ring: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour (a name of ``COLOURS``), joined by a line unless ``dash`` is None."""

    points: Sequence[Point]
    colour: str = "ink"
    name: str = ""
    marker: str = "o"
    dash: Any = "-"
    width: float = 1.5
    size: float = 6.5  # of the markers; 0 draws none


@dataclass(frozen=True, slots=True)
class Axis:
    """What is shown from where to where. ``symlog`` is linear within ±``threshold`` and logarithmic beyond."""

    low: float
    high: float
    title: str = ""
    percent: bool = False
    kind: Literal["linear", "log", "symlog"] = "linear"
    threshold: float = 1.0


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the legend beside a chart: a mark as it is drawn, or the region that a bound allows."""

    name: str
    colour: str = "ink"
    marker: str = ""
    dash: Any = None
    mark: Mark = "full"
    ring: bool = False
    region: bool = False


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th series, as arguments of :class:`Series` and :class:`Key`; six differ."""
    n = index % len(MARKERS)
    return {"colour": f"s{n}", "marker": MARKERS[n], "dash": DASHES[n]}


def axis_of(values: Iterable[float], title: str = "", *, unit: bool = True) -> Axis:
    """The axis that shows all finite values.

    Scores between 0 and 1 get the whole of 0..1 when ``unit`` is set, so that charts compare. Values over more than
    two powers of ten get a logarithmic axis, whole decades; with 0 or below among them, a symmetric one.
    """
    found = [v if abs(v) > 1 / _LARGEST else 0.0 for v in values if abs(v) < _LARGEST]
    lo, hi = min(found, default=0.0), max(found, default=1.0)
    if not found or (unit and lo >= 0 and hi <= 1):
        return Axis(0.0, 1.0, title)
    sizes = [abs(v) for v in found if v]
    if lo < hi and max(sizes) / min(sizes) > 10**_DECADES:
        if lo > 0:
            return Axis(_decade(lo, math.floor), _decade(hi, math.ceil), title, kind="log")
        threshold = max(_decade(min(sizes), math.floor), max(sizes) * 1e-15)
        low, high = (max(_decade(v, math.ceil), threshold) if v > 0 else 0.0 for v in (-lo, hi))
        return Axis(-low, high, title, kind="symlog", threshold=threshold)
    room = 0.06 * (hi - lo) or 0.1 * abs(hi) or 1.0
    return Axis(0.0 if 0 <= lo <= 2 * room else lo - room, hi + room, title)


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing, and what its marked points say under the mouse."""

    figure: Figure
    tips: Sequence[str]
    names: bool  # whether several series have names, which a file on its own has to tell

    def svg(self, title: str, described: str, uid: str) -> Markup:
        """Inline markup; name and description are for those who cannot see it, ``uid`` makes its ids unique."""
        import matplotlib

        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unlearn"}), _quiet():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        whole = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.S)
        inner = whole[whole.index(">", whole.index("<svg")) + 1 : whole.rindex("</svg>")]
        for name, colour in COLOURS.items():
            inner = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", inner)
        # ids of our own say what a group is; of the others only those that something refers to are needed
        inner = re.sub(r'<g id="tip:(\d+)">', lambda m: f"<g><title>{escape(self.tips[int(m[1])])}</title>", inner)
        inner = inner.replace('<g id="halo">', '<g class="halo">')
        inner = re.sub(r'(<(?:path|clipPath)) id="', rf'\1 id="{uid}-', inner)
        inner = re.sub(r'(xlink:href="|url\()#', rf"\1#{uid}-", inner)
        inner = re.sub(r'<g id="[^"]*"', "<g", inner)
        inner = re.sub(r"font(-family)?: [^;\"]*(?<=sans-serif); ?", "", inner)
        inner = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+(?![\de])", r"\1", m[0]), inner)
        inner = re.sub(r"\s*\n\s*|<g/>| transform=\"rotate\(-0 [^\"]*\"", lambda m: " " * m[0].isspace(), inner)
        width, height = (f"{72 * side:g}" for side in self.figure.get_size_inches())
        return Markup(
            f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-labelledby="{uid}-t {uid}-d"><title id="{uid}-t">{escape(clean(title))}</title>'
            f'<desc id="{uid}-d">{escape(clean(described or "No points."))}</desc>{inner}</svg>'
        )

    def save(self, path: Path) -> None:
        """``path`` with .pdf and .png: white, with a legend, the same bytes for the same numbers."""
        if self.names:
            legend = self.figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=COLOURS["ink"])
            for name in legend.get_texts():
                name.set_parse_math(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path.with_suffix(".pdf")) as file, _quiet():
            self.figure.savefig(file, format="pdf", metadata={"CreationDate": None})
        with written_whole(path.with_suffix(".png")) as file, _quiet():
            self.figure.savefig(file, format="png", facecolor="white", dpi=200, metadata={"Software": None})


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    size: tuple[float, float] = (320, 190),
    bound: float | None = None,
    bound_label: str = "",
    shaded: bool = False,
    chance: float | None = None,
    at: float | None = None,
    at_label: str = "",
) -> Chart:
    """Lines and points on two axes.

    Args:
        series: Drawn in order, the last on top. Points that are no numbers are left out; those outside the axes are
            drawn on the edge.
        size: Width and height in pixels of the page.
        bound: A dashed line on y; ``shaded``: what lies above it is allowed.
        chance: A dotted line on y: what guessing scores.
        at: A vertical line.
    """
    # matplotlib's settings and font list in our cache, not in the user's home, unless a place is named
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    from matplotlib.figure import Figure

    large = size[1] > 250
    left, right, top, bottom = (50.0, 14.0, 30.0, 46.0) if large else (46.0, 12.0, 20.0, 36.0)
    width, height = size[0] - left - right, size[1] - top - bottom
    figure = Figure(figsize=(size[0] / 72, size[1] / 72))  # 72 points an inch: a point of the SVG is a pixel
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    figure.patch.set_visible(False)
    _frame(axes, x, y, width, across=large)

    def words(text: str, right: float, up: float, colour: str, side: str, **more: Any) -> None:
        """Text at pixels from the frame's lower left corner."""
        axes.text(right / width, up / height, clean(text), transform=axes.transAxes, color=COLOURS[colour], ha=side,
                  parse_math=False, **more)  # fmt: skip

    words(x.title, width / 2, (8 if large else 4) - bottom, "ink", "center", size=12.5)
    words(y.title, 4 - left, height + top - 15, "ink", "left", size=12.5)
    taken: list[tuple[float, float, float, float]] = []
    if bound is not None and y.low <= bound <= y.high:
        if shaded:
            axes.axhspan(bound, y.high, color=COLOURS["bound"], alpha=0.08, lw=0, zorder=0.4)
        axes.axhline(bound, color=COLOURS["bound"], lw=1.3, ls=(0, (4, 3)), zorder=1)
        if bound_label:
            edge = axes.transAxes.inverted().transform(axes.transData.transform((x.low, bound)))[1] * height
            words(bound_label, width - 4, edge - 13, "bound", "right", size=12)
            taken.append((width - 84, edge - 16, width, edge))
    if chance is not None and y.low <= chance <= y.high:
        axes.axhline(chance, color=COLOURS["muted"], lw=1.2, ls=(0, (1.3, 2.5)), zorder=1)
    if at is not None:
        axes.axvline(at, color=COLOURS["accent"], lw=1.4, zorder=1)
        share = axes.transAxes.inverted().transform(axes.transData.transform((at, y.low)))[0]
        side = "left" if share < 0.33 else "right" if share > 0.67 else "center"
        words(at_label, share * width, height + 5, "accent", side, size=12, weight="bold")
    tips: list[str] = []
    to_pixels = axes.transData + axes.transAxes.inverted()
    labels = []
    for order, one in enumerate(series):
        spots = [(p, min(max(p.x, x.low), x.high), min(max(p.y, y.low), y.high)) for p in one.points
                 if not (math.isnan(p.x) or math.isnan(p.y))]  # fmt: skip
        _draw(axes, one, spots, (x, y), 2 + order, tips)
        places = [(a * width, b * height) for a, b in to_pixels.transform([s[1:] for s in spots])] if spots else []
        taken += [(a - 5, b - 5, a + 5, b + 5) for a, b in places]
        if any(p.label for p in one.points):
            for (a, b), (c, d) in pairwise(places):  # its line is to be kept free as well
                steps = max(1, math.ceil(math.hypot(c - a, d - b) / 4))
                line = [(a + (c - a) * n / steps, b + (d - b) * n / steps) for n in range(steps)]
                taken += [(u - 1.5, v - 1.5, u + 1.5, v + 1.5) for u, v in line]
        labels += [(not p.ring, 0 < n < len(spots) - 1, p, *places[n]) for n, (p, *_) in enumerate(spots) if p.label]
    for _, _, p, px, py in sorted(labels, key=lambda one: one[:2]):
        if spot := _room(px, py, 7.2 * len(p.label) + 4, taken, (width, height)):
            words(p.label, *spot, "accent" if p.ring else "ink", "center", size=12, va="center", zorder=9, gid="halo",
                  weight="bold" if p.ring else "normal")  # fmt: skip
    return Chart(figure, tips, sum(bool(one.name) for one in series) > 1)


def spark(values: Sequence[float]) -> Markup:
    """A tiny line of a loss over the steps, drawn without axes; empty below two finite values."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return Markup()
    low, span = min(known), max(known) - min(known) or 1.0
    spots = [(3 + 124 * i / (len(known) - 1), 27 - 24 * (v - low) / span) for i, v in enumerate(known)]
    return Markup(
        '<svg class="spark" viewBox="0 0 132 30" width="132" height="30" role="img" '
        f'aria-label="loss from {number(known[0])} to {number(known[-1])}"><polyline class="thin" '
        f'points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in spots)}"/>'
        f'<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="2.2"/></svg>'
    )


def _frame(axes: Axes, x: Axis, y: Axis, width: float, across: bool) -> None:
    """Grid, ticks and scales."""
    from matplotlib.ticker import FixedLocator

    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["faint"])
    for side, axis, one, count in (("x", axes.xaxis, x, max(4, round(width / 90))), ("y", axes.yaxis, y, 5)):
        getattr(axes, f"set_{side}scale")(one.kind, **({"linthresh": one.threshold} if one.kind == "symlog" else {}))
        inset = 8 / width * (one.high - one.low) if side == "x" and one.kind == "linear" else 0.0
        getattr(axes, f"set_{side}lim")(one.low - inset, one.high + inset)
        ticks = _ticks(one, count)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(FixedLocator([]))
        axis.set_ticklabels([f"{100 * v:.4g} %" if one.percent else tick_label(v) for v in ticks])
        axis.set_tick_params(length=0, pad=6, labelsize=12, labelcolor=COLOURS["muted"])
        if across or side == "y":
            axis.grid(color=COLOURS["grid"], lw=1, zorder=0.5)
    axes.set_axisbelow(True)


def _ticks(axis: Axis, count: int) -> list[float]:
    """About ``count`` round values."""
    from matplotlib.ticker import MaxNLocator

    if axis.kind == "linear":
        found = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(axis.low, axis.high)
        slack = 1e-9 * (axis.high - axis.low)
        return [float(v) for v in found if axis.low - slack <= v <= axis.high + slack]

    def powers(low: float, high: float) -> list[float]:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        return [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first + 1) / count)))]

    if axis.kind == "log":
        return powers(axis.low, axis.high)
    above, below = (powers(axis.threshold, v) if v > axis.threshold else [] for v in (axis.high, -axis.low))
    return [*(-v for v in reversed(below)), 0.0, *above]


def _draw(
    axes: Axes,
    one: Series,
    spots: Sequence[tuple[Point, float, float]],
    frame: tuple[Axis, Axis],
    order: float,
    tips: list[str],
) -> None:
    """A series: its line, error bars cut at the frame, and each point in a group of its own with its tip."""
    colour, (x, y) = COLOURS[one.colour], frame
    if one.dash is not None and len(spots) > 1:
        axes.plot([s[1] for s in spots], [s[2] for s in spots], color=colour, lw=one.width, ls=one.dash, zorder=order,
                  label=clean(one.name), clip_on=False)  # fmt: skip
    bars: dict[str, Any] = {"fmt": "none", "color": colour, "alpha": 0.55, "elinewidth": 1.2, "capsize": 3}
    for p, px, py in spots:
        if p.error:
            axes.errorbar([px], [py], yerr=_bar(py, p.error, y), zorder=order, **bars)
        if p.x_error:
            axes.errorbar([px], [py], xerr=_bar(px, p.x_error, x), zorder=order, **bars)
        marks: dict[str, Any] = {"clip_on": False, "zorder": order + 0.3}
        if p.ring:
            axes.plot([px], [py], "o", mfc="none", mec=COLOURS["accent"], ms=one.size + 9, mew=2.6, **marks)
        if one.size:
            marks |= {"gid": f"tip:{len(tips)}"} if p.tip else {}
            tips += [clean(p.tip)] if p.tip else []
            shape, size = ("x", 1.3 * one.size) if p.mark == "cross" else (one.marker, one.size)
            face = COLOURS["panel"] if p.mark == "hollow" else colour
            axes.plot([px], [py], shape, ms=size, mfc=face, mec=colour, mew=1 if p.mark == "full" else 2, **marks)


def _bar(middle: float, half: float, axis: Axis) -> list[list[float]]:
    """The two arms of an error bar, cut at the frame."""
    return [[middle - max(middle - half, axis.low)], [min(middle + half, axis.high) - middle]]


def _room(
    x: float, y: float, width: float, taken: list[tuple[float, float, float, float]], frame: tuple[float, float]
) -> tuple[float, float] | None:
    """The centre of a label beside a point where it touches nothing that is taken, which it then is; None without."""
    far, side = 16.0, 10 + width / 2
    around = [(0, -far), (0, far), (side, 0), (-side, 0)]
    around += [(0.9 * sx * side, 0.7 * sy * far) for sx in (1, -1) for sy in (1, -1)]
    for dx, dy in around:
        box = (x + dx - width / 2, y + dy - 6.5, x + dx + width / 2, y + dy + 6.5)
        inside = box[0] >= 0 and box[1] >= 0 and box[2] <= frame[0] and box[3] <= frame[1]
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return x + dx, y + dy
    return None


def _decade(value: float, towards: Callable[[float], int]) -> float:
    return float(10.0 ** towards(math.log10(value)))


def _quiet() -> warnings.catch_warnings[None]:
    """A font need not have every character that a name may hold: the page's own fonts show it."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
