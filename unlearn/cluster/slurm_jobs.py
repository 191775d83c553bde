"""Jobs of a grid as Slurm arrays, through submitit (the extra ``cluster``).

submitit pickles what it shall call into ``GRID/.submitit`` and reads it back on the node. These pickles are written and
read by the same user, with the same Python, and hold the few strings of a :class:`JobCommand`; nothing else is ever
unpickled from there.

Before the time limit, and where the cluster warns before it pre-empts, Slurm sends USR2 to everything in the job.
submitit's process takes it: it has the job saved (:meth:`JobCommand.checkpoint`) and puts itself back in the queue.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from unlearn.cluster import job
from unlearn.cluster.grid import Grid, log_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.slurm_options import parameters
from unlearn.errors import GridError
from unlearn.recipe.evaluation import ClusterSpec

FOLDER = ".submitit"
MOST_TASKS = 1000  # in one array; Slurm's own limit, MaxArraySize, is 1001 unless somebody raised it
_TICK = 0.1  # seconds between looks at the child
_MARGIN = 10.0  # seconds of the grace that are left for going back in the queue


def check() -> None:
    """Look for submitit and Slurm.

    Raises:
        GridError: one of them is not here.
    """
    try:
        import_module("submitit")
    except ImportError as e:
        raise GridError(
            "jobs are put into Slurm with submitit, which is not installed: pip install 'lm-unlearn[cluster]'. "
            "Without Slurm: --local"
        ) from e
    absent = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if absent:
        raise GridError(
            f"there is no {' and no '.join(absent)} here: submit from a machine of the cluster. Without Slurm: --local"
        )


def submit(
    root: Path,
    grid: Grid,
    spec: ClusterSpec,
    names: Sequence[str],
    array: str,
    dependency: str | None = None,
) -> str:
    """Hand jobs (or preparations) to Slurm as one array, task by task as they are given.

    Args:
        names: Of the jobs.
        array: The array's name in the queue.

    Returns:
        Slurm's number of the array.

    Raises:
        GridError: Slurm refused it; the message has its words.
    """
    utils = import_module("submitit.core.utils")
    processes = job.processes_of(spec.processes, spec.gpus)
    executor = _executor()(folder=root / FOLDER, max_num_timeout=spec.requeues)
    try:
        executor.update_parameters(**parameters(spec, array, grid.cwd, len(names), dependency))
        commands = [JobCommand(str(root), name, processes, spec.nodes, spec.cpus, float(spec.grace)) for name in names]
        jobs = executor.submit_array(commands)
    except (utils.UncompletedJobError, utils.FailedSubmissionError, OSError, ValueError) as e:
        raise GridError(f"Slurm did not take the jobs: {str(e).strip()}") from e
    return str(jobs[0].job_id).partition("_")[0]


def _executor() -> Any:
    """submitit's executor, that makes an array of a single job too, and leaves the time limit to Slurm if told so."""
    slurm = import_module("submitit.slurm.slurm")

    class ArrayExecutor(slurm.SlurmExecutor):  # type: ignore[name-defined]
        def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
            self.folder.mkdir(parents=True, exist_ok=True)
            pickles = [self.folder / f"{self.parameters['job_name']}-{i}.pkl" for i in range(len(delayed_submissions))]
            for delayed, path in zip(delayed_submissions, pickles, strict=True):
                # without a known limit every stop counts as one at the limit, so that they come to an end
                delayed.set_timeout(self.parameters.get("time") or 0, self.max_num_timeout)
                delayed.dump(path)
            self.parameters["map_count"] = len(pickles)
            number = self._submit_command(self._submitit_command_str).job_id
            jobs = [slurm.SlurmJob(folder=self.folder, job_id=f"{number}_{i}") for i in range(len(pickles))]
            for one, path in zip(jobs, pickles, strict=True):
                one.paths.move_temporary_file(path, "submitted_pickle")
            return jobs

    return ArrayExecutor


