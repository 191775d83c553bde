"""What every drawing of the report is made of: SVG elements at pixels. Colours come from the page's style."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unlearn.axes import Box, Scale
from unlearn.markup import Raw, el, join
from unlearn.wording import tick_label

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
