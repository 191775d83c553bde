"""``python -m unlearn.cluster.report DIR``: one report over all jobs of a grid, whatever became of some of them.

Writes ``report.json`` (every figure), ``report.html`` (to look at), ``jobs.csv`` and ``frontier.csv`` into the grid's
folder, each whole or not at all. Nothing here changes a job's own folder, so it may be run while jobs are at work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unlearn import console
from unlearn.cluster.compare import compare
from unlearn.cluster.csv import frontier_csv, jobs_csv
from unlearn.cluster.grid import Grid
from unlearn.cluster.groups import Family, Group, Pair, ScoreLine, families_of, groups_of
from unlearn.cluster.page import render_grid
from unlearn.cluster.runs import Missing, Run, read_runs
from unlearn.cluster.words import (
    DESCRIPTION,
    MEAN_OF_ALL,
    NO_RUN,
    OVER_RUNS,
    PARETO_RULE,
    Merged,
    choice_lines,
    family_label,
    group_label,
    headline,
    missing_lines,
)
from unlearn.errors import UnlearnError
from unlearn.store.files import write_json_atomic, write_text_atomic
from unlearn.text import one_line

SCHEMA = 1
EXIT_NOTHING = 1  # there is a report, and it says that there is nothing to compare
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


def write(root: Path) -> Path:
    """Merge the reports of a grid's jobs.

    Args:
        root: the grid's folder.

    Returns:
        The page, ``report.html``; ``report.json``, ``jobs.csv`` and ``frontier.csv`` lie beside it.

    Raises:
        GridError: ``root`` is not a grid's folder, or its ``grid.json`` is damaged.
        RunFolderError: the place cannot be written, or is full.
    """
    return write_merged(root, merge(root))


def merge(root: Path) -> Merged:
    """Read what the jobs left and compare it; writes nothing.

    Raises:
        GridError: ``root`` is not a grid's folder, or its ``grid.json`` is damaged.
    """
    grid = Grid.load(root)
    runs: list[Run] = []
    missing: list[Missing] = []
    for found in read_runs(root, grid):
        if isinstance(found, Run):
            runs.append(found)
        else:
            missing.append(found)
    compared = compare(runs)
    groups = groups_of(grid, compared, missing)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Merged(grid, compared, tuple(missing), groups, families_of(groups), now)


def write_merged(root: Path, merged: Merged) -> Path:
    """Write the four files; the page last, since it points to the others."""
    write_text_atomic(root / "jobs.csv", jobs_csv(merged.grid, merged.compared, merged.missing))
    write_text_atomic(root / "frontier.csv", frontier_csv(merged.grid, merged.compared))
    write_json_atomic(root / "report.json", to_json(merged))
    write_text_atomic(root / "report.html", render_grid(merged))
    return root / "report.html"


def to_json(merged: Merged) -> dict[str, Any]:
    """Every figure of the merged report as plain JSON types; what is missing is null."""
    family_of = {g.index: number for number, f in enumerate(merged.families) for g in f.groups}
    return {
        "schema": SCHEMA,
        "name": merged.grid.name,
        "written": merged.written,
        "headline": headline(merged),
        "jobs": {
            "planned": len(merged.grid.jobs),
            "finished": merged.finished,
            "set_aside": len(merged.compared.aside),
            "missing": len(merged.missing),
        },
        "axes": {a.key: list(a.values) for a in merged.grid.axes},
        "definitions": {
            "interval": OVER_RUNS,
            "pareto": PARETO_RULE,
            "choice": DESCRIPTION,
            "means": MEAN_OF_ALL,
        },
        "warnings": [*missing_lines(merged), *merged.compared.warnings],
        "comparisons": [_family_json(f) for f in merged.families],
        "settings": [_group_json(merged.families[family_of[g.index]], g, family_of[g.index]) for g in merged.groups],
        "missing": [{"job": m.job.name, "why": m.why, "said": m.detail} for m in merged.missing],
        "set_aside": [{"job": run.job.name, "why": why} for run, why in merged.compared.aside],
    }


def _family_json(family: Family) -> dict[str, Any]:
    yard, lead = family.yardstick, family.lead()
    return {
        "name": family_label(family),
        "question": dict(family.question),
        "goal": None if yard is None else {"label": yard.label, "better": "lower" if yard.sign > 0 else "higher"},
        "goals": [] if yard is None else [list(key) for key, _ in yard.goals],
        "kept": [] if yard is None else [list(key) for key in yard.kept],
        "settings": [g.index for g in family.groups],
        "seeds_compared": list(family.seeds),
        "compared": sorted(family.compared),
        "pareto_test": sorted(family.best_test),
        "pareto_validation": sorted(family.best_validation),
        "ranked_on_validation": list(family.ranked),
        "choice": family.choice,
        "lead_over_second": None if lead is None else asdict(lead),
        "remarks": list(choice_lines(family)),
    }


def _group_json(family: Family, group: Group, number: int) -> dict[str, Any]:
    return {
        "index": group.index,
        "comparison": number,
        "recipe": group.name,
        "label": group_label(family, group),
        "settings": dict(group.settings),
        "planned": len(group.planned),
        "runs": [_run_json(r, group.sign) for r in group.runs],
        "seeds_lacking": [s for s in family.seeds if s not in group.seeds],
        "bound_met": sum(r.report.chosen.bound_met for r in group.runs),
        "bound_met_on_test": sum(r.met_on_test for r in group.runs),
        "goal_before": asdict(group.before()),
        "test": _pair_json(group.pair("test")),
        "validation": _pair_json(group.pair("validation")),
        "on_compared_seeds": None
        if group.index not in family.compared
        else {
            "goal_before": asdict(family.before(group)),
            "test": _pair_json(family.pair(group, "test")),
            "validation": _pair_json(family.pair(group, "validation")),
        },
        "scores": [_score_json(line) for line in group.scores()],
        "frontier": [
            {"lambda": s.coefficient, **_pair_json(s.two), "within_bound": s.within, "collapsed": s.collapsed}
            for s in group.frontier
        ],
        "notes": list(group.notes),
    }


def _run_json(run: Run, sign: int) -> dict[str, Any]:
    after = None if run.after is None else sign * run.after
    return {
        "job": run.job.name,
        "seed": run.seed or None,
        "lambda": run.report.chosen.coefficient,
        "bound_met": run.report.chosen.bound_met,
        "bound_met_on_test": run.met_on_test,
        "goal_after": after,
        "kept_worst": run.kept,
        "seconds": run.seconds,
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {"goal": asdict(pair.goal), "kept_worst": asdict(pair.kept)}


def _score_json(line: ScoreLine) -> dict[str, Any]:
    role, name, metric = line.key
    return {
        **{"set": role, "name": name, "metric": metric, "split": line.split},
        **{"higher_is_better": line.higher_is_better, "items": line.n, "chance": line.chance},
        "before": {**asdict(line.before), "stderr_over_items": line.stderr_before},
        "after": {**asdict(line.after), "stderr_over_items": line.stderr_after},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a grid and say in a few lines what it holds."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.cluster.report",
        description="Merge the reports of a grid's jobs: means over seeds, frontiers, Pareto sets, missing jobs.",
        epilog="Exit codes: 0 done, 1 no job has finished yet, 2 a mistake to mend, 130 interrupted.",
    )
    parser.add_argument("DIR", type=Path, help="the grid's folder, which has a grid.json")
    root: Path = parser.parse_args(argv).DIR
    try:
        merged = merge(root)
        page = write_merged(root, merged)
    except UnlearnError as e:
        console.say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    tell(merged, page)
    return 0 if merged.compared.runs else EXIT_NOTHING


def tell(merged: Merged, page: Path) -> None:
    """Say in a few lines what it holds, and what is missing."""
    console.say(one_line(headline(merged)), style="bold")
    for line in (*missing_lines(merged), *merged.compared.warnings):
        console.say(f"! {one_line(line)}", style="yellow")
    for family in merged.families:
        for line in choice_lines(family):
            name = f"{family_label(family)}: " if len(merged.families) > 1 else ""
            console.say(one_line(f"{name}{line}"))
    if not merged.compared.runs:
        console.say(NO_RUN)
    console.say(f"report: {page}")


if __name__ == "__main__":
    sys.exit(main())