@dataclass
class JobCommand:
    """What a task of the array does: run ``python -m unlearn.cluster.job`` and look after it. Pickled as it is made.

    ``processes`` are per machine; ``grace`` in seconds.
    """

    root: str
    name: str
    processes: int
    nodes: int
    cpus: int
    grace: float

    def __call__(self) -> None:
        """Run the job to its end.

        Raises:
            RuntimeError: it failed; Slurm's own state of the task then says so.
        """
        environment = import_module("submitit").JobEnvironment()
        before = JobState.load(Path(self.root), self.name)
        rank, hosts = environment.node, environment.hostnames
        line = job.command(Path(self.root), self.name, self.processes, self.nodes, rank, hosts[0])
        log = log_file(Path(self.root), self.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            # Slurm's warning goes to every process of the job, and would end those that do not expect it
            guarded = ["/bin/sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh", *line]
            env = job.environment(self.processes, self.cpus, self.grace)
            child = subprocess.Popen(guarded, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self._asked = False
        self._code: int | None = None
        self._child = child.pid
        signal.signal(signal.SIGTERM, lambda number, frame: self._tell())
        if environment.global_rank:  # submitit has the first machine speak for all of them
            signal.signal(environment._usr_sig(), lambda number, frame: self._tell())
        while self._look() is None:
            time.sleep(_TICK)
        child.returncode = self._code  # or Popen would wonder where it went
        if self._code == 0:
            return
        if environment.global_rank:  # srun would end the first machine with us, which saves, or knows what is wrong
            time.sleep(self.grace)
        elif self._was_stopped(before):
            _wait_for_slurm(environment, self.grace)
        raise RuntimeError(f"{self.name} ended with code {self._code}; see {log}")

    def checkpoint(self) -> Any:
        """Have the job save where it is and end. Called by submitit in its signal handler.

        Returns:
            What is to be run when the task begins again.
        """
        signal.signal(import_module("submitit").JobEnvironment._usr_sig(), signal.SIG_IGN)
        if hasattr(self, "_child"):
            self._tell()
            end = time.monotonic() + max(1.0, self.grace - _MARGIN)
            while self._look() is None:
                if time.monotonic() > end:  # what it saved before is what it goes on from
                    self._tell(signal.SIGKILL)
                    end = math.inf
                time.sleep(_TICK)
        again = JobCommand(self.root, self.name, self.processes, self.nodes, self.cpus, self.grace)
        return import_module("submitit").helpers.DelayedSubmission(again)

    def _tell(self, number: int = signal.SIGTERM) -> None:
        self._asked = True
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self._child, number)

    def _look(self) -> int | None:
        """The child's exit code when it has ended.

        Not by Popen: its ``wait`` holds a lock, and a signal handler that waits for the same child would wait for that.
        """
        if self._code is None:
            try:
                pid, status = os.waitpid(self._child, os.WNOHANG)
            except ChildProcessError:  # seen by the other, which was interrupted before it could say so
                self._code = job.EXIT_STOPPED
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def _was_stopped(self, before: JobState | None) -> bool:
        """Whether it ended because somebody asked it to; ``before`` is what its state was at the start."""
        state = JobState.load(Path(self.root), self.name)
        if state is not None and state != before and state.state != "running":
            return state.state == "stopped"
        return self._asked or self._code in (job.EXIT_STOPPED, -signal.SIGTERM)


def _wait_for_slurm(environment: Any, grace: float) -> None:
    """After a stop that was not ours: Slurm is about to end the task, to cancel it or to put it back in the queue.

    If we ended first it would be recorded as failed. If Slurm has nothing in mind (somebody's ``kill``), the task puts
    itself back in the queue, by submitit's own handler.
    """
    end = time.monotonic() + grace
    while time.monotonic() < end:
        asked = ["squeue", "-h", "-j", environment.raw_job_id, "-o", "%T"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        if told and told[0] != "RUNNING":
            sys.exit(job.EXIT_STOPPED)  # it knows already what comes next
        time.sleep(2.0)
    os.kill(os.getpid(), environment._usr_sig())
    time.sleep(60.0)
