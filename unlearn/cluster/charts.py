"""Drawings of the merged report: settings against each other, their frontiers, and a mean with its runs in a cell.

A few settings are drawn in a style of their own (colour, marker and dash together), all others in grey: a page of forty
colours tells nobody anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.cluster.groups import Family, Group, Pair, Split, Step
from unlearn.cluster.numbers import Spread
from unlearn.cluster.words import group_label, share_with_half, with_half
from unlearn.report.drawing import (
    CROSS,
    SERIES,
    TOP,
    Scale,
    along,
    axis_title,
    grid,
    marker,
    path,
    place,
    scale_for,
    svg,
)
from unlearn.report.markup import Raw, el
from unlearn.text import coefficient, percent

Frame = tuple[float, float, float, float]
_DASHES = (None, "6 3", "2 3", "9 3 2 3", "4 2", "1 3")
_MARKERS = (0, 1, 2, 3, 5, 0)  # all but the cross, which means collapse
_WHISKERS = 3  # pixels of their ends


@dataclass(frozen=True, slots=True)
class Shown:
    """The settings with a style of their own, best first, and the others."""

    styled: tuple[Group, ...]
    grey: tuple[Group, ...]


def shown(family: Family) -> Shown:
    """All settings of few; of many the choice, then those of the Pareto set of validation, then of test means."""
    drawn = [g for g in family.groups if g.runs]
    if len(drawn) > SERIES:
        order = [*family.ranked[:1], *sorted(family.best_validation), *sorted(family.best_test), *family.ranked]
        first = list(dict.fromkeys(order))[:SERIES]
        styled = tuple(family.of(i) for i in first)
    else:
        styled = tuple(sorted(drawn, key=lambda g: g.index != family.choice))
    return Shown(styled, tuple(g for g in drawn if g not in styled))


def settings_chart(family: Family, split: Split, size: tuple[float, float], uid: str) -> Raw:
    """Each setting's mean goal figure (across) and worst kept share (up), bars of 95 % intervals over runs."""
    what, frame = shown(family), _frame(size)
    pairs = {g.index: family.pair(g, split) for g in (*what.styled, *what.grey)}
    x, y = _scales(family, list(pairs.values()), frame)
    drawn = [*_bound(family, y, frame), *grid(x, y, frame, lambda v: f"{100 * v:.4g} %"), *_titles(family, frame, size)]
    best = family.best_test if split == "test" else family.best_validation
    drawn.append(_staircase(family, best, pairs, x, y, frame))
    for group in what.grey:
        if spot := _at(pairs[group.index], x, y):
            name = "dot pareto" if group.index in best else "dot other"
            name += "" if group.index in family.compared else " apart"
            drawn.append(_named(family, group, pairs[group.index], marker(0, *spot, 3.2, name)))
    for i, group in enumerate(what.styled):
        pair = pairs[group.index]
        if spot := _at(pair, x, y):
            ring = el("circle", class_="ring", cx=spot[0], cy=spot[1], r=9) if group.index == family.choice else None
            style = f"s{i % SERIES}" + ("" if group.index in family.compared else " apart")
            bars = el("path", class_=f"whisker s{i % SERIES}", d=_bars(pair, x, y)) if _bars(pair, x, y) else None
            dot = marker(_MARKERS[i % SERIES], *spot, 5, f"dot {style}")
            drawn.append(_named(family, group, pair, el("g", bars, ring, dot)))
    described = "; ".join(_said(family, g, pairs[g.index]) for g in what.styled)
    return svg(f"Settings on {split} means", described or "No points.", size, uid, drawn)


def frontiers_chart(family: Family, size: tuple[float, float], uid: str) -> Raw:
    """Mean goal figure against mean worst kept share on validation items as the coefficient grows, a line a setting."""
    what, frame = shown(family), _frame(size)
    lines = {g.index: [s for s in g.frontier if _both(s.two)] for g in (*what.styled, *what.grey)}
    x, y = _scales(family, [s.two for steps in lines.values() for s in steps], frame)
    drawn = [*_bound(family, y, frame), *grid(x, y, frame, lambda v: f"{100 * v:.4g} %"), *_titles(family, frame, size)]
    grey = [[_at(s.two, x, y) or (0, 0) for s in lines[g.index]] for g in what.grey]
    if grey:
        pieces = ("M" + "L".join(f"{px:.0f} {py:.0f}" for px, py in line) for line in grey if len(line) > 1)
        drawn.append(el("path", class_="line other", d="".join(pieces)))
    spots: list[tuple[float, float]] = []
    for i, group in reversed(list(enumerate(what.styled))):  # the best on top
        steps, style = lines[group.index], i % SERIES
        here = [(_at(s.two, x, y) or (0, 0)) for s in steps]
        drawn.append(path(here, f"line s{style}{' chosen' if group.index == family.choice else ''}", _DASHES[style]))
        for step, (px, py) in zip(steps, here, strict=True):
            kind = CROSS if step.collapsed else _MARKERS[style]
            hollow = "" if step.within == len(group.runs) else " apart"
            said = f"{group_label(family, group)}, λ = {coefficient(step.coefficient)}: {_numbers(step.two)}"
            said += f"; within the bound in {step.within} of {len(group.runs)}" + (
                f"; collapsed in {step.collapsed}" if step.collapsed else ""
            )
            drawn.append(el("g", el("title", said), marker(kind, px, py, 3.6, f"dot s{style}{hollow}")))
        spots += here
    drawn += _lambdas(what, lines, x, y, spots, frame)
    described = "; ".join(f"{group_label(family, g)}: {_steps(lines[g.index])}" for g in what.styled)
    return svg("Forgetting against keeping as the coefficient grows", described or "No points.", size, uid, drawn)


