"""The pico recipe as an array in a real Slurm: one task is killed mid-way and requeued."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from submitted import Submitted, Trained, command, finished, recipe, start, training, until, waits, without_times
from throwaway import Throwaway, why_not

from unlearn import run
from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
AXES = ("--grid", "vector.lora.rank=2,4")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Throwaway]:
    with Throwaway(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def submitted(node: Throwaway, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Whose second job was killed and requeued, and then all was waited for."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "pico.yaml").write_text(recipe(60, cpus=1))
    done = command(node, "submit", str(folder / "pico.yaml"), *AXES, "--out", str(folder / "grid"))
    assert done.returncode == 0, done.stderr
    grid = Submitted(folder / "grid", node, done.stdout + done.stderr)
    victim = Grid.load(grid.root).jobs[1].name
    task = until(lambda: training(grid, victim, "*/checkpoint-*"), "the training of the second job", grid)
    node.run("scontrol", "requeue", task)
    until(lambda: waits(node, task), "the requeue", grid)
    until(lambda: finished(grid) or start(node, task), "the end of all jobs", grid)
    return grid


def test_a_task_is_killed_requeued_and_the_grid_is_whole(submitted: Submitted, tmp_path: Path) -> None:
    grid = Grid.load(submitted.root)
    victim = grid.jobs[1]
    again = JobState.load(submitted.root, victim.name)
    assert again is not None
    assert again.attempt == 2
    assert "as before" in victim.log(submitted.root).read_text()
    # the teaching was done once
    assert len(grid.preparations) == 1
    for job in grid.jobs:
        assert "target: taken from" in job.log(submitted.root).read_text()
    # the same recipe in one go, elsewhere: the kill has left no trace in the result
    run(grid.recipes[0].source, set=list(victim.overrides), out=tmp_path / "alone")
    assert without_times(victim.folder(submitted.root)) == without_times(tmp_path / "alone")


def test_submitting_it_again_submits_nothing(submitted: Submitted) -> None:
    source = Grid.load(submitted.root).recipes[0].source
    before = set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split())  # some may still be on their way out
    again = command(submitted.node, "submit", source, *AXES, "--out", str(submitted.root))
    assert again.returncode == 0, again.stderr
    assert "nothing to submit; 2 done, of 2 jobs" in " ".join(again.stderr.split())
    assert set(submitted.node.run("squeue", "-h", "-r", "-o", "%i").split()) <= before


@pytest.mark.slow  # one of two machines is stopped beside this
@pytest.mark.parametrize("how", ["time limit", "pre-emption"])
def test_a_job_that_is_stopped_saves_where_it_is_and_goes_on(node: Throwaway, tmp_path: Path, how: str) -> None:
    """The pre-emption is a real one, by a job of a partition that goes first, and needs the whole node."""
    (tmp_path / "pico.yaml").write_text(recipe(300, cpus=1).replace("teach: {", "choose: {keep: 0}\n# {"))
    done = command(node, "submit", str(tmp_path / "pico.yaml"), "--grid", "seed=7", "--out", str(tmp_path / "grid"))
    assert done.returncode == 0, done.stderr
    alone = Submitted(tmp_path / "grid", node, done.stderr)
    name = Grid.load(alone.root).jobs[0].name
    trained = Trained(alone, name, until(lambda: training(alone, name, "vectors+forget*"), "the training", alone))
    time.sleep(1)
    if how == "time limit":
        node.run("scancel", "--signal=USR2", trained.task)  # what Slurm sends `grace` seconds before the limit
    else:
        node.run("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    until(trained.stopped_once, "the stop", alone)
    until(lambda: finished(alone) or start(node, trained.task), "the end", alone)
    trained.went_on_from_where_it_was()
