"""Numbers to pixels: scales, ticks and label placement. Pure functions, no markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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
