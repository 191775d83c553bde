"""The jobs of a grid: handed by submitit to Slurm or to this machine, run there, listed, and stopped.

submitit pickles a :class:`Task` (three strings) into ``GRID/.submitit`` and reads it back as the same user.
``submissions.json`` says what was handed over; how a job ended stands in ``state/NAME.json``, not in an exit code, and
what it printed in ``logs/NAME.log``.
"""

from __future__ import annotations

import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from unlearn.cluster.compare import sealed
from unlearn.cluster.plan import GRID_FILE, Grid, Job
from unlearn.console import live_line, say
from unlearn.errors import GridError, UnlearnError, absent
from unlearn.processes import handled
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.files import explained, unwritable, write_json_atomic
from unlearn.store.lock import Lock, started
from unlearn.store.provenance import cores
from unlearn.text import counted, duration, hide, shown

Standing = Literal["done", "running", "queued", "stopped", "failed", "lost", "blocked", "waiting"]
AGAIN = {
    "failed": {"failed", "lost", "blocked"},
    "lost": {"lost"},
    "all-missing": {"failed", "lost", "blocked", "stopped", "waiting"},
}
EXIT_STOPPED = 130
_SUBMISSIONS, _LOCK, _SUBMITIT = "submissions.json", ".submit-lock", ".submitit"
_VISIBLE, _TRUST = "CUDA_VISIBLE_DEVICES", "UNLEARN_TRUST_SETUP"
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_YEAR = 365 * 24 * 60  # minutes
_PATIENCE = 60.0  # seconds for Slurm to answer, and for another command on the same grid
_MOST_TASKS = 1000  # of one array; Slurm's own limit, MaxArraySize, is 1001 unless somebody raised it
# sbatch's options that a key of the cluster block sets, or that make arrays, restarts and logs work
_TAKEN = re.compile(
    "partition|account|qos|nodes|time|mem|gpus-per-node|cpus-per-task|array|begin|chdir|dependency|error|input|job-name"
    "|kill-on-invalid-dep|no-requeue|ntasks(-per-node)?|open-mode|output|requeue|signal|test-only|wait|wrap"
)
_Entry = tuple[str, str, str]  # of Slurm's queue: number, state, reason


# -- one job, where it runs


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's last word: of one that was killed, still ``running``.

    ``stopped``: it was told to stop (time limit, pre-emption, Ctrl-C) and goes on from its last finished stage or
    checkpoint. ``attempt`` counts from 1; ``pid``, ``host`` and ``started`` identify the process; ``slurm`` is its
    number in the queue.
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


def _alive(pid: int, host: str, since: str) -> bool | None:
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
        requeue: Any = signal.getsignal(warning)  # submitit's own handler: back in the queue, and end
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
        job.log(root).parent.mkdir(parents=True, exist_ok=True)
        with job.log(root).open("ab") as log:  # what libraries print, too
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if self.gpus:
            os.environ[_VISIBLE] = self.gpus
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
            prepared = JobState.load(root, job.after) if job.after else None
            if prepared is not None and prepared.state == "failed":
                message = f"{job.name} was not begun: its preparation {job.after} failed ({prepared.error})"
                say(f"error: {message}", style="red")
                raise GridError(message)
            state = _announce(root, job, slurm) if main else None
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
            requeue(warning, None)
        if error is not None:
            raise RuntimeError(f"{job.name} failed: {error}; see {job.log(root)}")
        return ended


def _announce(root: Path, job: Job, slurm: str | None) -> JobState:
    """Say that it runs, in its state and its log."""
    before = JobState.load(root, job.name)
    attempt = 1 if before is None else before.attempt + 1
    pid = os.getpid()
    state = JobState("running", attempt, pid, platform.node(), started(pid), now(), slurm)
    where = f"{state.host}, process {pid}" + (f", Slurm {slurm}" if slurm else "")
    where += f", GPUs {os.environ[_VISIBLE]}" if os.environ.get(_VISIBLE) else ""
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


