"""The table of the methods' benchmark: means over pairs and seeds, with intervals, and which goals were reached."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from measure import console
from methods_pairs import DEVELOPED_ON, PAIRS
from rich.table import Table

Row = Mapping[str, Any]
LEAST = 0.05  # nats; see methods.py
PLAIN = "negate"  # what the others are compared with, cell by cell
GOALS = {"selectivity": 20.0, "forget": 0.35, "kept": 0.95, "general": 0.05}
CHOICES = ("capitals", "currencies")  # pairs of which the goal for what is left is an accuracy of four choices


def show(rows: Sequence[Row]) -> None:
    """Print everything; methods in falling order of the area under their frontier."""
    methods = sorted({r["method"] for r in rows}, key=lambda m: -statistics.mean(_over(rows, m)))
    pairs = [p for p in PAIRS if any(r["pair"] == p for r in rows)]
    table = Table("method", title="kept ≥ 95 % on validation items; test items unless said otherwise")
    for pair in pairs:
        table.add_column(f"{pair}: left", justify="right")
    scores = ("share left at ≥ 90 %", "kept", "general nats", "selectivity", "area (validation)", f"over {PLAIN}")
    for name in (*scores, "nothing passed", "cells", "s"):
        table.add_column(name, justify="right")
    for method in methods:
        table.add_row(method, *_cells(rows, method, pairs))
    console.print(table)
    before = {p: _mean([r for r in rows if r["pair"] == p], lambda r: r["forget_before"]) for p in pairs}
    console.print("before: " + ", ".join(f"{p} {v:.3f}" for p, v in before.items()))
    cells = {(r["pair"], r["seed"]) for r in rows}
    console.print(f"{len(cells)} cells (pair, seed); hyperparameters were chosen on {DEVELOPED_ON}, seed 0")
    for method in methods:
        if reached := _reached(_of(rows, method, 0.95), _units(rows)):
            console.print(f"goals reached by {method}: {', '.join(reached)}")


def markdown(rows: Sequence[Row]) -> str:
    """README's table: methods in falling order of area over plain negation."""
    methods = sorted({r["method"] for r in rows}, key=lambda m: -statistics.mean(_over(rows, m)))
    pairs = [p for p in PAIRS if any(r["pair"] == p for r in rows)]
    head = ["method", *pairs, "kept", "general, nats", "selectivity", "area", f"over `{PLAIN}`", "none passed", "s"]
    before = [f"{_mean([r for r in rows if r['pair'] == p], lambda r: r['forget_before']):.2f}" for p in pairs]
    lines = [head, ["---"] * len(head), ["before", *before, "1", "0", *[""] * 5]]
    for method in methods:
        strict = _of(rows, method, 0.95)
        left = [[r["forget_after"] for r in strict if r["pair"] == pair] for pair in pairs]
        low, middle, high = selectivity(strict, _units(rows))
        lines.append(
            [
                f"`{method}`",
                *(f"{statistics.mean(v):.2f} ({len(v)})" if v else "" for v in left),
                f"{_mean(strict, lambda r: r['kept_after'] / r['kept_before']):.2f}",
                f"{_mean(strict, lambda r: r['general_nats']):+.2f}",
                f"{middle:.1f} ({low:.1f}–{high:.1f})",
                _with_interval([r["area"] for r in strict], 2),
                "" if method == PLAIN else _with_interval(_over(rows, method), 2, "+"),
                f"{sum(r['coefficient'] == 0 for r in strict)} of {len(strict)}",
                f"{_mean(strict, lambda r: r['seconds']):.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(rows: Sequence[Row], method: str, pairs: Sequence[str]) -> list[str]:
    strict, loose = _of(rows, method, 0.95), _of(rows, method, 0.9)
    found = []
    for pair in pairs:
        here = [r["forget_after"] for r in strict if r["pair"] == pair]
        found.append(_with_interval(here) if here else "-")
    low, middle, high = selectivity(strict, _units(rows))
    return [
        *found,
        f"{_mean(loose, lambda r: r['forget_after'] / r['forget_before']):.3f}",
        f"{_mean(strict, lambda r: r['kept_after'] / r['kept_before']):.3f}",
        f"{_mean(strict, lambda r: r['general_nats']):+.2f}",
        f"{middle:.1f} ({low:.1f}–{high:.1f})",
        _with_interval([r["area"] for r in strict]),
        _with_interval(_over(rows, method), sign="+"),
        str(sum(r["coefficient"] == 0 for r in strict)),
        str(len(strict)),
        f"{_mean(strict, lambda r: r['seconds']):.0f}",
    ]


def selectivity(rows: Sequence[Row], units: Mapping[str, float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean nats the forget set lost over mean nats the neighbours lost: 95 % bootstrap over cells, and the value.

    Nats are per answer in some pairs and per token in others, so each is counted in its pair's unit.
    """

    def ratio(some: Sequence[Row]) -> float:
        lost, paid = ([r[key] / units[r["pair"]] for r in some] for key in ("forget_nats", "kept_nats"))
        return statistics.mean(lost) / max(statistics.mean(paid), _mean(some, lambda r: LEAST / units[r["pair"]]))

    draw = random.Random(0)
    found = sorted(ratio([draw.choice(rows) for _ in rows]) for _ in range(draws))
    return found[int(0.025 * draws)], ratio(rows), found[int(0.975 * draws)]


def _units(rows: Sequence[Row]) -> dict[str, float]:
    """Of each pair, the nats that its forget set lost on average over all methods."""
    pairs = dict.fromkeys(r["pair"] for r in rows)
    return {pair: _mean([r for r in rows if r["pair"] == pair], lambda r: r["forget_nats"]) for pair in pairs}


def _reached(rows: Sequence[Row], units: Mapping[str, float]) -> list[str]:
    means = {
        "selectivity": selectivity(rows, units)[1],
        "forget": _mean([r for r in rows if r["pair"] in CHOICES] or rows, lambda r: r["forget_after"]),
        "kept": _mean(rows, lambda r: r["kept_after"] / r["kept_before"]),
        "general": _mean(rows, lambda r: r["general_nats"]),
    }
    if means["forget"] >= statistics.mean(r["forget_before"] for r in rows) - 1e-9:
        return []  # whoever changes nothing keeps everything
    low = ("forget", "general")
    return [k for k, goal in GOALS.items() if (means[k] <= goal if k in low else means[k] >= goal)]


def _of(rows: Sequence[Row], method: str, bound: float) -> list[Row]:
    return [r for r in rows if r["method"] == method and r["kept_bound"] == bound]


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.mean(value(r) for r in rows)


def _over(rows: Sequence[Row], method: str) -> list[float]:
    """By how much the area is larger than that of plain negation in the same cell."""
    plain = {(r["pair"], r["seed"]): r["area"] for r in _of(rows, PLAIN, 0.95)}
    return [r["area"] - plain[r["pair"], r["seed"]] for r in _of(rows, method, 0.95) if (r["pair"], r["seed"]) in plain]


def _with_interval(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± half of a 95 % normal interval."""
    middle = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {1.96 * statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
