"""One job of a grid as submitit runs it, on a node of a cluster or on this machine.

How it ended stands in ``state/NAME.json``, not in an exit code; what it printed in ``logs/NAME.log``.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from unlearn.cluster.plan import Grid, Job
from unlearn.console import say
from unlearn.errors import GridError, UnlearnError
from unlearn.store.files import unwritable, write_json_atomic
from unlearn.store.lock import started
from unlearn.text import hide, shown

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's last word.

    ``running`` is only what it said last: a killed job says so for ever. ``stopped``: it was told to stop (time limit,
    pre-emption, Ctrl-C) and goes on from its last finished stage or checkpoint. ``attempt`` counts from 1; ``pid``,
    ``host`` and ``started`` identify the process; ``slurm`` is its number in the queue.
    """

    state: Literal["running", "done", "stopped", "failed"]
    attempt: int
    pid: int
    host: str
    started: str
    since: str
    slurm: str | None = None
    error: str | None = None
    seconds: float | None = None

    def save(self, root: Path, name: str) -> None:
        """Write it, without secrets that an error may hold."""
        path = state_file(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**asdict(self), "error": None if self.error is None else hide(self.error)})

    @classmethod
    def load(cls, root: Path, name: str) -> JobState | None:
        """What the job said last; None when it never began, or when the file is damaged."""
        try:
            return _STATE.validate_json(state_file(root, name).read_bytes())
        except (OSError, ValidationError):
            return None


_STATE = TypeAdapter(JobState)


def state_file(root: Path, name: str) -> Path:
    """Where a job's state is kept."""
    return root / "state" / f"{name}.json"


def now() -> str:
    """The time as all files of a grid have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def alive(pid: int, host: str, since: str) -> bool | None:
    """Whether a process still runs; None where that cannot be known: it is on another machine."""
    return bool(since) and started(pid) == since if host == platform.node() else None


@dataclass(frozen=True)
class Task:
    """What submitit calls for one job. ``gpus``: those it may use, as in CUDA_VISIBLE_DEVICES; empty: as it is."""

    root: str
    name: str
    gpus: str = ""

    def checkpoint(self) -> Any:
        """What is to be run when the job begins again: the same, which goes on from where it was."""
        return import_module("submitit").helpers.DelayedSubmission(self)

    def __call__(self) -> str:
        """Run the job until it is done or told to stop; returns which of the two. RuntimeError where it failed."""
        submitit = import_module("submitit")
        environment = submitit.JobEnvironment()
        warning = getattr(signal, f"SIG{environment.USR_SIG}")
        requeue = signal.getsignal(warning)  # submitit's own handler: back in the queue, and end
        asked = set()
        begun = False

        def stop(number: int, frame: Any) -> None:
            asked.add(number)
            if number == warning:  # a training takes SIGTERM for itself, and saves its step before it ends
                signal.raise_signal(signal.SIGTERM)
                return
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if begun:  # or it would have said that it runs, and never how it ended
                raise KeyboardInterrupt

        root = Path(self.root)
        grid = Grid.load(root)
        job = grid.job(self.name)
        _print_to(job.log(root))
        if self.gpus:
            os.environ[VISIBLE] = self.gpus
        if environment.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        slurm = environment.job_id if environment.cluster == "slurm" else None
        main = environment.global_rank == 0
        ended: Literal["done", "stopped", "failed"] = "stopped"
        error, state = None, None
        start = time.monotonic()
        try:
            signal.signal(warning, stop)
            signal.signal(signal.SIGTERM, stop)
            _refuse_unprepared(root, job)
            state = _tell(root, job, slurm) if main else None
            begun = True
            if asked:
                raise KeyboardInterrupt
            ended, error = _run(root, grid, job)
        except KeyboardInterrupt:
            say("\nstopped; what is finished is kept, and the job goes on from there", style="yellow")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends in any case, and it shall be known how
            signal.signal(warning, signal.SIG_IGN)
        said = JobState.load(root, job.name)
        if state is not None:
            if ended != "done" and said is not None and said.state == "failed":  # another process of it knows why
                ended, error = "failed", said.error
            seconds = round(time.monotonic() - start, 2)
            replace(state, state=ended, since=now(), error=error, seconds=seconds).save(root, job.name)
            say(f"=== {job.name}: {ended} after {seconds:.0f} s", style="bold")
        elif not main and error is not None:  # this ends the main process, which will not know why
            patience = time.monotonic() + 10
            while (said is None or said.state != "running") and time.monotonic() < patience:  # it may not have begun
                time.sleep(0.1)
                said = JobState.load(root, job.name)
            if said is not None:
                replace(said, state="failed", since=now(), error=error).save(root, job.name)
        if ended == "stopped" and (warning in asked or (slurm and _still_running(environment.raw_job_id))):
            requeue(warning, None)  # type: ignore[operator,misc]
        if error is not None:
            raise RuntimeError(f"{job.name} failed: {error}; see {job.log(root)}")
        return ended


def _refuse_unprepared(root: Path, job: Job) -> None:
    prepared = JobState.load(root, job.after) if job.after else None
    if prepared is not None and prepared.state == "failed":
        message = f"{job.name} was not begun: its preparation {job.after} failed ({prepared.error})"
        say(f"error: {message}", style="red")
        raise GridError(message)


def _tell(root: Path, job: Job, slurm: str | None) -> JobState:
    """Say that it runs, in its state and its log."""
    before = JobState.load(root, job.name)
    attempt = 1 if before is None else before.attempt + 1
    pid = os.getpid()
    state = JobState("running", attempt, pid, platform.node(), started(pid), now(), slurm)
    where = f"{state.host}, process {pid}" + (f", Slurm {slurm}" if slurm else "")
    where += f", GPUs {os.environ[VISIBLE]}" if os.environ.get(VISIBLE) else ""
    say(f"=== {job.name}, attempt {attempt}, {state.since}, {where}", style="bold")
    state.save(root, job.name)
    return state


def _run(root: Path, grid: Grid, job: Job) -> tuple[Literal["done", "failed"], str | None]:
    """How it ended, and what went wrong."""
    try:
        _execute(root, grid, job)
    except UnlearnError as e:
        say(f"error: {e}", style="red")
        return "failed", shown(str(e))
    except Exception as e:
        sys.stderr.write(shown(traceback.format_exc()))
        full = unwritable(e)
        return "failed", shown(f"{full.strerror} ({e})" if full else traceback.format_exception_only(e)[-1].strip())
    return "done", None


def _execute(root: Path, grid: Grid, job: Job) -> None:
    from unlearn.execute import execute
    from unlearn.recipe.load import load_recipe

    os.chdir(grid.cwd)  # the overrides' paths are as seen from there
    recipe = grid.recipes[job.recipe]
    loaded = load_recipe(recipe.source, job.overrides, text=recipe.text)
    execute(loaded, job.folder(root), pool=root / "pool", prepare=job.prepare)


def _print_to(log: Path) -> None:
    """All that this process prints from now on, libraries' own output included, goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


def _still_running(number: str) -> bool:
    """Whether Slurm counts the job as running: then a stop was a warning, and ending now would be taken for the end."""
    ask = ["squeue", "-h", "-j", number, "-o", "%T"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()[:1] == ["RUNNING"]
    except OSError:
        return False
