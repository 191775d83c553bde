"""Whether the roads of ``sweep_peers.py`` lead to the same scores, and what each costs: a table, and JSON."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from measure import console, environment, items_of
from rich.table import Table

GOAL = 6.0
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Ran:
    """A process that has ended: seconds from start to end, most memory, what it printed."""

    seconds: float
    peak: int
    output: str


@dataclass
class Road:
    """One slow road at the measured coefficients."""

    name: str
    merging: list[Ran] = field(default_factory=list)
    scoring: list[Ran] = field(default_factory=list)
    items: dict[float, dict[str, list[Any]]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Per coefficient, on average."""
        return statistics.mean(m.seconds + s.seconds for m, s in zip(self.merging, self.scoring, strict=True))

    @property
    def peak(self) -> int:
        """Largest of all its processes."""
        return max(r.peak for r in (*self.merging, *self.scoring))


def agreement(road: Road, points: Sequence[Mapping[str, Any]], tasks: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Largest difference to ours: of a log-likelihood, and of a metric's mean over a set."""
    likelihood = metric = 0.0
    by_coefficient = {point["coefficient"]: point["items"] for point in points}
    for coefficient, found in road.items.items():
        ours = by_coefficient[coefficient]
        for task, samples in _split(found, ours, tasks).items():
            theirs = [items_of(sample) for sample in samples]
            for mine, other in zip(ours[task], theirs, strict=True):
                pairs = zip(mine["likelihoods"], other["likelihoods"], strict=True)
                likelihood = max(likelihood, *(abs(a - b) for a, b in pairs))
            for name in ours[task][0]["metrics"]:
                a, b = (statistics.mean(row["metrics"][name] for row in rows) for rows in (ours[task], theirs))
                metric = max(metric, abs(a - b))
    return {"log-likelihood": likelihood, "metric": metric}


def _split(
    found: Mapping[str, list[Any]], ours: Mapping[str, list[Any]], tasks: Mapping[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """lm-eval's samples by our task; it was given all sets of one kind in one file, in the order of the sets."""
    parts: dict[str, list[Any]] = {}
    for task, samples in found.items():
        _, kind, *suffix = task.split("_")  # unlearn_text_memory is our forget.books.memory
        ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
        for name in (".".join([name, *suffix]) for name in tasks[kind]):
            parts[name], ordered = ordered[: len(ours[name])], ordered[len(ours[name]) :]
    return parts


def show(
    ran: Ran,
    ours: Mapping[str, Any],
    roads: Sequence[Road],
    agreements: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    number = options.coefficients
    table = Table("road", title=f"Scores at {number} coefficients")
    for name in ("merge s", "score s", "whole sweep s", "times ours", "peak MB", "max |Δ| log-lik.", "max |Δ| metric"):
        table.add_column(name, justify="right")
    scoring = [point["score_seconds"] for point in ours["points"]]
    on = [point["set_seconds"] for point in ours["points"]]
    each = f"{statistics.median(on):.3f}", f"{statistics.median(scoring):.2f}"
    table.add_row("ours", *each, f"{ran.seconds:.1f}", "1", f"{ran.peak / 1e6:,.0f}", "-", "-")
    for road in roads:
        merging = statistics.mean(r.seconds for r in road.merging)
        scored = statistics.mean(r.seconds for r in road.scoring)
        whole, found = road.seconds * number, agreements[road.name]
        cells = (
            f"{merging:.2f}",
            f"{scored:.2f}",
            f"{whole:.1f}",
            f"{whole / ran.seconds:.2f}",
            f"{road.peak / 1e6:,.0f}",
        )
        table.add_row(road.name, *cells, f"{found['log-likelihood']:.1e}", f"{found['metric']:.1e}")
    console.print(table)
    if (measured := len(roads[0].scoring)) < number:
        console.print(f"The slow roads were measured at {measured} of {number} coefficients and scaled to all.")
    console.print(f"Goal: mergekit + lm_eval takes ≥ {GOAL:g} times as long as ours. Batch size {options.batch_size}.")
    console.print(f"ours: {ours['load_seconds']:.2f} s until the model is loaded and the requests can be built, once")
    share = statistics.median(a / b for a, b in zip(on, scoring, strict=True))
    off = ours["off_seconds"]
    console.print(
        f"vector on: {statistics.median(on) * 1e3:.1f} ms, off: {off * 1e3:.1f} ms; on takes {share:.2%} of that "
        "coefficient's scoring time (goal: < 1 %)"
    )
    sizes = {name: f"{size / 1e6:,.1f} MB" for name, size in facts["memory"].items()}
    console.print(
        f"memory: model {sizes['model']}; an edit added {sizes['edit']} (factors {sizes['factors']}, weights they "
        f"change {sizes['touched']})"
    )
    worst = max(largest for found in agreements.values() for largest in found.values())
    verdict = "All roads agree" if worst <= TOLERANCE else f"THE ROADS DIFFER by {worst:.1e}"
    console.print(f"{verdict}; from the first coefficient to the last a log-likelihood moved by {_moved(ours):.1e}")


def _moved(ours: Mapping[str, Any]) -> float:
    """Largest change over the sweep: agreement says little where nothing changes."""
    first, last = (
        [value for rows in ours["points"][at]["items"].values() for row in rows for value in row["likelihoods"]]
        for at in (0, -1)
    )
    return max(abs(a - b) for a, b in zip(first, last, strict=True))


def to_json(
    ran: Ran,
    ours: Mapping[str, Any],
    roads: Sequence[Road],
    agreements: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    points = [{name: value for name, value in point.items() if name != "items"} for point in ours["points"]]
    return {
        "coefficients": options.coefficients,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "ours": {**ours, "points": points, "seconds": ran.seconds, "peak_bytes": ran.peak},
        "roads": {
            road.name: {
                "coefficients": list(road.items),
                "merge_s": [r.seconds for r in road.merging],
                "score_s": [r.seconds for r in road.scoring],
                "whole_sweep_s": road.seconds * options.coefficients,
                "ratio": road.seconds * options.coefficients / ran.seconds,
                "peak_bytes": road.peak,
                "largest_difference": dict(agreements[road.name]),
            }
            for road in roads
        },
        "facts": {name: value for name, value in facts.items() if name != "model"},
        "environment": environment(),
    }
