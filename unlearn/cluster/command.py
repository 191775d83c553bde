"""``unlearn submit``, ``unlearn status`` and ``unlearn compare``: many runs, on a Slurm cluster or on this machine.

Nothing here imports torch: jobs run in processes of their own (:mod:`unlearn.cluster.job`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn.console import say
from unlearn.errors import GridError
from unlearn.text import duration, one_line, shown

if TYPE_CHECKING:
    from unlearn.cluster import plan

_COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "stopped": "yellow", "waiting": "dim"}
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key for all jobs.")]
Axes = Annotated[
    list[str] | None, typer.Option("--grid", metavar="KEY=V,V", help="One axis (seed=0,1,2); several are multiplied.")
]


def submit(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Recipes, and keys to change (seed=1); or a grid's folder."),
    ],
    grid: Axes = None,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="The grid's folder (default: grids/<name>-<fingerprint>).")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, a GPU for each job if there are.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="With --local: so many jobs at a time.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list every job; write nothing.")] = False,
    again: Annotated[
        str | None,
        typer.Option("--resubmit", metavar="WHAT", help="Of a grid's folder: failed (or lost), lost, or all-missing."),
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Of a grid's folder: take it out of the queue.")] = False,
) -> None:
    """Run every recipe with every setting, as jobs of a Slurm cluster or here; the same again submits what is missing.

    unlearn submit quickstart --grid seed=0,1,2 --grid vector.lora.rank=8,16 --set cluster.time=4:00:00

    Exit codes: 0 submitted, or done (--local); 1 a job did not end well (--local), or something cannot be stopped from
    here (--cancel); 2 a mistake; 130 stopped.
    """
    from unlearn.cluster import plan
    from unlearn.cluster import submit as jobs_of

    sets, axes = list(sets or ()), list(grid or ())
    if again is not None or cancel:
        if len(recipes) != 1 or axes or out or dry_run or (cancel and (again or sets)):
            raise GridError("--resubmit WHAT and --cancel each take the grid's folder, and nothing that makes a grid")
        root = Path(recipes[0]).absolute()
        planned = plan.Grid.load(root)
        if cancel:
            raise typer.Exit(1 if jobs_of.cancel(root) else 0)
        if again not in jobs_of.AGAIN:
            raise GridError(f"--resubmit {again}: write one of {', '.join(jobs_of.AGAIN)}, and then the grid's folder")
        planned = plan.recluster(planned, sets)
        local = local or jobs_of.was_local(root)
    else:
        sets += [word for word in recipes if "=" in word]
        planned = plan.plan_grid([word for word in recipes if "=" not in word], axes, sets)
        root = (out or Path("grids") / f"{planned.name}-{planned.identity()[:8]}").absolute()
    if dry_run:
        _print_plan(planned, root, local, jobs)
        return
    if not local:
        jobs_of.check_slurm(planned.cluster, sets)
    code = jobs_of.submit(root, planned, "all-missing" if again is None else again, local, jobs)
    if local:
        say(f"{root}: {jobs_of.overview(root).totals()}; unlearn compare {root}", style="bold")
    raise typer.Exit(code)


def status(
    folder: Annotated[Path, typer.Argument(help="The grid's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How the jobs of a grid stand: done, running, queued, failed (with the last line), lost."""
    from unlearn.cluster import submit as jobs_of

    found = jobs_of.overview(folder.absolute())
    if as_json:
        rows = {what: [asdict(row) for row in getattr(found, what)] for what in ("jobs", "preparations")}
        plain = {"schema": 2, "grid": found.grid.name, "folder": str(found.root), "unasked": found.unasked, **rows}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return
    table = _table("job", "state", "try", "time", "")
    for row in (*found.preparations, *found.jobs):
        since = row.seconds
        if row.state == "running" and row.since is not None:
            since = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(row.since)).total_seconds())
        error = (row.error or "").strip().splitlines()
        table.add_row(
            *(row.name, Text(row.state, _COLOURS.get(row.state, "red")), str(row.attempt or "")),
            *("" if since is None else duration(since), Text(one_line(shown(error[-1] if error else row.where or "")))),
        )
    out = _console()
    out.print(table, "", Text(found.totals(), "bold"), sep="\n")
    if found.unasked is not None:
        out.print(Text(shown(f"! Slurm cannot be asked ({found.unasked}): this is the last that was heard"), "yellow"))
    for states, what in (({"failed", "lost", "blocked"}, "failed"), ({"stopped", "waiting"}, "all-missing")):
        if any(row.state in states for row in found.jobs):
            out.print(Text(f"again: unlearn submit --resubmit {what} {found.root}", "dim"), soft_wrap=True)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or of grids.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the files go (default: the grid's folder if it is one, else compare).")
    ] = None,
) -> None:
    """Finished runs side by side: settings averaged over seeds, the Pareto set, compare.csv, report.json, report.html.

    Exit codes: 0 done, 1 no run has finished yet, 2 a mistake.
    """
    from unlearn.cluster.compare import compare as write
    from unlearn.cluster.plan import GRID_FILE

    alone = len(runs) == 1 and (runs[0] / GRID_FILE).is_file()
    place = (out or (runs[0] if alone else Path("compare"))).absolute()
    found, missing = write([run.absolute() for run in runs], place)
    console = _console()
    for family in found:
        table = _table("setting", "runs", "λ", f"{family.goal} before", "after", "kept", "bound met", "")
        for n, setting in enumerate(family.settings):
            table.add_row(*map(one_line, (setting.label, *setting.cells(), family.marks(n))))
        console.print(*([f"\n{one_line(family.question)}"] if family.question else []), table, sep="\n")
        for remark in family.remarks:
            say(one_line(remark))
    for line in missing:
        say(f"! {line}", style="yellow")
    say(f"report: {place / 'report.html'}" if found else "no run has finished: there is nothing to compare")
    raise typer.Exit(0 if found else 1)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 220, highlight=False, markup=False)  # columns in a file


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _print_plan(grid: plan.Grid, root: Path, local: bool, at_once: int | None) -> None:
    from unlearn.cluster import submit as jobs_of

    lines = [f"grid      {grid.name}, in {root}", *(f"recipe    {recipe.source}" for recipe in grid.recipes)]
    if local:
        lines.append(f"here      {len(jobs_of.slots(grid.cluster, at_once))} at a time, without Slurm")
    else:
        asked = jobs_of.slurm_parameters(grid.cluster, "", grid.cwd, len(grid.jobs))
        lines += [f"Slurm     {k.removeprefix('slurm_')}: {v}" for k, v in asked.items() if v not in (None, "")]
    for job in grid.preparations:
        lines.append(f"first     {job.name}, for {sum(one.after == job.name for one in grid.jobs)} jobs")
    for job in grid.jobs:
        settings = ", ".join(f"{key}={value}" for key, value in job.settings.items())
        lines.append(f"job       {job.name}  {settings}{f'  after {job.after}' if job.after else ''}")
    lines.append(f"{len(grid.jobs)} jobs, {len(grid.preparations)} preparations; nothing was written")
    sys.stdout.write("".join(f"{one_line(line)}\n" for line in lines))
