"""The pico recipe as a 2 x 2 array in a real Slurm: one task is killed mid-way and requeued."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from throwaway import Throwaway, why_not

from unlearn.grids.grid import Grid, job_folder, log_file
from unlearn.grids.job_state import JobState

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

PICO = Path(__file__).resolve().parents[2] / "recipes" / "pico_smoke.yaml"
CLUSTER = """
cluster:
  cpus: 1
  memory: 2GB
  time: 0:20:00
  grace: 20
  setup: ["export OMP_NUM_THREADS=1"]
"""
_PATIENCE = 240.0


@dataclass(frozen=True)
class Submitted:
    """A grid in the queue: its folder, the cluster, what submit printed."""

    root: Path
    node: Throwaway
    said: str


def command(node: Throwaway, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unlearn.submit", *arguments],
        env={**node.environment, "UNLEARN_TRUST_SETUP": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def until(ready: Callable[[], Any], what: str, submitted: Submitted) -> Any:
    end = time.monotonic() + _PATIENCE
    while not (found := ready()):
        if time.monotonic() > end:
            files = [p for kind in ("*.log", "*.err", "*.out") for p in submitted.root.rglob(kind)]
            files += submitted.node.logs()
            logs = "\n".join(f"--- {p}\n{p.read_text(errors='replace')[-3000:]}" for p in files if p.is_file())
            pytest.fail(f"{what} did not happen:\n{submitted.node.run('squeue')}\n{logs}")
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Throwaway]:
    with Throwaway(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def submitted(node: Throwaway, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    folder = tmp_path_factory.mktemp("grid")
    # long enough in training that there is a mid-way
    text = PICO.read_text().replace("path: data/", f"path: {PICO.parent}/data/").replace("steps: 30", "steps: 200")
    (folder / "pico.yaml").write_text(text + CLUSTER)
    done = command(
        *(node, "--recipe", str(folder / "pico.yaml"), "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4"),
        *("--out", str(folder / "grid")),
    )
    assert done.returncode == 0, done.stderr
    return Submitted(folder / "grid", node, done.stdout + done.stderr)


def finished(submitted: Submitted) -> bool:
    states = [JobState.load(submitted.root, job.name) for job in Grid.load(submitted.root).jobs]
    assert not [s for s in states if s is not None and s.state == "failed"], states
    return all(s is not None and s.state == "done" for s in states)


def without_times(folder: Path) -> Any:
    report = json.loads((folder / "report.json").read_text())
    return {k: report[k] for k in ("chosen", "scores", "sweep", "vector", "data")}


def test_a_task_is_killed_requeued_and_the_grid_is_whole(submitted: Submitted, tmp_path: Path) -> None:
    grid = Grid.load(submitted.root)
    victim = grid.jobs[2]

    def training() -> str | None:
        state = JobState.load(submitted.root, victim.name)
        at_work = list((job_folder(submitted.root, victim.name) / ".unlearn-work").glob("*/checkpoint-*"))
        return state.slurm if state is not None and state.state == "running" and at_work else None

    task = until(training, "the training of the third job", submitted)
    submitted.node.run("scontrol", "requeue", task)
    until(lambda: _waits(submitted.node, task), "the requeue", submitted)
    status = command(submitted.node, "--status", str(submitted.root), "--json")
    assert status.returncode == 0, status.stderr
    until(lambda: finished(submitted) or _start(submitted.node, task), "the end of all jobs", submitted)

    again = JobState.load(submitted.root, victim.name)
    assert again is not None
    assert again.attempt == 2
    assert "as before" in log_file(submitted.root, victim.name).read_text()
    # the same recipe in one go, elsewhere: the kill has left no trace in the result
    alone = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "unlearn.run",
                "--recipe",
                grid.recipes[0].source,
                "--out",
                str(tmp_path / "alone"),
            ),
            *(part for override in victim.overrides for part in ("--set", override)),
        ],
        env={**submitted.node.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0, alone.stderr
    assert without_times(job_folder(submitted.root, victim.name)) == without_times(tmp_path / "alone")


@dataclass(frozen=True)
class Trained:
    """A grid of one job that is in the middle of its training; ``task`` is its number in the queue."""

    grid: Submitted
    name: str
    task: str

    @property
    def state(self) -> JobState | None:
        return JobState.load(self.grid.root, self.name)

    def stopped_once(self) -> bool:
        return self.state is not None and (self.state.state == "stopped" or self.state.attempt == 2)

    def went_on_from_where_it_was(self) -> None:
        log = log_file(self.grid.root, self.name).read_text()
        stop = re.search(r"stopped after step (\d+) of 300; it is kept", log)
        assert stop is not None, log
        assert int(stop[1]) > 0
        assert self.state is not None
        assert self.state.attempt == 2


@pytest.fixture
def trained(node: Throwaway, tmp_path: Path) -> Trained:
    text = PICO.read_text().replace("path: data/", f"path: {PICO.parent}/data/").replace("steps: 30", "steps: 300")
    (tmp_path / "pico.yaml").write_text(text.replace("teach: {", "# {") + CLUSTER)
    done = command(node, "--recipe", str(tmp_path / "pico.yaml"), "--grid", "seed=7", "--out", str(tmp_path / "grid"))
    assert done.returncode == 0, done.stderr
    alone = Submitted(tmp_path / "grid", node, done.stderr)
    name = Grid.load(alone.root).jobs[0].name

    def training() -> str | None:
        state = JobState.load(alone.root, name)
        at_work = list((job_folder(alone.root, name) / ".unlearn-work").glob("vectors+forget*"))
        return state.slurm if state is not None and state.state == "running" and at_work else None

    task = until(training, "the training", alone)
    time.sleep(1)
    return Trained(alone, name, task)


def test_a_job_at_its_time_limit_saves_where_it_is_and_goes_on(node: Throwaway, trained: Trained) -> None:
    node.run("scancel", "--signal=USR2", trained.task)  # what Slurm sends `grace` seconds before the limit
    until(trained.stopped_once, "the stop", trained.grid)
    until(lambda: finished(trained.grid) or _start(node, trained.task), "the end", trained.grid)
    trained.went_on_from_where_it_was()


def test_a_job_that_is_preempted_saves_where_it_is_and_goes_on(node: Throwaway, trained: Trained) -> None:
    """By a real one of a partition that goes first, and needs the whole node."""
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    node.run(*urgent)
    until(trained.stopped_once, "the stop", trained.grid)
    until(lambda: finished(trained.grid) or _start(node, trained.task), "the end", trained.grid)
    trained.went_on_from_where_it_was()


def _waits(node: Throwaway, task: str) -> bool:
    return f"{task} PENDING" in node.run("squeue", "-h", "-r", "-o", "%i %T")


def _start(node: Throwaway, task: str) -> None:
    """Slurm leaves a requeued job alone for two minutes, for the sake of broken nodes; here nobody has to wait.

    But for the credential of the attempt before, which the node has revoked up to the second it was told so: what
    begins in that very second is refused, and the job is gone.
    """
    if _waits(node, task):
        time.sleep(3)
        change = ["scontrol", "update", f"JobId={task}", "StartTime=now"]
        subprocess.run(change, env=node.environment, capture_output=True, timeout=60)
        time.sleep(1)


def test_the_merged_report_has_all_of_it(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    merged = command(submitted.node, "--merge", str(submitted.root))
    assert merged.returncode == 0, merged.stderr
    assert (submitted.root / "report.html").is_file()
    rows = (submitted.root / "jobs.csv").read_text().splitlines()
    assert len(rows) == 5  # a header and four jobs
    status = command(submitted.node, "--status", str(submitted.root))
    assert status.returncode == 0, status.stderr
    assert "4 done" in status.stdout + status.stderr


def test_the_teaching_was_done_once_per_seed(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    grid = Grid.load(submitted.root)
    assert len(grid.preparations) == 2
    for job in grid.jobs:
        assert "target: taken from" in log_file(submitted.root, job.name).read_text()


def test_submitting_it_again_submits_nothing(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    source = Grid.load(submitted.root).recipes[0].source
    before = set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split())  # some may still be on their way out
    again = command(
        *(submitted.node, "--recipe", source, "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4"),
        *("--out", str(submitted.root)),
    )
    assert again.returncode == 0, again.stderr
    assert set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split()) <= before