def legend(family: Family, frontier: bool) -> Raw:
    """What the marks of both drawings mean, as a list that wraps."""
    what, items = shown(family), []
    for i, group in enumerate(what.styled):
        style = i % SERIES
        line = el("path", class_=f"line s{style}", d="M1 7H27", stroke_dasharray=_DASHES[style]) if frontier else None
        ring = el("circle", class_="ring", cx=14, cy=7, r=6.2) if group.index == family.choice else None
        label = group_label(family, group) + (" (choice)" if group.index == family.choice else "")
        items.append((_key(line, marker(_MARKERS[style], 14, 7, 3.6, f"dot s{style}"), ring), label))
    if what.grey:
        mark = el("path", class_="line other", d="M1 7H27") if frontier else marker(0, 14, 7, 3.2, "dot other")
        items.append((_key(mark), f"{len(what.grey)} others"))
    if frontier:
        items.append((_key(marker(0, 14, 7, 3.6, "dot ink apart")), "hollow: bound broken in a run"))
        items.append((_key(marker(CROSS, 14, 7, 3.6, "dot ink")), "predictions collapsed in a run"))
    else:
        if set(family.best_test | family.best_validation) & {g.index for g in what.grey}:
            items.append((_key(marker(0, 14, 7, 3.2, "dot pareto")), "further settings of the Pareto set"))
        if max(len(family.best_test), len(family.best_validation)) > 1:
            items.append((_key(el("path", class_="line stairs", d="M1 11H14V3H27")), "edge of the Pareto set"))
        bars = el("path", class_="whisker ink", d="M2 7H26M2 4v6M26 4v6")
        items.append((_key(bars), "95 % interval of the mean over runs, cut at the picture's edge"))
        if any(g.index not in family.compared for g in (*what.styled, *what.grey)):
            items.append((_key(marker(0, 14, 7, 3.6, "dot ink apart")), "hollow: other seeds, not compared"))
    return el("ul", [el("li", icon, " ", el("span", name, dir="auto")) for icon, name in items], class_="legend")


def forest(spread: Spread, values: Sequence[float | None], low: float, high: float) -> Raw:
    """A mean with its interval and the runs as dots, on an axis from ``low`` to ``high``; for a table's cell."""
    x = Scale("linear", low, high if high > low else low + 1, 5, 115)
    known = [v for v in values if v is not None and math.isfinite(v)]
    dots = [el("circle", class_="dot run", cx=x(v), cy=8, r=2.6) for v in known]
    drawn: list[Raw | None] = [el("line", class_="grid", x1=5, x2=115, y1=8, y2=8)]
    if spread.mean is not None:
        if spread.half is not None:
            ends = x(spread.mean - spread.half), x(spread.mean + spread.half)
            d = f"M{ends[0]:.1f} 8H{ends[1]:.1f}" + "".join(f"M{end:.1f} 5v6" for end in ends)
            drawn.append(el("path", class_="whisker ink", d=d))
        drawn.append(el("line", class_="mean", x1=x(spread.mean), x2=x(spread.mean), y1=2, y2=14))
    said = f"{len(known)} runs, mean {with_half(spread)}"
    return el("svg", drawn, dots, class_="forest", viewBox="0 0 120 16", width=120, height=16, role="img",
              aria_label=said)  # fmt: skip


def _frame(size: tuple[float, float]) -> Frame:
    return 50.0, 30.0, size[0] - 14, size[1] - 48


def _scales(family: Family, pairs: Sequence[Pair], frame: Frame) -> tuple[Scale, Scale]:
    across = [p.goal.mean for p in pairs if p.goal.mean is not None]
    x = scale_for(across, frame[0] + 12, frame[2] - 12, unit=False)
    if x.kind == "linear" and across and min(across) >= 0 and max(across) <= 1:
        x = Scale("linear", max(0.0, x.lo), min(1.0, x.hi), x.start, x.stop)
    keep = _keep(family)
    up = [*(p.kept.mean for p in pairs if p.kept.mean is not None), 1.0, *([keep] if keep is not None else [])]
    lo, hi = max(min(up), 0.0), min(max(up), TOP)
    room = max(0.08 * (hi - lo), 0.012)
    return x, Scale("linear", max(lo - room, 0.0), hi + room, frame[3], frame[1])


def _keep(family: Family) -> float | None:
    """The bound, where all runs have the same."""
    found = {r.report.chosen.keep for g in family.groups for r in g.runs}
    return found.pop() if len(found) == 1 else None


