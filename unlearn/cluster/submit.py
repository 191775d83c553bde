"""Handing the jobs of a grid over, to Slurm or to a runner on this machine: what is missing, and nothing twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unlearn.cluster import slurm_jobs, slurm_queue
from unlearn.cluster.devices import Gpus
from unlearn.cluster.grid import GRID_FILE, Grid
from unlearn.cluster.job_state import JobState
from unlearn.cluster.local_jobs import LocalRunner
from unlearn.cluster.plan import cluster_of, identity, recluster
from unlearn.cluster.slurm_options import require_trust
from unlearn.cluster.states import ACTIVE, Overview, overview
from unlearn.cluster.status import totals
from unlearn.cluster.submissions import LOCK, Submission, alone, now, put
from unlearn.console import say
from unlearn.errors import GridError
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.lock import Holder

AGAIN: Mapping[str, frozenset[str]] = {
    "failed": frozenset({"failed", "lost", "blocked"}),
    "lost": frozenset({"lost"}),
    "all-missing": frozenset({"failed", "lost", "blocked", "stopped", "waiting"}),
}


def submit(root: Path, grid: Grid, local: bool) -> LocalRunner | None:
    """Submit what of a grid is not done and not on its way.

    Args:
        root: The grid's folder, absolute; made if it is not there.
        grid: As it was planned just now.
        local: To run it on this machine, without Slurm.

    Returns:
        What runs it here; None where there is nothing to run here.

    Raises:
        GridError: the folder is another grid's, or not a grid's; Slurm is not here, or refuses.
        RunFolderError: the folder cannot be written, or somebody else submits there.
    """
    if not local:
        slurm_jobs.check()
    _refuse_strangers(root)
    with alone(root):
        if (root / GRID_FILE).exists():
            there = Grid.load(root)
            if identity(there) != identity(grid):
                raise GridError(f"{root} is the folder of another grid ({_difference(there, grid)}): use another --out")
            grid = replace(there, cluster=grid.cluster)
        grid.save(root)
        return _hand_over(overview(root), "all-missing", local)


def resubmit(root: Path, what: str, sets: Sequence[str] = (), local: bool = False) -> LocalRunner | None:
    """Submit jobs again: the failed, the lost, or all that are not done.

    Args:
        root: The grid's folder, absolute.
        what: A key of :data:`AGAIN`.
        sets: Changes to the cluster block (``cluster.memory=64GB``), which last.
        local: On this machine. A grid that was last run so is run so again.

    Returns, Raises: as :func:`submit`.
    """
    Grid.load(root)  # a folder that is no grid's gets no lock
    with alone(root):
        if sets:
            recluster(Grid.load(root), sets).save(root)
        found = overview(root)
        local = local or (bool(found.submissions) and found.submissions[-1].kind == "local")
        if not local:
            require_trust(cluster_of(found.grid), sets)
            slurm_jobs.check()
        return _hand_over(found, what, local)


def cancel(root: Path) -> int:
    """Take the grid's jobs out of the queue, and stop its local runners. What is done stays, and can be gone on from.

    Returns:
        How many processes run on that cannot be stopped from here; who and where was said.

    Raises:
        GridError: Slurm refuses, or cannot be asked.
    """
    Grid.load(root)
    with alone(root):
        found = overview(root)
        if found.unasked is not None and any(s.kind == "slurm" for s in found.submissions):
            raise GridError(f"Slurm cannot be asked what is in its queue: {found.unasked}")
        arrays = sorted({entry.id.partition("_")[0] for entry in found.queue.values() if not entry.ending}, key=int)
        if arrays:
            slurm_queue.cancel(arrays)
            say(f"cancelled in Slurm: {', '.join(arrays)}")
        for one in found.submissions:
            if one.kind == "slurm" and one.ended is None:
                put(root, replace(one, ended=now()))
        runners = [s for s in found.submissions if s.kind == "local" and s.at_work()]
        stopped = [_stop("the local runner", Holder(s.pid, s.host, s.started, s.when)) for s in runners]
        if not runners:
            stopped += [_stop(name, holder) for name, holder in _left_alone(found)]
    if not arrays and not stopped:
        say(f"nothing to cancel; {totals(found)}")
    return stopped.count(False)


def _left_alone(found: Overview) -> Iterator[tuple[str, Holder]]:
    """Jobs that run outside the queue, and whose local runner is gone."""
    queued = {entry.id for entry in found.queue.values()}
    for row in (*found.preparations, *found.jobs):
        said = JobState.load(found.root, row.name) if row.state == "running" and row.where not in queued else None
        if said is not None and said.state == "running":
            yield row.name, Holder(said.pid, said.host, said.started, said.since)


def _stop(what: str, holder: Holder) -> bool:
    """Tell a process to stop, if it is one of this machine."""
    if holder.verdict() != "there":
        say(f"{what} is process {holder.pid} on {holder.host}: stop it there (kill {holder.pid})", style="yellow")
        return False
    os.kill(holder.pid, signal.SIGTERM)
    say(f"told {what}, process {holder.pid}, to stop; what is finished is kept")
    return True


@dataclass(frozen=True, slots=True)
class _Part:
    """The jobs to be submitted, the preparations they need first, and Slurm's numbers of those that are under way."""

    jobs: tuple[int, ...]
    preparations: tuple[int, ...]
    under_way: tuple[str, ...]

    @classmethod
    def of(cls, found: Overview, what: str) -> _Part:
        pairs = zip(found.grid.jobs, found.jobs, strict=True)
        jobs = tuple(job.index for job, row in pairs if row.state in AGAIN[what])
        needed = sorted({p for i in jobs if (p := found.grid.jobs[i].preparation) is not None})
        rows = {p: found.preparations[p] for p in needed}
        missing = tuple(p for p, row in rows.items() if row.state not in ACTIVE and row.state != "done")
        numbers = {entry.id for entry in found.queue.values()}
        under_way = tuple(row.where for row in rows.values() if row.state in ACTIVE and row.where in numbers)
        return cls(jobs, missing, tuple(number for number in under_way if number is not None))


