"""``python -m unlearn.cluster.job GRID NAME``: one job of a grid, or one preparation, as a process of its own.

What it prints goes to ``logs/NAME.log``, what it says about itself to ``state/NAME.json``. Of several processes that
share a job only the main one writes there. torchrun, which starts them, ends with 1 whatever they end with: how a job
ended is read from its state.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn import processes
from unlearn.cluster.devices import VISIBLE
from unlearn.cluster.grid import POOL, Grid, Job, Preparation, job_folder, log_file, preparation_folder
from unlearn.errors import GridError, UnlearnError
from unlearn.text import shown

if TYPE_CHECKING:
    from unlearn.cluster.job_state import JobState

EXIT_CRASH, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 130
# Seconds to wait for another process at the same job. After a broken node a job may start on a second one before it
# can be known there that the first has ended.
_WAIT = 600.0
_PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections


def command(
    root: Path, name: str, processes: int = 1, nodes: int = 1, node_rank: int = 0, main_host: str = "127.0.0.1"
) -> list[str]:
    """The command line of a job, or of one node's share of it.

    Args:
        processes: On each node.
        nodes: How many there are; all of them run the same command, but for ``node_rank``.
        node_rank: Which of them this is, from 0.
        main_host: Name or address of node 0, as the others reach it.
    """
    line = [sys.executable, "-m"]
    if processes * nodes > 1:
        line += ["torch.distributed.run", f"--nproc-per-node={processes}"]
        line += ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node-rank={node_rank}"]
        line += [f"--master-addr={main_host}", f"--master-port={_agreed_port()}"] if nodes > 1 else []
        line += ["-m"]
    return [*line, "unlearn.cluster.job", str(root), name]


def environment(processes: int, threads: int, grace: float) -> dict[str, str]:
    """What a job is started with: the threads of each process, and how long torchrun waits for one that saves.

    Args:
        processes: On this machine.
        threads: Cores that they share.
        grace: Seconds between the signal to stop and the end of patience.
    """
    limits = {"OMP_NUM_THREADS": str(max(1, threads // processes)), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{grace:.0f}"}
    return {**limits, **os.environ}


def _agreed_port() -> int:
    """The port that all nodes of a job come to without asking each other, and two jobs on one node seldom share."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return _PORTS[int(job) % len(_PORTS)] if job.isdecimal() else 29_500


def processes_of(processes: int | None, gpus: int) -> int:
    """How many processes a job has on each machine, from the cluster block: one per GPU unless it says otherwise."""
    return processes or max(1, gpus)


def claim_file(root: Path, name: str) -> Path:
    """The lock of who runs it: beside its state, which is written under it."""
    return root / "state" / f"{name}.lock"


def _elsewhere(root: Path, name: str) -> Path:
    """The folder in which a process that is not the main one leaves why it failed."""
    return root / "state" / f"{name}.failed"


def find(grid: Grid, name: str) -> Job | Preparation:
    """The job or preparation of this name.

    Raises:
        GridError: there is none.
    """
    everything: tuple[Job | Preparation, ...] = (*grid.jobs, *grid.preparations)
    found = next((one for one in everything if one.name == name), None)
    if found is None:
        raise GridError(f"the grid {grid.name} has no job or preparation {name!r}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; turn what went wrong into a state and an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.cluster.job",
        description="Run one job or preparation of a grid that unlearn.cluster.command made.",
        epilog="Exit codes: 0 done, 1 crashed, 2 a mistake to mend, 130 stopped (it goes on from there next time).",
    )
    parser.add_argument("grid", type=Path, metavar="GRID", help="the grid's folder")
    parser.add_argument("name", metavar="NAME", help="of the job or preparation")
    given = parser.parse_args(argv)
    root: Path = given.grid.absolute()
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGUSR2"):  # the batch system's warning to the process above, which passes it on as SIGTERM
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        grid = Grid.load(root)
        one = find(grid, given.name)
        _print_to(log_file(root, one.name))  # before the console is made, which asks what it writes to
        return _claimed(root, grid, one)
    except UnlearnError as e:
        sys.stderr.write(f"error: {shown(str(e))}\n")
        return EXIT_MISTAKE
    except KeyboardInterrupt:  # before it began: another process may be at it, and its state is that one's
        sys.stderr.write(f"\nstopped before {given.name} began\n")
        return EXIT_STOPPED


