"""``--local``: the jobs of a grid as child processes of this one, a few at a time, preparations before who needs them.

One runner may end (or be killed) and another go on: what is done is in the jobs' own states, not in here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from unlearn.cluster import devices, job
from unlearn.cluster.grid import Grid, Job, Preparation, log_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.submissions import Submission, alone, now, put
from unlearn.console import live_line, say
from unlearn.processes import Requests, handled
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.files import explained
from unlearn.text import duration

_TICK = 0.05  # seconds between looks at the children
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux's prctl
_STOP = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_STYLES = {"done": "green", "stopped": "yellow"}


@dataclass(slots=True)
class _Child:
    one: Job | Preparation
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    since: float
    gpus: tuple[str, ...]
    before: JobState | None  # what it had said of itself until it was started


@dataclass(slots=True)
class LocalRunner:
    """Runs one submission to its end.

    ``ended`` is how each job and preparation ended, by name: done, failed, stopped, killed or blocked (its
    preparation failed, so it was not begun).
    """

    root: Path
    grid: Grid
    spec: ClusterSpec
    submission: Submission
    gpus: devices.Gpus = field(default_factory=devices.Gpus)
    ended: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Run what can be run.

        Returns:
            0 if all are done; 1 if any is not; 130 if somebody asked to stop (Ctrl-C, SIGTERM).
        """
        waiting: list[Job | Preparation] = [self.grid.preparations[i] for i in self.submission.preparations]
        waiting += [self.grid.jobs[i] for i in self.submission.jobs]
        most = at_a_time(self.spec, self.gpus)
        total, children = len(waiting), list[_Child]()
        with _asked_to_stop() as request, live_line() as show:
            try:
                while (waiting and not request.times) or children:
                    if request.times:
                        self._stop(children, request)
                    for child in [c for c in children if c.process.poll() is not None]:
                        children.remove(child)
                        self._end(child, total)
                    if not request.times:
                        self._block(waiting, total)
                    while not request.times and len(children) < most:
                        one = self._next(waiting)
                        if one is None:
                            break
                        children.append(self._start(one, most))
                    show(self._line(len(children), total))
                    time.sleep(_TICK)
            finally:  # of an error of ours: nobody would look after them
                _kill(children)
            with alone(self.root):
                put(self.root, replace(self.submission, ended=now()))
        if request.times:
            say("stopped; what is finished is kept, and submitting the grid again goes on from there", style="yellow")
            return job.EXIT_STOPPED
        return 0 if set(self.ended.values()) <= {"done"} else 1

    def _next(self, waiting: list[Job | Preparation]) -> Job | Preparation | None:
        """The first that needs not wait for a preparation of this submission."""
        mine = {i for i in self.submission.preparations if self.grid.preparations[i].name not in self.ended}
        for one in waiting:
            if isinstance(one, Preparation) or one.preparation not in mine:
                waiting.remove(one)
                return one
        return None

    def _block(self, waiting: list[Job | Preparation], total: int) -> None:
        """Take out those whose preparation came to nothing."""
        for one in list(waiting):
            if isinstance(one, Job) and one.preparation is not None:
                name = self.grid.preparations[one.preparation].name
                if self.ended.get(name, "done") != "done":
                    waiting.remove(one)
                    self._count(one.name, "blocked", total, f"its preparation {name} {self.ended[name]}")

    def _start(self, one: Job | Preparation, most: int) -> _Child:
        processes = job.processes_of(self.spec.processes, self.gpus.per_job)
        threads = cores() // min(most, len(self.grid.jobs))
        path = log_file(self.root, one.name)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = path.open("ab")
        gpus, before = self.gpus.take(), JobState.load(self.root, one.name)
        process = subprocess.Popen(
            job.command(self.root, one.name, processes),
            cwd=self.grid.cwd if Path(self.grid.cwd).is_dir() else None,
            env={**job.environment(processes, threads, self.spec.grace), **devices.environment(gpus)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to it once, from here
            preexec_fn=die_with(os.getpid()),  # without one who looks after them, jobs save and end
        )
        return _Child(one, process, log, time.monotonic(), gpus, before)

    def _end(self, child: _Child, total: int) -> None:
        child.log.close()
        self.gpus.give_back(child.gpus)
        code, took = child.process.returncode, duration(time.monotonic() - child.since)
        state = JobState.load(self.root, child.one.name)
        said = state if state != child.before else None
        if code == 0:
            self._count(child.one.name, "done", total, took)
        elif code in (job.EXIT_STOPPED, -signal.SIGTERM) or (said is not None and said.state == "stopped"):
            self._count(child.one.name, "stopped", total, took)
        elif code < 0:
            about = " (of too little memory?)" if code == -signal.SIGKILL else ""
            self._count(child.one.name, "killed", total, f"by signal {-code}{about}, after {took}")
        else:
            error = said.error if said is not None else None
            where = log_file(self.root, child.one.name)
            self._count(child.one.name, "failed", total, error.splitlines()[-1].strip() if error else f"see {where}")

    def _count(self, name: str, how: str, total: int, about: str) -> None:
        self.ended[name] = how
        say(f"[{len(self.ended)}/{total}] {name}: {how}, {about}", style=_STYLES.get(how, "red"))

    def _line(self, running: int, total: int) -> str:
        ended = Counter(self.ended.values())
        failed = sum(n for how, n in ended.items() if how in ("failed", "killed", "blocked"))
        return f"{ended['done']} done, {running} running, {failed} failed, of {total}"

    def _stop(self, children: Sequence[_Child], request: Requests) -> None:
        """Have all children save where they are and end. Being asked again, or ``cluster.grace`` seconds, ends that."""
        say(f"stopping {len(children)} jobs, which save where they are; once more to stop at once", style="yellow")
        for child in children:
            child.process.terminate()
        asked, end = request.times, time.monotonic() + self.spec.grace
        while any(c.process.poll() is None for c in children):
            if time.monotonic() > end or request.times > asked:
                _kill(children)
            time.sleep(_TICK)


def at_a_time(spec: ClusterSpec, gpus: devices.Gpus) -> int:
    """How many jobs run at a time: as many as there are GPUs for, or one; fewer if the recipe says so.

    ``gpus`` are all of them, none yet taken. Jobs that are given none are as many as the recipe says (and share what
    GPUs there are), but no more than the cores suffice for: a block made for a cluster asks for more than one machine.
    """
    if gpus.per_job:
        return min(spec.parallelism or gpus.room, gpus.room)
    processes = job.processes_of(spec.processes, gpus.per_job)
    room = max(1, cores() // processes)
    if (asked := spec.parallelism or 1) <= room:
        return asked
    each = f" for {processes} processes each" if processes > 1 else ""
    say(f"cluster.parallelism is {asked}; there are {cores()} cores here{each}: {room} at a time", style="yellow")
    return room


def _kill(children: Sequence[_Child]) -> None:
    """At once, with all that they have started: torchrun's processes are in sessions of their own."""
    psutil: Any = import_module("psutil")  # comes with accelerate
    for child in children:
        if child.process.poll() is None:
            below: list[Any] = []
            with suppress(psutil.Error):
                below = psutil.Process(child.process.pid).children(recursive=True)
            try:
                os.killpg(child.process.pid, signal.SIGKILL)
            except (OSError, AttributeError):
                child.process.kill()
            for one in below:
                with suppress(psutil.Error):
                    one.kill()
            child.process.wait()


def die_with(parent: int) -> Callable[[], None] | None:
    """For a new process: to be told to stop when its parent dies, however that dies. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    control = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        control(_PARENT_DIED, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(128 + signal.SIGTERM)

    return ask


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _asked_to_stop() -> Iterator[Requests]:
    request = Requests()
    with handled(request, _STOP):
        yield request
