"""The grid's two tables as CSV: a row per job, and a row per job and coefficient. Text that a spreadsheet opens safely.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula, so text that does is written with an apostrophe
before it. Numbers stay numbers. What is missing is an empty cell.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from unlearn.cluster.compare import Compared
from unlearn.cluster.grid import Grid, Job
from unlearn.cluster.runs import Missing, Run
from unlearn.recipe.metrics import Key
from unlearn.results import Score
from unlearn.text import clean

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "＝", "＋", "－", "＠")
_PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Cell = str | float | int | bool | None
Row = Mapping[str, Cell]


def text_cell(value: str) -> str:
    """Text as a cell: no control characters, and nothing that a spreadsheet would run."""
    shown = clean(value)
    if shown.startswith(_FORMULA) and not _PLAIN_NUMBER.fullmatch(shown):
        return f"'{shown}"
    # spaces before it do not keep every program from reading a formula
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA[:4]) and shown[:1].isspace() else shown


def jobs_csv(grid: Grid, compared: Compared, missing: Sequence[Missing]) -> str:
    """A row per job of the grid, in its order: settings, state, choice, every score before and after."""
    found: dict[str, Row] = {m.job.name: _missing_row(grid, m) for m in missing}
    aside = {run.job.name: why for run, why in compared.aside}
    for run in (*compared.runs, *(r for r, _ in compared.aside)):
        found[run.job.name] = _run_row(grid, run, aside.get(run.job.name))
    return _csv([found[job.name] for job in grid.jobs if job.name in found])


def frontier_csv(grid: Grid, compared: Compared) -> str:
    """A row per finished job and coefficient tried: both main numbers and every score, on validation items."""
    aside = {run.job.name for run, _ in compared.aside}
    rows = []
    for run in sorted((*compared.runs, *(r for r, _ in compared.aside)), key=lambda r: r.job.index):
        sign = run.yardstick.sign
        by_coefficient = {p.coefficient: p for p in run.report.sweep}
        for at in run.sweep:
            row: dict[str, Cell] = {
                **_head(grid, run.job),
                "counts": run.job.name not in aside,
                "lambda": at.coefficient,
                "chosen": at is run.chosen_at,
                "within_bound": at.within,
                "collapsed": at.collapsed,
                "goal": None if at.left is None else sign * at.left,
                "kept_worst": at.kept,
            }
            for s in by_coefficient[at.coefficient].scores:
                row |= _score_cells(s.key, s.split, "", s.score)
            rows.append(row)
    return _csv(rows)


def _head(grid: Grid, job: Job) -> dict[str, Cell]:
    return {"job": job.name, "recipe": grid.recipes[job.recipe].name, **{k: str(v) for k, v in job.settings.items()}}


def _run_row(grid: Grid, run: Run, why: str | None) -> Row:
    chosen, sign, at = run.report.chosen, run.yardstick.sign, run.chosen_at
    row: dict[str, Cell] = {
        **_head(grid, run.job),
        "state": "finished" if why is None else "set aside",
        "why": why or "",
        "lambda": chosen.coefficient,
        "bound_met": chosen.bound_met,
        "bound_met_on_test": run.met_on_test,
        "goal": run.yardstick.label,
        "goal_before": None if run.before is None else sign * run.before,
        "goal_after": None if run.after is None else sign * run.after,
        "kept_worst": run.kept,
        "goal_validation": None if at is None or at.left is None else sign * at.left,
        "kept_worst_validation": None if at is None else at.kept,
        "seconds": run.seconds,
        "where": run.where,
        "queue_job": (run.state.slurm if run.state else None) or "",
        "attempt": run.state.attempt if run.state else None,
    }
    for r in run.report.scores:
        key = (r.set, r.name, r.metric)
        row |= _score_cells(key, r.split, "before", r.before)
        row |= _score_cells(key, r.split, "after", r.after)
    return row


def _missing_row(grid: Grid, missing: Missing) -> Row:
    state = missing.state
    return {
        **_head(grid, missing.job),
        "state": missing.why,
        "why": missing.detail,
        "seconds": state.seconds if state else None,
        "queue_job": (state.slurm if state else None) or "",
        "attempt": state.attempt if state else None,
    }


def _score_cells(key: Key, split: str, side: str, score: Score) -> Row:
    name = "/".join((*key, split))
    ends = (f"{side}", f"{side}_stderr", f"{side}_n") if side else ("value", "stderr", "n")
    return {f"{name}/{end}": v for end, v in zip(ends, (score.value, score.stderr, score.n), strict=True)}


def _csv(rows: Sequence[Row]) -> str:
    """Columns in order of first appearance, but those of scores (they have a slash) last."""
    columns = list(dict.fromkeys(k for row in rows for k in row)) or ["job"]
    columns.sort(key=lambda k: "/" in k)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(text_cell(c) for c in columns)
    writer.writerows(_cells(row, columns) for row in rows)
    return out.getvalue()


def _cells(row: Row, columns: Sequence[str]) -> Iterable[str]:
    for name in columns:
        value = row.get(name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            yield ""
        elif isinstance(value, bool):
            yield "true" if value else "false"
        else:
            yield text_cell(value) if isinstance(value, str) else repr(value)
