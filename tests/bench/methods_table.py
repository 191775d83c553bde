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
AT_MOST = {"forget": 0.35, "acc_pmi": 0.4, "pmi": 0.2, "general": 0.05}  # goals; pmi is the share that is left
AT_LEAST = {"kept": 0.95, "kept_pmi": 0.95, "selectivity": 10.0}
CHOICES = ("capitals", "currencies", "authors")  # pairs whose goals for what is left are accuracies of four choices


def show(rows: Sequence[Row]) -> None:
    """Print everything."""
    rows = _floored(rows)
    head, *lines = _lines(rows)
    table = Table(title="kept ≥ 95 % on validation items; test items unless said otherwise")
    for name in head:
        table.add_column(name, justify="right" if table.columns else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table, crop=False)
    cells = {(r["pair"], r["seed"]) for r in rows}
    console.print(f"{len(cells)} cells (pair, seed); hyperparameters were chosen on {DEVELOPED_ON}, seed 0")
    for line in lines[1:]:
        of = [r for r in rows if r["method"] == line[0]]
        means, reached = _means(of, _units(_in_pmi(rows))), _reached(of, _units(_in_pmi(rows)))
        told = (f"{name} {value:.2f}{'' if name in reached else '!'}" for name, value in means.items())
        console.print(f"{line[0]}: {', '.join(told)}")
    console.print(f"! misses its goal: at most {AT_MOST}, at least {AT_LEAST}")


def markdown(rows: Sequence[Row]) -> str:
    """The same as a page's table."""
    head, *lines = _lines(_floored(rows))
    quoted = [[line[0] if line[0] == "before" else f"`{line[0]}`", *line[1:]] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *quoted))


def _floored(rows: Sequence[Row]) -> list[Row]:
    """An answer that is less likely after its own prompt than after others: nothing is left, and not less than that."""
    return [{**r, "pmi_after": max(r["pmi_after"], 0.0)} for r in rows]


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    """Head, scores before, and the methods in falling order of the area over plain negation's."""
    areas = {m: _over(rows, m) for m in {r["method"] for r in rows}}
    methods = sorted(areas, key=lambda m: statistics.mean(areas[m] or [-1.0]), reverse=True)
    pairs = [p for p in PAIRS if any(r["pair"] == p for r in rows)]
    scores = ["`acc_pmi`", "pmi left", "kept", "kept pmi", "general, nats", "pmi lost : kept", "area"]
    units = _units(_in_pmi(rows))
    before = [f"{_mean([r for r in rows if r['pair'] == p], lambda r: r['forget_before']):.2f}" for p in pairs]
    first = ["before", *before, _number(_choices(rows), "acc_pmi_before"), "1", "1", "1", "0", *[""] * 5]
    found = [["method", *pairs, *scores, f"over `{PLAIN}`", "none passed", "s"], first]
    for method in methods:
        of = [r for r in rows if r["method"] == method]
        left = [[r["forget_after"] for r in of if r["pair"] == pair] for pair in pairs]
        low, middle, high = selectivity(_in_pmi(of), units)
        line = [method, *(f"{statistics.mean(v):.2f} ({len(v)})" if v else "" for v in left)]
        line += [_number(_choices(of), "acc_pmi_after"), _with_interval([r["pmi_after"] / r["pmi_before"] for r in of])]
        line += [f"{_kept(of, 'kept'):.2f}", f"{_kept(of, 'kept_pmi'):.2f}"]
        line += [f"{_mean(of, lambda r: r['general_nats']):+.2f}", f"{middle:.1f} ({low:.1f}–{high:.1f})"]
        line += [_with_interval([r["area"] for r in of])]
        line += ["" if method == PLAIN or not areas[method] else _with_interval(areas[method], "+")]
        line += [f"{sum(r['coefficient'] == 0 for r in of)} of {len(of)}", f"{_mean(of, lambda r: r['seconds']):.0f}"]
        found.append(line)
    return found


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


def _in_pmi(rows: Sequence[Row]) -> list[Row]:
    """The rows with nats of pointwise information in place of those of log-probability."""
    lost = {"forget_nats": "pmi", "kept_nats": "kept_pmi"}
    return [{**r, **{nats: r[f"{pmi}_before"] - r[f"{pmi}_after"] for nats, pmi in lost.items()}} for r in rows]


def _units(rows: Sequence[Row]) -> dict[str, float]:
    """Of each pair, the nats that its forget set lost on average over all methods."""
    pairs = dict.fromkeys(r["pair"] for r in rows)
    return {p: max(LEAST, _mean([r for r in rows if r["pair"] == p], lambda r: r["forget_nats"])) for p in pairs}


def _means(rows: Sequence[Row], units: Mapping[str, float]) -> dict[str, float]:
    """What there are goals for; without choices no accuracies."""
    found = {
        "pmi": _kept(rows, "pmi"),
        "kept": _kept(rows, "kept"),
        "kept_pmi": _kept(rows, "kept_pmi"),
        "general": _mean(rows, lambda r: r["general_nats"]),
        "selectivity": selectivity(_in_pmi(rows), units)[1],
    }
    choices = _choices(rows)
    if choices:
        found |= {"forget": _mean(choices, lambda r: r["forget_after"])}
        found |= {"acc_pmi": _mean(choices, lambda r: r["acc_pmi_after"])}
    return found


def _reached(rows: Sequence[Row], units: Mapping[str, float]) -> list[str]:
    if all(r["forget_after"] >= r["forget_before"] - 1e-9 for r in rows):
        return []  # whoever changes nothing keeps everything
    means = _means(rows, units)
    return [k for k, v in means.items() if (v <= AT_MOST[k] if k in AT_MOST else v >= AT_LEAST[k])]


def _choices(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["pair"] in CHOICES]


def _kept(rows: Sequence[Row], key: str) -> float:
    """The mean share that is left of a score."""
    return _mean(rows, lambda r: r[f"{key}_after"] / r[f"{key}_before"])


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.mean(value(r) for r in rows)


def _number(rows: Sequence[Row], key: str) -> str:
    return _with_interval([r[key] for r in rows]) if rows else ""


def _over(rows: Sequence[Row], method: str) -> list[float]:
    """By how much the area is larger than that of plain negation in the same cell."""
    plain = {(r["pair"], r["seed"]): r["area"] for r in rows if r["method"] == PLAIN}
    return [r["area"] - plain[c] for r in rows if r["method"] == method and (c := (r["pair"], r["seed"])) in plain]


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    """Mean ± half of a 95 % normal interval, which two values are too few for."""
    middle = f"{statistics.mean(values):{sign}.2f}"
    if len(values) < 3:
        return middle
    return f"{middle} ± {1.96 * statistics.stdev(values) / len(values) ** 0.5:.2f}"