def _still_running(number: str) -> bool:
    """Whether Slurm counts the job as running: then a stop was a warning, and ending now would be taken for the end."""
    ask = ["squeue", "-h", "-j", number, "-o", "%T"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()[:1] == ["RUNNING"]
    except OSError:
        return False


# -- what was handed over


@dataclass(frozen=True, slots=True)
class Submission:
    """Jobs and preparations (by name) handed over together, in the order of an array's tasks.

    ``name`` is what they are called in Slurm's queue, never the same twice; the process is that of a local runner, or
    of who hands them to Slurm (``started`` is empty once that is done).
    """

    kind: Literal["slurm", "local"]
    name: str
    jobs: tuple[str, ...]
    when: str
    pid: int
    host: str
    started: str
    ended: bool = False  # nothing of it can still begin

    @classmethod
    def new(cls, kind: Literal["slurm", "local"], grid: Grid, jobs: Sequence[Job]) -> Submission:
        """By this process, now."""
        name, pid = f"{grid.name}-{secrets.token_hex(4)}", os.getpid()
        return cls(kind, name, tuple(job.name for job in jobs), now(), pid, platform.node(), started(pid))

    def at_work(self) -> bool:
        """Whether a local runner may still begin jobs of it, or Slurm is just being given them."""
        alive = _alive(self.pid, self.host, self.started)
        return not self.ended and (alive is not False if self.kind == "local" else alive is True)


_SUBMITTED = TypeAdapter(list[Submission])


def _read(root: Path) -> list[Submission]:
    path = root / _SUBMISSIONS
    with explained(path):
        text = path.read_bytes() if path.is_file() else b"[]"
    try:
        return _SUBMITTED.validate_json(text)
    except ValidationError as e:
        raise GridError(
            f"{path}: damaged ({e.errors()[0]['msg']}). It says what is in the queue: see that nothing of this grid is "
            "there, remove the file, and submit the grid again"
        ) from e


def _put(root: Path, *ones: Submission) -> None:
    """Add submissions, or replace those of the same name."""
    write_json_atomic(root / _SUBMISSIONS, list({one.name: one for one in (*_read(root), *ones)}.values()))


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else submits or cancels jobs of this grid meanwhile."""
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(root / _LOCK, wait=_PATIENCE, what=f"the grid {root}")
    with lock:
        yield


# -- how the jobs stand


@dataclass(frozen=True, slots=True)
class Row:
    """One job or preparation: how it stands, what its last attempt took (seconds), where it is, why it is not done."""

    name: str
    settings: Mapping[str, str]
    state: Standing
    attempt: int = 0
    since: str | None = None
    seconds: float | None = None
    where: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """All of a grid at one moment; ``unasked`` is why Slurm did not answer, if it should have."""

    root: Path
    grid: Grid
    jobs: tuple[Row, ...]
    preparations: tuple[Row, ...]
    submissions: Sequence[Submission]
    queue: Mapping[str, _Entry]
    unasked: str | None

    def totals(self) -> str:
        """``3 done, 1 failed, of 4 jobs``."""
        counts = Counter(row.state for row in self.jobs)
        found = [f"{counts[state]} {state}" for state in get_args(Standing) if counts[state]]
        return f"{', '.join(found)}, of {counted(len(self.jobs), 'job')}"


def overview(root: Path) -> Overview:
    """How every job stands: what was submitted, then what is in the queue, then what the jobs say themselves.

    In this order a job that moves on meanwhile is not taken for lost.
    """
    grid = Grid.load(root)
    submissions = _read(root)
    queue, unasked = _queue([one for one in submissions if one.kind == "slurm" and not one.ended])
    last = {name: one for one in submissions for name in one.jobs}

    def row(job: Job, prepared: str = "") -> Row:
        entry = queue.get(job.name)
        said = JobState.load(root, job.name)
        state, error = _standing(root, job, said, entry, last.get(job.name), unasked is None)
        if state == "lost" and (later := JobState.load(root, job.name)) != said:  # it ended while we looked
            said = later
            state, error = _standing(root, job, said, entry, last.get(job.name), unasked is None)
        hopeless = {"waiting": {"failed"}, "lost": {"failed", "lost", "stopped", "blocked"}}  # Slurm drops these
        if said is None and prepared in hopeless.get(state, ()):
            state, error = "blocked", f"its preparation {job.after} is {prepared}"
        where = entry[0] if entry else None
        if said is None:
            return Row(job.name, job.settings, state, where=where, error=error)
        if state == "running" and not entry:
            where = f"process {said.pid} on {said.host}"
        return Row(job.name, job.settings, state, said.attempt, said.since, said.seconds, where, error)

    preparations = {job.name: row(job) for job in grid.preparations}
    jobs = tuple(row(job, preparations[job.after].state if job.after else "") for job in grid.jobs)
    return Overview(root, grid, jobs, tuple(preparations.values()), submissions, queue, unasked)


def _standing(
    root: Path, job: Job, said: JobState | None, entry: _Entry | None, one: Submission | None, answered: bool
) -> tuple[Standing, str | None]:
    """How a job stands and why, from its own last word, Slurm's queue and the last submission of it."""
    if said is not None and said.state == "done" and (job.prepare or sealed(job.folder(root))):
        return "done", None
    if entry is not None:
        _, state, reason = entry
        if reason == "DependencyNeverSatisfied":
            return "blocked", "Slurm: what it waits for has failed"
        if state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"):
            return "queued", None
        if state != "COMPLETING" or said is None or said.state == "running":
            return "running", None
    slurm = one is not None and one.kind == "slurm" and not one.ended
    if one is not None and (said is None or said.since < one.when) and (one.at_work() or (slurm and not answered)):
        return "queued", None
    if said is None:
        return ("lost", "never began, and is not in Slurm's queue any more") if slurm else ("waiting", None)
    if said.state in ("failed", "stopped"):
        return said.state, said.error
    if said.state == "done":
        return "lost", "said that it is done, but its report.json is gone, or not as the run wrote it"
    lives = not answered if slurm and said.slurm else _alive(said.pid, said.host, said.started) is not False
    return ("running", None) if lives else ("lost", f"ended without a word (killed?), on {said.host}")


def _queue(submissions: Sequence[Submission]) -> tuple[dict[str, _Entry], str | None]:
    """What is in Slurm's queue, by job; or why Slurm cannot be asked.

    Asked by names, since a submitter may be killed before it has written the number down.
    """
    if not submissions:
        return {}, None
    names = ",".join(one.name for one in submissions)
    command = ["squeue", "-h", "-r", "--all", f"--name={names}", "-o", "%i|%T|%j|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        return {}, f"{e} {getattr(e, 'stderr', None) or ''}".strip()
    jobs = {(one.name, n): job for one in submissions for n, job in enumerate(one.jobs)}
    found = {}
    for line in done.stdout.splitlines():
        number, state, name, reason = line.strip().split("|", 3)
        job = jobs.get((name, int(number.partition("_")[2] or 0)))
        if job is not None:
            found[job] = number, state, reason
    return found, None


# -- handing over


def submit(root: Path, grid: Grid, what: str, local: bool, at_once: int | None = None) -> int:
    """Submit those of a grid's jobs that stand so (:data:`AGAIN`), and the preparations they still need.

    ``local`` runs them on this machine, ``at_once`` at a time. Returns the exit code: 0 submitted or done, 1 a local
    job did not end well, 130 stopped.
    """
    if cure := absent("submitit"):
        raise GridError(f"jobs are run by the package submitit: {cure}")
    with explained(root):
        others = sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) if root.exists() else []
    if others and GRID_FILE not in others:
        raise GridError(f"{root} is not empty and no grid's folder (it holds {others[0]}): choose another --out")
    with _locked(root):
        if others and (before := Grid.load(root)).identity() != grid.identity():
            why = "its recipe has been changed since" if before.jobs == grid.jobs else "it has other jobs"
            why = why if before.cwd == grid.cwd else f"submitted from {before.cwd}, where relative paths start"
            raise GridError(f"{root} is the folder of another grid ({why}): use another --out")
        grid.save(root)
        run = _hand_over(overview(root), what, local, at_once)
    return run()


def was_local(root: Path) -> bool:
    """Whether the grid was last run on this machine, and not by Slurm."""
    return [one.kind for one in _read(root)][-1:] == ["local"]


def _hand_over(found: Overview, what: str, local: bool, at_once: int | None) -> Callable[[], int]:
    """Submit to Slurm; of a local run, return what runs it when the grid's lock is free again."""
    root, grid = found.root, found.grid
    jobs = [grid.job(row.name) for row in found.jobs if row.state in AGAIN[what]]
    say(f"{root}: {'' if jobs else 'nothing to submit; '}{found.totals()}")
    if not jobs:
        return lambda: 0
    if found.unasked is not None:
        raise GridError(f"what waits in Slurm's queue would be submitted twice ({found.unasked}): try again later")
    needed = {job.after for job in jobs}
    missing = [row for row in found.preparations if row.name in needed and row.state != "done"]
    first = [grid.job(row.name) for row in missing if row.state not in ("running", "queued")]
    if local:
        places = slots(grid.cluster, at_once)
        one = Submission.new("local", grid, [*first, *jobs])
        _put(root, one)
        return lambda: _run_here(root, grid, one, places)
    waits_for = [found.queue[row.name][0] for row in missing if row.name in found.queue]
    # with several, one that fails must not take the jobs of the others with it: its own jobs see it and end
    how = "afterok" if len(missing) == 1 else "afterany"
    waits_for += [_to_slurm(root, grid, part, None) for part in _arrays(first)]
    for part in _arrays(jobs):
        _to_slurm(root, grid, part, f"{how}:{':'.join(waits_for)}" if waits_for else None)
    say(f"how they stand: unlearn status {root}", style="dim")
    return lambda: 0


def _arrays(jobs: Sequence[Job]) -> list[Sequence[Job]]:
    return [jobs[n : n + _MOST_TASKS] for n in range(0, len(jobs), _MOST_TASKS)]


def _to_slurm(root: Path, grid: Grid, jobs: Sequence[Job], dependency: str | None) -> str:
    """Hand jobs over as one array; returns its number in the queue."""
    one = Submission.new("slurm", grid, jobs)
    _put(root, one)  # before: should we be killed on the way, they are found in the queue by this name
    try:
        make = import_module("submitit").AutoExecutor
        executor = make(root / _SUBMITIT, cluster="slurm", slurm_max_num_timeout=grid.cluster.requeues)
        executor.update_parameters(**slurm_parameters(grid.cluster, one.name, grid.cwd, len(jobs), dependency))
        handles = executor.submit_array([Task(str(root), job.name) for job in jobs])
    except Exception as e:
        _put(root, replace(one, jobs=(), ended=True))
        raise GridError(f"Slurm did not take the jobs: {str(e).strip()}") from e
    _put(root, replace(one, started=""))
    array = str(handles[0].job_id).partition("_")[0]
    say(f"submitted to Slurm: {counted(len(jobs), 'preparation' if jobs[0].prepare else 'job')}, array {array}")
    return array


def check_slurm(spec: ClusterSpec, sets: Sequence[str] = ()) -> None:
    """Refuse what Slurm would, and shell lines of a recipe (not of ``--set``) that nobody has looked at."""
    own = any(text.partition("=")[0] in ("cluster", "cluster.setup") for text in sets)
    if spec.setup and not own and os.environ.get(_TRUST, "").lower() not in ("1", "true", "yes", "on"):
        lines = "".join(f"\n  {line}" for line in spec.setup)
        raise GridError(
            f"cluster.setup has shell lines, which run as you on the cluster:{lines}\n"
            f"If you trust whoever wrote the recipe, set {_TRUST}=1 in the environment"
        )
    slurm_parameters(spec, "-", "-", 1)
    if absent := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise GridError(
            f"there is no {' and no '.join(absent)} here: submit from a machine of the cluster. Without Slurm: --local"
        )


def slurm_parameters(
    spec: ClusterSpec, name: str, cwd: str, tasks: int, dependency: str | None = None
) -> dict[str, Any]:
    """The cluster block as submitit's executor takes it, for an array of so many tasks; GridError for a bad one."""
    if spec.time is None:
        raise GridError("how long may a job run before it is stopped and put back? Add --set cluster.time=4:00:00")
    limit, processes = minutes(spec.time), spec.processes or max(1, spec.gpus)
    # submitit takes a stop for one at the limit, which it counts, only in the last fifth or the last ten minutes
    longest = max(12 * limit, min(600, 30 * limit))
    if spec.grace > longest:
        raise GridError(f"cluster.grace: {spec.grace} s of {spec.time} leave too little: at most {longest} s")
    extra = {key.replace("_", "-").removeprefix("--"): value for key, value in spec.extra.items()}
    for key, value in (("partition", spec.partition), ("account", spec.account), ("qos", spec.qos), *extra.items()):
        # a line break would make the rest of it a shell line of the batch file
        if not re.fullmatch("[a-z][a-z0-9-]*", key) or not str(value).isprintable():
            raise GridError(
                f"cluster: {key!r}: {value!r} is no option of sbatch; write its long name: constraint: a100"
            )
        if key in extra and _TAKEN.fullmatch(key):
            raise GridError(f"cluster.extra: {key} is set by a key of the cluster block, or by the grid itself")
    cpus = max(1, spec.cpus // processes)
    ours: dict[str, Any] = {"requeue": True, "chdir": cwd}
    if dependency is not None:  # tasks that can never begin shall not stay in the queue for good
        ours |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    return {
        "name": name,
        "timeout_min": limit,
        "nodes": spec.nodes,
        "tasks_per_node": processes,
        "cpus_per_task": cpus,
        "gpus_per_node": spec.gpus or None,
        "mem_gb": gigabytes(spec.memory) if spec.memory else None,
        "slurm_partition": spec.partition,
        "slurm_account": spec.account,
        "slurm_qos": spec.qos,
        "slurm_signal_delay_s": spec.grace,
        "slurm_setup": list(spec.setup) or None,
        "slurm_array_parallelism": min(spec.parallelism or tasks, tasks),
        # since Slurm 22.05 srun does not take this over from sbatch; and other nodes would wait for a lost one
        "slurm_srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        "slurm_additional_parameters": ours | {k: v for k, v in extra.items() if v is not None and v is not False},
    }


def minutes(text: str) -> int:
    """Slurm's own reading of a time limit, rounded up: ``M:S``, ``H:M:S``, ``D-H:M`` or ``D-H:M:S``."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) == 2:
        parts = [*parts, 0] if days else [0, *parts]
    return int(days or 0) * 24 * 60 + parts[0] * 60 + parts[1] + math.ceil(parts[2] / 60)


def gigabytes(text: str) -> float:
    """``1.5GB`` in submitit's unit, of which it makes whole megabytes."""
    return math.ceil(float(text[:-2]) * 1024 ** "KMGT".index(text[-2]) / 1024) / 1024


# -- this machine


def slots(spec: ClusterSpec, at_once: int | None) -> list[str]:
    """As many places as jobs run here at a time: the GPUs that each has (as in CUDA_VISIBLE_DEVICES), or nothing."""
    named = os.environ.get(_VISIBLE)
    if named is not None:  # numbers or UUIDs; none from the first that is empty or -1
        visible = list(takewhile(lambda one: one not in ("", "-1"), (one.strip() for one in named.split(","))))
    else:
        import torch

        visible = [str(number) for number in range(torch.cuda.device_count())]
    each = max(1, spec.gpus)
    if visible and len(visible) < each:
        raise GridError(f"cluster.gpus is {each}, and {len(visible)} here: add --set cluster.gpus={len(visible)}")
    room = len(visible) // each if visible else max(1, cores() // (spec.processes or 1))
    asked = at_once or spec.parallelism or (room if visible else 1)
    if asked > room:
        say(f"{asked} jobs at a time are more than there are {'GPUs' if visible else 'cores'} for: {room}", "yellow")
    return [",".join(visible[n * each : (n + 1) * each]) for n in range(min(asked, room))]


def _run_here(root: Path, grid: Grid, one: Submission, places: Sequence[str]) -> int:
    """Run a submission to its end, preparations before the jobs that need them, a job in each place.

    Asked to stop, it has all jobs save where they are; asked again, or after ``cluster.grace`` seconds, it ends them.
    The jobs at work of a runner that is killed go on to their end.
    """
    submitit, psutil = import_module("submitit"), import_module("psutil")
    waiting = [grid.job(name) for name in one.jobs]
    free, running, ended = list(places), dict[str, tuple[Any, str, str]](), dict[str, str]()
    asked, stopping = list[float](), set[str]()
    processes = grid.cluster.processes or (max(1, grid.cluster.gpus) if any(places) else 1)
    executor = submitit.AutoExecutor(root / _SUBMITIT, cluster="local")
    executor.update_parameters(timeout_min=_YEAR, tasks_per_node=processes)
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, cores() // (processes * min(len(free), len(waiting))))

    def end(name: str, how: str, about: str) -> None:
        ended[name] = how
        style = {"done": "green", "stopped": "yellow"}.get(how, "red")
        say(f"[{len(ended)}/{len(one.jobs)}] {name}: {how}, {about}", style=style)

    on_signal = handled(lambda number, frame: asked.append(time.monotonic()), _STOP)
    with on_signal, live_line() as show:
        while running or (waiting and not asked):
            for name, (handle, place, since) in list(running.items()):
                if handle.done():
                    del running[name]
                    free.append(place)
                    end(name, *_ended(root, grid.job(name), since))
            for job in list(waiting) if not asked else ():
                prepared = ended.get(job.after or "", "done")
                if prepared != "done":
                    waiting.remove(job)
                    end(job.name, "blocked", f"its preparation {job.after} {prepared}")
                elif free and (job.after in ended or job.after not in one.jobs):
                    waiting.remove(job)
                    place, since = free.pop(0), now()
                    # its processes hear no Ctrl-C and no hang-up of the terminal: they are told when to stop
                    deaf = handled(signal.SIG_IGN, _STOP[1:])  # type: ignore[arg-type]
                    with deaf, submitit.helpers.environment_variables(OMP_NUM_THREADS=threads):
                        running[job.name] = executor.submit(Task(str(root), job.name, place)), place, since
            if asked and running and not stopping:
                say(f"stopping {counted(len(running), 'job')}; once more to end them at once", style="yellow")
            # a terminal that closes sends two signals at once
            at_end = asked and (asked[-1] > asked[0] + 2 or time.monotonic() > asked[0] + grid.cluster.grace)
            for name in running if asked else ():
                with suppress(psutil.Error):
                    process = psutil.Process(int(running[name][0].job_id))  # submitit's, which passes SIGTERM on
                    for each in (*process.children(recursive=True), process) if at_end else ():
                        each.kill()
                    if name not in stopping:
                        process.terminate()
                stopping.add(name)
            counts = Counter(ended.values())
            show(f"{counts['done']} done, {len(running)} running, of {len(one.jobs)}")
            time.sleep(0.05)
    with _locked(root):
        _put(root, replace(one, ended=True))
    if asked:
        say("stopped; what is finished is kept, and submitting the grid again goes on from there", style="yellow")
        return EXIT_STOPPED
    return 0 if set(ended.values()) <= {"done"} else 1


def _ended(root: Path, job: Job, since: str) -> tuple[str, str]:
    """How a local job ended, and what to say about it."""
    state = JobState.load(root, job.name)
    if state is None or state.since < since or state.state == "running":
        return "lost", f"ended without a word (killed?); see {job.log(root)} and {root / _SUBMITIT}"
    if state.state == "failed":
        return "failed", (state.error or f"see {job.log(root)}").splitlines()[-1].strip()
    return state.state, duration(state.seconds or 0.0)


def cancel(root: Path) -> int:
    """Take the grid's jobs out of the queue, and stop what runs here. What is done stays, and can be gone on from.

    Returns how many processes run on that cannot be stopped from here; which and where was said.
    """
    Grid.load(root)  # a folder that is no grid's gets no lock
    with _locked(root):
        found = overview(root)
        if found.unasked is not None:
            raise GridError(f"Slurm cannot be asked what is in its queue: {found.unasked}")
        if arrays := sorted({entry[0].partition("_")[0] for entry in found.queue.values()}, key=int):
            done = subprocess.run(["scancel", *arrays], capture_output=True, text=True, check=False)
            if done.returncode:
                raise GridError(f"Slurm did not cancel {', '.join(arrays)}: {done.stderr.strip()}")
            say(f"cancelled in Slurm: {', '.join(arrays)}")
        _put(root, *(replace(one, ended=True) for one in found.submissions if one.kind == "slurm"))
    runners = [one for one in found.submissions if one.kind == "local" and one.at_work()]
    at_work = [("the local runner", one.pid, one.host) for one in runners]
    for row in (*found.preparations, *found.jobs) if not runners else ():
        said = JobState.load(root, row.name)
        if said is not None and said.state == row.state == "running" and row.name not in found.queue:
            at_work.append((row.name, said.pid, said.host))
    for name, pid, host in at_work:
        if host == platform.node():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            say(f"told {name}, process {pid}, to stop; what is finished is kept")
        else:
            say(f"{name} is process {pid} on {host}: stop it there (kill {pid})", style="yellow")
    if not arrays and not at_work:
        say(f"nothing to cancel; {found.totals()}")
    return sum(host != platform.node() for _, _, host in at_work)