def _hand_over(found: Overview, what: str, local: bool) -> LocalRunner | None:
    part, spec = _Part.of(found, what), cluster_of(found.grid)
    if not part.jobs:
        say(f"{found.root}: nothing to submit; {totals(found)}")
        return None
    if found.unasked is not None and any(s.kind == "slurm" and s.ended is None for s in found.submissions):
        raise GridError(f"what waits in Slurm's queue would be submitted twice, as {found.unasked}: try again later")
    say(f"{found.root}: {totals(found)}")
    if local:
        gpus = Gpus.here(spec.gpus)
        one = Submission.new("local", _queue_name(found), part.jobs, part.preparations, _attempts(found))
        put(found.root, one)
        return LocalRunner(found.root, found.grid, spec, one, gpus)
    for line in _to_slurm(found, part, spec):
        say(line)
    say(f"how they stand: python -m unlearn.cluster.command --status {found.root}", style="dim")
    return None


def _to_slurm(found: Overview, part: _Part, spec: ClusterSpec) -> Iterator[str]:
    """The preparations first, then the jobs, which wait for them; as many arrays of each as Slurm's limit asks for."""
    pieces = _cut(part.jobs)
    if spec.parallelism is not None and len(pieces) > 1:
        spec = spec.model_copy(update={"parallelism": max(1, spec.parallelism // len(pieces))})
    root, grid = found.root, found.grid
    waits_for, count = list(part.under_way), len(part.under_way) + len(part.preparations)
    for first in _cut(part.preparations):
        one = Submission.new("slurm", _queue_name(found), (), first, _attempts(found))
        put(root, one)
        names = [grid.preparations[i].name for i in first]
        try:
            array = slurm_jobs.submit(root, grid, spec, names, f"{one.name}p")
        except GridError:
            put(root, replace(one, preparations=()))
            raise
        waits_for.append(array)
        put(root, replace(one, preparation=array))
        yield f"submitted to Slurm: {_many(len(first), 'preparation')}, array {array}"
    # with several, one that fails must not take the jobs of the others with it: its own jobs see it and end
    dependency = f"{'afterok' if count == 1 else 'afterany'}:{':'.join(waits_for)}" if waits_for else None
    for jobs in pieces:
        one = Submission.new("slurm", _queue_name(found), jobs, (), _attempts(found))
        put(root, one)
        try:
            array = slurm_jobs.submit(root, grid, spec, [grid.jobs[i].name for i in jobs], one.name, dependency)
        except GridError:
            put(root, replace(one, jobs=()))
            raise
        put(root, replace(one, array=array))
        yield f"submitted to Slurm: {_many(len(jobs), 'job')}, array {array}"


def _cut(jobs: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(jobs[i : i + slurm_jobs.MOST_TASKS]) for i in range(0, len(jobs), slurm_jobs.MOST_TASKS)]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _queue_name(found: Overview) -> str:
    return f"{found.grid.name}-{identity(found.grid)[:8]}"


def _attempts(found: Overview) -> dict[str, int]:
    return {row.name: row.attempt for row in (*found.jobs, *found.preparations)}


def _refuse_strangers(root: Path) -> None:
    """A grid's folder is new, empty, or a grid's: nothing is written among other people's files."""
    try:
        there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    except OSError as e:
        raise GridError(f"{root} cannot be read ({e.strerror}): choose another --out") from e
    if root.exists() and not root.is_dir():
        raise GridError(f"{root} is not a folder: choose another --out")
    others = [name for name in there if not name.startswith((LOCK, f".{GRID_FILE}"))]
    if others and GRID_FILE not in there:
        raise GridError(
            f"{root} is not empty and not the folder of a grid (it holds {others[0]}): choose another --out"
        )


def _difference(there: Grid, here: Grid) -> str:
    if there.cwd != here.cwd:
        return f"submitted from {there.cwd}, where relative paths start"
    if there.recipes != here.recipes:
        if [r.source for r in there.recipes] != [r.source for r in here.recipes]:
            return f"of {', '.join(r.source for r in there.recipes)}"
        return "its recipe has been changed since"
    return f"{_many(len(there.jobs), 'job')} with other settings, {there.jobs[0].name} the first"
