"""The pico recipe as a 2 x 2 array in a real Slurm: one task is killed mid-way and requeued."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from submitted import Submitted, Trained, command, finished, recipe, start, training, until, waits, without_times
from throwaway import Throwaway, why_not

from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Throwaway]:
    with Throwaway(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def submitted(node: Throwaway, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    folder = tmp_path_factory.mktemp("grid")
    (folder / "pico.yaml").write_text(recipe(200, cpus=1))
    done = command(
        *(node, "submit", str(folder / "pico.yaml"), "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4"),
        *("--out", str(folder / "grid")),
    )
    assert done.returncode == 0, done.stderr
    return Submitted(folder / "grid", node, done.stdout + done.stderr)


def test_a_task_is_killed_requeued_and_the_grid_is_whole(submitted: Submitted, tmp_path: Path) -> None:
    grid = Grid.load(submitted.root)
    victim = grid.jobs[2]

    task = until(lambda: training(submitted, victim.name, "*/checkpoint-*"), "the training of the third job", submitted)
    submitted.node.run("scontrol", "requeue", task)
    until(lambda: waits(submitted.node, task), "the requeue", submitted)
    status = command(submitted.node, "status", str(submitted.root), "--json")
    assert status.returncode == 0, status.stderr
    until(lambda: finished(submitted) or start(submitted.node, task), "the end of all jobs", submitted)

    again = JobState.load(submitted.root, victim.name)
    assert again is not None
    assert again.attempt == 2
    assert "as before" in victim.log(submitted.root).read_text()
    # the same recipe in one go, elsewhere: the kill has left no trace in the result
    line = [sys.executable, "-m", "unlearn.run", "--recipe", grid.recipes[0].source, "--out", str(tmp_path / "alone")]
    alone = subprocess.run(
        [*line, *(part for override in victim.overrides for part in ("--set", override))],
        env={**submitted.node.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0, alone.stderr
    assert without_times(victim.folder(submitted.root)) == without_times(tmp_path / "alone")


@pytest.fixture
def trained(node: Throwaway, tmp_path: Path) -> Trained:
    (tmp_path / "pico.yaml").write_text(recipe(300, cpus=1).replace("teach: {", "choose: {keep: 0}\n# {"))
    done = command(node, "submit", str(tmp_path / "pico.yaml"), "--grid", "seed=7", "--out", str(tmp_path / "grid"))
    assert done.returncode == 0, done.stderr
    alone = Submitted(tmp_path / "grid", node, done.stderr)
    name = Grid.load(alone.root).jobs[0].name
    task = until(lambda: training(alone, name, "vectors+forget*"), "the training", alone)
    time.sleep(1)
    return Trained(alone, name, task)


def test_a_job_at_its_time_limit_saves_where_it_is_and_goes_on(node: Throwaway, trained: Trained) -> None:
    node.run("scancel", "--signal=USR2", trained.task)  # what Slurm sends `grace` seconds before the limit
    until(trained.stopped_once, "the stop", trained.grid)
    until(lambda: finished(trained.grid) or start(node, trained.task), "the end", trained.grid)
    trained.went_on_from_where_it_was()


def test_a_job_that_is_preempted_saves_where_it_is_and_goes_on(node: Throwaway, trained: Trained) -> None:
    """By a real one of a partition that goes first, and needs the whole node."""
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    node.run(*urgent)
    until(trained.stopped_once, "the stop", trained.grid)
    until(lambda: finished(trained.grid) or start(node, trained.task), "the end", trained.grid)
    trained.went_on_from_where_it_was()


def test_all_of_it_is_compared(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    compared = command(submitted.node, "compare", str(submitted.root))
    assert compared.returncode == 0, compared.stderr
    assert (submitted.root / "report.html").is_file()
    assert len((submitted.root / "compare.csv").read_text().splitlines()) == 5  # a header and four jobs
    status = command(submitted.node, "status", str(submitted.root))
    assert status.returncode == 0, status.stderr
    assert "4 done" in status.stdout


def test_the_teaching_was_done_once_per_seed(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    grid = Grid.load(submitted.root)
    assert len(grid.preparations) == 2
    for job in grid.jobs:
        assert "target: taken from" in job.log(submitted.root).read_text()


def test_submitting_it_again_submits_nothing(submitted: Submitted) -> None:
    until(lambda: finished(submitted), "the end of all jobs", submitted)
    source = Grid.load(submitted.root).recipes[0].source
    before = set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split())  # some may still be on their way out
    again = command(
        *(submitted.node, "submit", source, "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4"),
        *("--out", str(submitted.root)),
    )
    assert again.returncode == 0, again.stderr
    assert set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split()) <= before