def _bound(family: Family, y: Scale, frame: Frame) -> list[Raw]:
    keep = _keep(family)
    if keep is None:
        return []
    at = y(keep)
    return [
        el("rect", class_="allowed", x=frame[0], y=frame[1], width=frame[2] - frame[0], height=max(at - frame[1], 0)),
        el("line", class_="bound", x1=frame[0], x2=frame[2], y1=at, y2=at),
        el("text", f"bound {percent(keep)}", class_="bound-text", x=frame[2] - 4, y=at + 13, text_anchor="end"),
    ]


def _titles(family: Family, frame: Frame, size: tuple[float, float]) -> list[Raw]:
    yard = family.yardstick
    name = yard.label if yard else ""
    role = yard.roles if yard else "forget"
    down = yard is None or yard.sign > 0
    hint = f"← better ({role})" if down else f"better ({role}) →"
    room = int((frame[2] - frame[0] + 24) / 6.8) - len(hint) - 3
    name = name if len(name) <= room else f"{name[: max(room - 1, 1)]}…"
    return [
        axis_title(f"{name}   {hint}", (frame[0] + frame[2]) / 2, size[1] - 8),
        axis_title("kept at worst: share of the score before", 4, 15, "start"),
    ]


def _both(pair: Pair) -> bool:
    return pair.goal.mean is not None and pair.kept.mean is not None


def _at(pair: Pair, x: Scale, y: Scale) -> tuple[float, float] | None:
    if pair.goal.mean is None or pair.kept.mean is None:
        return None
    return x(pair.goal.mean), y(pair.kept.mean)


def _bars(pair: Pair, x: Scale, y: Scale) -> str:
    """Path data of the two intervals; those that leave the picture end at its edge."""
    spot, d = _at(pair, x, y), ""
    if spot is None or pair.goal.mean is None or pair.kept.mean is None:
        return d
    if half := pair.goal.half:
        left, right = x(pair.goal.mean - half), x(pair.goal.mean + half)
        d += f"M{left:.1f} {spot[1]:.1f}H{right:.1f}"
        d += "".join(f"M{end:.1f} {spot[1] - _WHISKERS:.1f}v{2 * _WHISKERS}" for end in (left, right))
    if half := pair.kept.half:
        low, high = y(pair.kept.mean - half), y(pair.kept.mean + half)
        d += f"M{spot[0]:.1f} {low:.1f}V{high:.1f}"
        d += "".join(f"M{spot[0] - _WHISKERS:.1f} {end:.1f}h{2 * _WHISKERS}" for end in (low, high))
    return d


def _staircase(
    family: Family, best: frozenset[int], pairs: dict[int, Pair], x: Scale, y: Scale, frame: Frame
) -> Raw | None:
    """The edge of what the Pareto set beats: from the better side down and across."""
    down = family.yardstick is None or family.yardstick.sign > 0
    spots = sorted({s for i in best if i in pairs and (s := _at(pairs[i], x, y))}, reverse=not down)
    if len(spots) < 2:
        return None
    d = f"M{spots[0][0]:.1f} {spots[0][1]:.1f}"
    for px, py in spots[1:]:
        d += f"H{px:.1f}V{py:.1f}"
    return el("path", class_="line stairs", d=d)


def _named(family: Family, group: Group, pair: Pair, drawn: Raw) -> Raw:
    return el("g", el("title", _said(family, group, pair)), drawn)


def _said(family: Family, group: Group, pair: Pair) -> str:
    return f"{group_label(family, group)}: {_numbers(pair)} (n = {pair.goal.n})"


def _numbers(pair: Pair) -> str:
    return f"{with_half(pair.goal)}, kept {share_with_half(pair.kept)}"


def _steps(steps: Sequence[Step]) -> str:
    return ", ".join(f"λ {coefficient(s.coefficient)} {_numbers(s.two)}" for s in steps) or "no common λ"


def _lambdas(
    what: Shown,
    lines: dict[int, list[Step]],
    x: Scale,
    y: Scale,
    spots: Sequence[tuple[float, float]],
    frame: Frame,
) -> list[Raw]:
    """Coefficients beside the points of the first setting, where there is room."""
    if not what.styled:
        return []
    steps = lines[what.styled[0].index]
    here = [_at(s.two, x, y) or (0.0, 0.0) for s in steps]
    words = [f"λ = {coefficient(s.coefficient)}" if not i else coefficient(s.coefficient) for i, s in enumerate(steps)]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in spots]
    taken += [(px - 1.5, py - 1.5, px + 1.5, py + 1.5) for px, py in along(here)]
    anchors = [(px, py, 7.2 * len(w) + 4) for w, (px, py) in zip(words, here, strict=True)]
    found = zip(words, place(anchors, taken, frame), strict=True)
    return [el("text", w, class_="label", x=at[0], y=at[1] + 4, text_anchor="middle") for w, at in found if at]


def _key(*shapes: Raw | None) -> Raw:
    return el("svg", shapes, viewBox="0 0 28 14", width=28, height=14, aria_hidden="true")