def _claimed(root: Path, grid: Grid, one: Job | Preparation) -> int:
    """Run it if nobody else does: the state is of one process at a time."""
    from unlearn.cluster.job_state import JobState
    from unlearn.console import is_main_process, say
    from unlearn.store.files import explained
    from unlearn.store.lock import Holder, Lock

    if not is_main_process():
        folder = _elsewhere(root, one.name)
        folder.mkdir(parents=True, exist_ok=True)
        processes.forget_failure(folder)
        code, error = _run(root, grid, one)
        if error is not None:  # torchrun ends the main process now, which could take that for a stop
            processes.leave_failure(folder, code, error)
        return code
    try:
        before = _previous(root, grid, one)
        claim = claim_file(root, one.name)
        with explained(claim):
            claim.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(claim, wait=_WAIT if _in_slurm() else 0.0, what=one.name)
    except UnlearnError as e:
        say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    try:
        me = Holder.me()
        attempt = 1 if before is None else before.attempt + 1
        state = JobState("running", attempt, me.pid, me.host, me.started, me.since, _in_slurm())
        return _told(root, grid, one, state)
    except UnlearnError as e:  # of the state itself: a full disk, or the folder was taken away
        say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    finally:
        lock.release()


def _told(root: Path, grid: Grid, one: Job | Preparation, state: JobState) -> int:
    """Run it between its first word and its last."""
    from unlearn.cluster.submissions import now
    from unlearn.console import say

    began = time.monotonic()
    try:
        _announce(one.name, state)
        state.save(root, one.name)
        code, error = _run(root, grid, one)
    except KeyboardInterrupt:  # before or after the run itself
        code, error = EXIT_STOPPED, None
    if code == EXIT_STOPPED and (failed := processes.failure_of_another(_elsewhere(root, one.name))):
        code, error = failed
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends in any case, and it shall be known how
    word: Any = {0: "done", EXIT_STOPPED: "stopped"}.get(code, "failed")
    seconds = round(time.monotonic() - began, 2)
    replace(state, state=word, since=now(), exit=code, error=error, seconds=seconds).save(root, one.name)
    say(f"=== {one.name}: {word} after {seconds:.0f} s", style="bold")
    return code


def _run(root: Path, grid: Grid, one: Job | Preparation) -> tuple[int, str | None]:
    """The exit code, and what went wrong."""
    from unlearn.console import say

    try:
        _execute(root, grid, one)
        return 0, None
    except UnlearnError as e:
        say(f"error: {e}", style="red")
        return EXIT_MISTAKE, shown(str(e))
    except KeyboardInterrupt:
        say("\nstopped; what is finished is kept, and the job goes on from there", style="yellow")
        return EXIT_STOPPED, None
    except Exception as e:
        say(shown(traceback.format_exc()))
        if _no_space(e):
            return EXIT_MISTAKE, f"no space left on the disk ({shown(str(e))})"
        return EXIT_CRASH, shown(traceback.format_exception_only(e)[-1].strip())


def _execute(root: Path, grid: Grid, one: Job | Preparation) -> None:
    from unlearn.execute import execute
    from unlearn.recipe.load import load_recipe

    try:
        os.chdir(grid.cwd)  # the overrides' paths are as seen from there
    except OSError as e:
        raise GridError(f"{grid.cwd}, where the grid was submitted, cannot be entered: {e.strerror}") from e
    recipe = grid.recipes[one.recipe]
    loaded = load_recipe(recipe.source, one.overrides, text=recipe.text)
    if isinstance(one, Preparation):
        execute(loaded, preparation_folder(root, one.name), pool=root / POOL, prepare=True)
    else:
        execute(loaded, job_folder(root, one.name), pool=root / POOL)


def _previous(root: Path, grid: Grid, one: Job | Preparation) -> JobState | None:
    """The job's last word.

    Raises:
        GridError: its preparation failed, and so would every job that needs it, one after the other.
    """
    from unlearn.cluster.job_state import JobState

    if isinstance(one, Job) and one.preparation is not None:
        name = grid.preparations[one.preparation].name
        prepared = JobState.load(root, name)
        if prepared is not None and prepared.state == "failed":
            raise GridError(
                f"{one.name} was not begun: its preparation {name} failed ({prepared.error}). Mend that, then: "
                f"python -m unlearn.cluster.command --resubmit failed {root}"
            )
    return JobState.load(root, one.name)


def _announce(name: str, state: JobState) -> None:
    from unlearn.console import say

    where = f"{platform.node()}, process {state.pid}" + (f", Slurm {state.slurm}" if state.slurm else "")
    gpus = os.environ.get(VISIBLE)
    where += f", GPUs {gpus}" if gpus else ""
    say(f"=== {name}, attempt {state.attempt}, {state.since}, {where}", style="bold")
    say(f"    {' '.join(sys.orig_argv)}")


def _print_to(log: Path) -> None:
    """All that this process prints from now on, and what libraries print past Python, goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    to = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.dup2(to, 1)
        os.dup2(to, 2)
    finally:
        os.close(to)


def _in_slurm() -> str | None:
    """The job's name in Slurm's queue."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _no_space(error: BaseException | None) -> bool:
    """A full disk, however deep in the chain."""
    from unlearn.store.files import no_space

    while error is not None:
        if no_space(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stop(number: int, frame: Any) -> None:
    """SIGTERM is taken like Ctrl-C, once: Slurm and the process above both send it, and cleaning up takes a while."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
