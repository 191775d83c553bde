"""A grid of jobs, on a Slurm cluster or on this machine; how it stands; the rest of it.

Nothing here imports torch: jobs run in processes of their own (:mod:`unlearn.cluster.job`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from unlearn.cluster import status as grid_status
from unlearn.cluster.devices import Gpus
from unlearn.cluster.grid import GRID_FILE, Grid
from unlearn.cluster.job import EXIT_MISTAKE, EXIT_STOPPED, processes_of
from unlearn.cluster.local_jobs import LocalRunner, at_a_time
from unlearn.cluster.plan import cluster_of, identity, plan_grid
from unlearn.cluster.slurm_options import require_trust, resources
from unlearn.cluster.states import overview
from unlearn.cluster.submit import AGAIN, cancel, resubmit, submit
from unlearn.console import say
from unlearn.errors import GridError, UnlearnError

EXIT_NOTHING = EXIT_LEFT = 1
_MODES = ("status", "resubmit", "cancel", "merge")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, and turn what went wrong into one message and an exit code."""
    given = _parser().parse_args(argv)
    try:
        return _dispatch(given)
    except UnlearnError as e:
        say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("\nstopped; --status says what was submitted", style="yellow")
        return EXIT_STOPPED
    except BrokenPipeError:
        return 0


def _dispatch(given: argparse.Namespace) -> int:
    mode = _mode(given)
    if mode == "status":
        found = overview(given.status.absolute())
        (grid_status.print_json if given.json else grid_status.render)(found)
        return 0
    if mode == "cancel":
        return EXIT_LEFT if cancel(given.cancel.absolute()) else 0
    if mode == "merge":
        return 0 if _merge(given.merge.absolute()) else EXIT_NOTHING
    if mode == "resubmit":
        what, folder = given.resubmit
        if what not in AGAIN:
            raise GridError(f"--resubmit {what}: write one of {', '.join(AGAIN)}, and then the grid's folder")
        root = Path(folder).absolute()
        return _run_here(resubmit(root, what, given.set, given.local))
    grid = plan_grid(given.recipe, given.grid, given.set)
    root = (given.out or Path("grids") / f"{grid.name}-{identity(grid)[:8]}").absolute()
    if given.dry_run:
        for line in _lines(grid, root, given.local):
            sys.stdout.write(f"{line}\n")
        return 0
    if not given.local:
        require_trust(cluster_of(grid), given.set)
    return _run_here(submit(root, grid, given.local))


def _mode(given: argparse.Namespace) -> str:
    """What is asked for, if it is one thing.

    Raises:
        GridError: it is none, or several, or has flags that do not go with it.
    """
    asked = [mode for mode in _MODES if getattr(given, mode) is not None] + (["recipe"] if given.recipe else [])
    if len(asked) != 1:
        raise GridError(
            "give one of --recipe (to submit a grid), --status, --resubmit, --cancel and --merge"
            + (f", not {' and '.join(f'--{mode}' for mode in asked)}" if asked else "")
        )
    fitting = {"recipe": {"grid", "set", "out", "local", "dry_run"}, "resubmit": {"set", "local"}, "status": {"json"}}
    flags = ("grid", "set", "out", "local", "dry_run", "json")
    wrong = [flag for flag in flags if getattr(given, flag) and flag not in fitting.get(asked[0], ())]
    if wrong:
        raise GridError(f"--{wrong[0].replace('_', '-')} does not go with --{asked[0]}: leave it out")
    return asked[0]


def _run_here(runner: LocalRunner | None) -> int:
    """Run what is to be run on this machine, and merge what has come of it."""
    if runner is None:
        return 0
    code = runner.run()
    found = overview(runner.root)
    if found.count("done"):
        _merge(runner.root)
    say(f"{runner.root}: {grid_status.totals(found)}", style="bold")
    return code


def _merge(root: Path) -> int:
    """Write the merged report and say what it holds; returns how many runs it compares."""
    from unlearn.cluster.report import merge, tell, write_merged

    merged = merge(root)
    tell(merged, write_merged(root, merged))
    return len(merged.compared.runs)


def _lines(grid: Grid, root: Path, local: bool) -> Iterator[str]:
    """What ``--dry-run`` prints."""
    spec = cluster_of(grid)
    yield f"grid      {grid.name}, in {root}" + (" (there already)" if (root / GRID_FILE).is_file() else "")
    for recipe in grid.recipes:
        yield f"recipe    {recipe.source}"
    gpus = spec.gpus
    if local:
        here = Gpus.here(gpus)
        gpus = here.per_job
        yield f"here      {at_a_time(spec, here)} at a time, without Slurm"
    else:
        yield f"Slurm     {' '.join(resources(spec))}"
        at_once = (
            "as many at a time as there is room for" if spec.parallelism is None else f"{spec.parallelism} at a time"
        )
        yield f"          {at_once}; back in the queue after a time limit, {spec.requeues} times"
        for line in spec.setup:
            yield f"          before each job: {line}"
    if (several := processes_of(spec.processes, gpus)) > 1:
        yield f"          {several} processes on each machine work together"
    for one in grid.preparations:
        users = sum(job.preparation == one.index for job in grid.jobs)
        yield f"first     {one.name}: {', '.join(one.what)}, for {users} jobs"
    for job in grid.jobs:
        after = f"  after {grid.preparations[job.preparation].name}" if job.preparation is not None else ""
        settings = ", ".join(f"{key}={value}" for key, value in job.settings.items())
        yield f"job       {job.name}  {settings}{after}"
    yield f"{len(grid.jobs)} jobs, {len(grid.preparations)} preparations; nothing was written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.cluster.command",
        description="Run a grid of recipes and settings: on a Slurm cluster, or on this machine with --local. "
        "What jobs share is made once; submitting the same grid again submits what is missing.",
        epilog="Example: python -m unlearn.cluster.command --recipe quickstart.yaml --grid seed=0,1,2 --grid "
        "vector.lora.rank=8,16 --set cluster.time=4:00:00. Exit codes: 0 done (with --local) or submitted, 1 a job "
        "did not end well (--local), nothing to merge, or something that cannot be stopped from here (--cancel), 2 a "
        "mistake to mend, 130 interrupted.",
    )
    make = parser.add_argument_group("a grid")
    make.add_argument("--recipe", action="append", metavar="FILE", help="a recipe; several are run with every setting")
    make.add_argument(
        *("--grid",),
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="one axis (seed=0,1,2); several are multiplied",
    )
    make.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key for all jobs")
    make.add_argument("--out", type=Path, metavar="DIR", help="the grid's folder (default: grids/<name>-<fingerprint>)")
    make.add_argument("--local", action="store_true", help="run on this machine, cluster.parallelism jobs at a time")
    make.add_argument("--dry-run", action="store_true", help="check every job, print them, submit and write nothing")
    care = parser.add_argument_group("a grid that was submitted")
    care.add_argument("--status", type=Path, metavar="DIR", help="how its jobs stand")
    care.add_argument("--json", action="store_true", help="with --status: for programs")
    care.add_argument(
        "--resubmit",
        nargs=2,
        metavar=("WHAT", "DIR"),
        help="submit again what failed (or was lost), only the lost, or all-missing; with --set cluster.KEY=VALUE "
        "with other resources",
    )
    care.add_argument("--cancel", type=Path, metavar="DIR", help="take its jobs out of the queue, stop those that run")
    care.add_argument("--merge", type=Path, metavar="DIR", help="write the report over all jobs that are done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
