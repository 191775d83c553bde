"""A process that has imported everything and forks one child per run: a run then costs what it does, not its imports.

:class:`Server` is the test's side. The process reads jobs from its stdin, a JSON list per line; it forks a child for
each of the list, waits for all, and writes what became of them as a line.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inject import Injector, Plan

HUNG = 1000  # the exit code that stands for a run that did not end in time
SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Job:
    """One run: arguments of ``unlearn``, where it is started, with what environment and limits, and what hits it."""

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None  # what happens at which operation
    after: float | None = None  # seconds from the start of the run until ``action`` (KILL or TERM) hits it
    action: str = "KILL"
    largest: int | None = None  # RLIMIT_FSIZE, in bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: its exit code (minus the signal's number if one ended it), what it said, how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Server:
    """The forking process, until :meth:`close`; ``warm`` is a run of its own for what a process computes once."""

    def __init__(self, warm: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(warm))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",  # no child of a process that has used a GPU can use it
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}",  # the code beside it
            },
        )

    def run(self, *jobs: Job) -> list[Ended]:
        """Run jobs at the same time, and wait for all of them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the forking process has died"
        return [Ended(**found) for found in json.loads(line)]

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(timeout=60)


# --- the other side ----------------------------------------------------------------------------------------------


def _serve(warm: Job) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _warm_up(warm)
    for line in sys.stdin:
        found = _together([_job(given) for given in json.loads(line)])
        answers.write(json.dumps([asdict(one) for one in found]) + "\n")
        answers.flush()


def _warm_up(job: Job) -> None:
    import torch
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from unlearn.cli import main

    drawn = Figure.savefig

    def savefig(figure: Figure, file: Any, **how: Any) -> None:
        """Figures in files are written, and not drawn, which would be a third of most runs."""
        if how["format"] == "svg":
            drawn(figure, file, **how)
        else:
            Path(file).write_bytes(how["format"].encode() * 9999)

    Figure.savefig = savefig
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread that looks after bars
    environment, here = dict(os.environ), Path.cwd()
    os.chdir(job.cwd)
    os.environ.update(job.env)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123 - no file
        assert main(job.argv) == 0
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    deadline = time.monotonic() + 30
    while others := _threads():  # a lock's own thread ends a moment after the lock
        assert time.monotonic() < deadline, f"threads besides the main one: {others}"
        time.sleep(0.05)
    gc.collect()
    gc.freeze()  # the children collect garbage often (accelerate does); let them look at their own only


def _threads() -> list[str]:
    """Those beside the main one: any might hold a lock that no child could ever get."""
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names[1:] if name != "jemalloc_bg_thd"]  # pyarrow's, which knows about forks


def _job(given: dict[str, Any]) -> Job:
    plan = given.pop("plan")
    return Job(**given, plan=plan and Plan(**{**plan, "roots": tuple(plan["roots"])}))


def _together(jobs: Sequence[Job]) -> list[Ended]:
    began = time.monotonic()
    places = [Path(tempfile.mkdtemp(prefix="job-")) for _ in jobs]
    left = {n: _fork(job, place) for n, (job, place) in enumerate(zip(jobs, places, strict=True))}
    due = {n: began + job.after for n, job in enumerate(jobs) if job.after is not None}
    found: dict[int, Ended] = {}
    while left:
        now = time.monotonic()
        for n, pid in list(left.items()):
            hung = now - began > SECONDS
            if hung:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if hung else os.WNOHANG)
            if done:
                del left[n]
                out, err = (Path(places[n], name).read_text("utf-8", "replace") for name in ("out", "err"))
                code = HUNG if hung else os.waitstatus_to_exitcode(status)
                found[n] = Ended(code, out, err, now - began)
                shutil.rmtree(places[n])
            elif now >= due.get(n, now + 1):
                del due[n]
                os.kill(pid, getattr(signal, f"SIG{jobs[n].action}"))
        time.sleep(0.004)
    return [found[n] for n in range(len(jobs))]


def _fork(job: Job, place: Path) -> int:
    for name in ("out", "err"):
        (place / name).touch()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _child(job, place)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _child(job: Job, place: Path) -> int:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_APPEND), number)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job.cwd)
    os.environ.update(job.env)
    tempfile.tempdir = None
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False))
    sys.argv = ["unlearn", *job.argv]
    if job.largest is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest, job.largest))
    from unlearn.cli import main

    if job.plan is not None:
        Injector(job.plan).install()
    return main(job.argv)


if __name__ == "__main__":
    _serve(_job(json.loads(sys.argv[1])))
